"""Text to batches: corpora, the tokenizer, token shards, and which tokens each step sees. No framework."""

from mezzo.data.batches import Batches, bits_per_byte, valid_batches
from mezzo.data.corpus import Document, ReadStats, documents
from mezzo.data.shards import Corpus, prepare
from mezzo.data.tokenizer import StreamDecoder, Tokenizer
from mezzo.data.tokens import Tokens

__all__ = [
    "Batches",
    "Corpus",
    "Document",
    "ReadStats",
    "StreamDecoder",
    "Tokenizer",
    "Tokens",
    "bits_per_byte",
    "documents",
    "prepare",
    "valid_batches",
]
