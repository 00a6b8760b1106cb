"""Byte-level BPE: any text to token ids and back, exactly."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from mezzo.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
# What a tokenizer.json made elsewhere may call the end of a document; the first that is there is taken.
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
_CONTEXT = 32  # tokens that a decoder which is not byte-level may look back
SMALLEST_VOCAB = 257  # every byte, and the end of text


class Tokenizer:
    """A `tokenizers` tokenizer that treats text as text.

    Nothing in a text is taken for a special token: "<|endoftext|>" typed by a user is thirteen characters. No token
    is added before or after a text, and texts are neither cut nor padded, whatever the tokenizer.json says.

    vocab_size  how many ids there are; a model needs that many rows
    eot         the id that ends a document
    eot_token   its name
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, name: str = "tokenizer") -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        vocab: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        # Ids may have gaps in tokenizers made elsewhere, so the count of names is not enough.
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eot_token = next((token for token in END_TOKENS if token in vocab), "")
        if not self.eot_token:
            raise DataError(
                f"{name}: no token that ends a document; looked for {', '.join(END_TOKENS)}; add one of them to "
                "added_tokens in the file, or let mezzo train a tokenizer"
            )
        self.eot = vocab[self.eot_token]
        self._token_bytes = _token_bytes(inner, self.vocab_size)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn byte-level BPE. The same texts give the same tokenizer.

        texts       what to learn from; the vocabulary comes out smaller if they hold too few different pairs
        vocab_size  at least 257: the 256 bytes and the end of text
        returns     Tokenizer
        raises      ConfigError if vocab_size is too small
        source      Radford et al. 2019, section 2.2: byte-level BPE and the pattern that keeps words apart
        """
        if vocab_size < SMALLEST_VOCAB:
            raise ConfigError(
                f"vocab_size {vocab_size} is too small: byte-level BPE needs {SMALLEST_VOCAB} or more, "
                "256 bytes and the end of text"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, made by mezzo or by Hugging Face's tokenizers.

        path     the file
        raises   DataError if it is not there, does not parse, or has no token that ends a document
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            inner = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); give a tokenizer.json") from error
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{path}: not a tokenizer.json that tokenizers can read ({error})") from error
        return cls(inner, name=str(path))

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, which `tokenizers` and `transformers` read too."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The contents of tokenizer.json."""
        text: str = self._inner.to_str()
        return text

    @property
    def is_byte_level(self) -> bool:
        """Whether every token is a run of bytes; those that mezzo trains are, and give any text back exactly."""
        return self._token_bytes is not None

    def encode(self, text: str) -> NDArray[np.int64]:
        """Text to token ids, without the end token.

        returns   (n,) int64
        raises    DataError if text holds half of a surrogate pair, which is not Unicode text
        """
        return self.encode_batch([text])[0].astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Many texts to token ids, on all cores (TOKENIZERS_PARALLELISM=false: on one).

        returns   list of (n,) uint32, without end tokens
        raises    DataError if a text holds half of a surrogate pair, which is not Unicode text
        """
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"text cannot be encoded: character {error.start} is half of a surrogate pair "
                    f"(U+{ord(text[error.start]):04X}); replace it, for example by U+FFFD"
                ) from None
        encodings = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """Token ids to text; special tokens such as the end of text are left out.

        ids       integers in 0 … vocab_size - 1
        returns   the text; bytes that are no UTF-8, as a model may write, become U+FFFD
        raises    DataError if an id is out of range
        """
        numbers = [int(i) for i in ids]
        for i in numbers:
            self._check(i)
        if self._token_bytes is not None:
            return b"".join(self._token_bytes[i] for i in numbers).decode("utf-8", "replace")
        text: str = self._inner.decode(numbers, skip_special_tokens=True)
        return text

    def byte_lengths(self) -> NDArray[np.int64] | None:
        """How many bytes of text each token stands for: for exact bits per byte of any stretch of tokens.

        returns   (vocab_size,) int64, 0 for special tokens; None if the tokenizer is not byte-level
        """
        if self._token_bytes is None:
            return None
        return np.array([len(raw) for raw in self._token_bytes], dtype=np.int64)

    def stream(self) -> StreamDecoder:
        """A new decoder for tokens that arrive one by one."""
        return StreamDecoder(self)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside the tokenizer's 0 … {self.vocab_size - 1}")


class StreamDecoder:
    """Text from tokens that arrive one by one; never half a character.

    What push() and finally flush() return, joined, is what Tokenizer.decode gives for all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # used if tokens are not bytes
        self._sent = ""

    def push(self, token: int) -> str:
        """Add one token id; returns the text that is now complete, often all of the token, sometimes nothing."""
        token = int(token)
        self._tokenizer._check(token)
        table = self._tokenizer._token_bytes
        if table is not None:
            return self._utf8.decode(table[token])
        # Other decoders look at the tokens before (spaces, byte fallback), so decode those too and send what is new. A
        # text that ends in U+FFFD may be in the middle of a character: wait.
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("�") or not text.startswith(self._sent):
            return ""
        new = self._advance(text)
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._sent = self._tokenizer.decode(self._ids)
        return new

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        if self._tokenizer._token_bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._sent) :]
        self._sent = text
        return new


def _token_bytes(inner: tokenizers.Tokenizer, vocab_size: int) -> list[bytes] | None:
    """The bytes of each id, b"" for special tokens; None if the tokenizer is not plain byte-level BPE."""
    if not isinstance(inner.decoder, decoders.ByteLevel) or not isinstance(inner.model, models.BPE):
        return None
    if inner.model.continuing_subword_prefix or inner.model.end_of_word_suffix:
        return None
    to_byte = _byte_alphabet()
    added = inner.get_added_tokens_decoder()
    table = []
    for i in range(vocab_size):
        token = inner.id_to_token(i)
        if token is None or (i in added and added[i].special):
            table.append(b"")
        elif i in added or any(char not in to_byte for char in token):
            table.append(token.encode())
        else:
            table.append(bytes(to_byte[char] for char in token))
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable, else U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
