"""From a config to its text, and to the model's shape that the text's tokenizer asks for."""

from __future__ import annotations

from pathlib import Path

import platformdirs

from mezzo.data.shards import Corpus, Progress, prepare
from mezzo.errors import ConfigError
from mezzo.models.shapes import GPTConfig, padded_vocab
from mezzo.train.config import Config


def prepare_corpus(config: Config, progress: Progress | None = None) -> Corpus:
    """Token shards of the config's text, made on first use in the cache folder."""
    d = config.data
    cache = Path(d.cache) if d.cache else Path(platformdirs.user_cache_dir("mezzo")) / "corpora"
    return prepare(
        d.corpus,
        cache,
        vocab_size=d.vocab_size,
        tokenizer_path=d.tokenizer,
        valid_fraction=d.valid_fraction,
        text_key=d.text_key,
        progress=progress,
    )


def model_config(config: Config, corpus: Corpus) -> GPTConfig:
    """The model's shape with room for the tokenizer's vocabulary.

    raises    ConfigError if model.vocab_size is smaller than the vocabulary
    """
    need = corpus.tokenizer.vocab_size
    given = config.model.vocab_size
    if given is not None and given < need:
        raise ConfigError(f"model.vocab_size = {given} is smaller than the tokenizer's {need}; leave it out to fit it")
    return config.model.resolve(vocab_size=given or padded_vocab(need))
