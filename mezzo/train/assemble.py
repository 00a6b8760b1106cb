"""From a config to what a torch run is made of: device, optimizer, `Precision`, pruning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzo import hardware
from mezzo.errors import ConfigError
from mezzo.torch import Precision, Pruner
from mezzo.train.config import Config
from mezzo.train.corpus import model_config, prepare_corpus

__all__ = [
    "choose_device",
    "make_optimizer",
    "make_precision",
    "make_pruner",
    "model_config",
    "prepare_corpus",
    "restore",
]


def choose_device(wanted: str) -> torch.device:
    """The device that the config asks for; "auto" takes a GPU if the installed torch can use one.

    raises    ConfigError saying why a GPU that was asked for cannot be used
    """
    kind, why = hardware.gpu_status()
    if wanted == "cuda" and kind == "cpu":
        raise ConfigError(f"train.device = 'cuda', but {why}; take device = 'cpu', or install a build of torch for it")
    return torch.device(kind if wanted == "auto" else wanted)


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
