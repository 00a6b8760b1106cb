"""From a config to what a run is made of: text, device, the model's shape, optimizer, `Precision`, pruning."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzo import hardware
from mezzo.data.shards import Corpus, Progress, prepare
from mezzo.errors import ConfigError
from mezzo.models.shapes import GPTConfig, padded_vocab
from mezzo.torch import Precision, Pruner
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


def choose_device(wanted: str) -> torch.device:
    """The device that the config asks for; "auto" takes a GPU if the installed torch can use one.

    raises    ConfigError saying why a GPU that was asked for cannot be used
    """
    kind, why = hardware.gpu_status()
    if wanted == "cuda" and kind == "cpu":
        raise ConfigError(f"train.device = 'cuda', but {why}; take device = 'cpu', or install a build of torch for it")
    return torch.device(kind if wanted == "auto" else wanted)


def model_config(config: Config, corpus: Corpus) -> GPTConfig:
    """The model's shape with room for the tokenizer's vocabulary.

    raises    ConfigError if model.vocab_size is smaller than the vocabulary
    """
    need = corpus.tokenizer.vocab_size
    given = config.model.vocab_size
    if given is not None and given < need:
        raise ConfigError(f"model.vocab_size = {given} is smaller than the tokenizer's {need}; leave it out to fit it")
    return config.model.resolve(vocab_size=given or padded_vocab(need))


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW; matrices and embeddings decay, vectors (norms, biases) do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.train.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas, fused=True)


def make_precision(model: nn.Module, optimizer: Optimizer, config: Config) -> Precision:
    """raises    ConfigError if the policy cannot be carried out on this model, or the model cannot be pruned"""
    t = config.train
    schedule = config.schedule()
    return Precision(
        model,
        optimizer,
        config.resolved_policy() if schedule is None else schedule.phases[schedule.start().index].policy,
        max_norm=t.clip or None,  # 0 clips nothing
        max_value=t.clip_value or None,
        adaptive=t.clip_adaptive or None,
        pruner=make_pruner(model, config),
        seed=t.seed,
    )


def make_pruner(model: nn.Module, config: Config) -> Pruner | None:
    """The config's pruner; its begin and end are shares of the run, rounded to whole steps."""
    t = config.train
    if t.prune == "none":
        return None
    begin, end = round(t.prune_begin * t.steps), round(t.prune_end * t.steps)
    if t.prune == "2:4":
        return Pruner(model, "2:4", begin=begin)
    return Pruner(model, "magnitude", t.prune_sparsity, begin, end, t.prune_every)


def restore(precision: Precision, state: dict[str, Tensor], policy: str) -> list[str]:
    """Load what a checkpoint holds of a Precision; with another policy, what does not hang on that.

    policy    the one that the checkpoint was saved under
    returns   what a person should read
    """
    messages = []
    if precision.pruner is None and Pruner.saved_in(state):
        messages.append("train.prune is now 'none': weights that were pruned may move again")
    if policy == str(precision.policy):
        precision.load_state_dict(state)
    else:
        messages.append(f"the policy was {policy}, now {precision.policy}: a new loss scale begins")
        precision.load_lasting(state)
    return messages
