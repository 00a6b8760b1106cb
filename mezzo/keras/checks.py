"""What is refused as soon as a policy meets a model's layers, and arguments of `Precision` that are mixed up."""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import keras
from keras.src.layers.convolutional.base_conv import BaseConv
from keras.src.layers.convolutional.base_conv_transpose import BaseConvTranspose
from keras.src.layers.convolutional.base_depthwise_conv import BaseDepthwiseConv
from keras.src.layers.convolutional.base_separable_conv import BaseSeparableConv
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

from mezzo.errors import ConfigError
from mezzo.keras.table import Table
from mezzo.policy import Policy
from mezzo.policy.roles import depends_on_axis
from mezzo.policy.site import ROOT

CONVOLUTIONS = (BaseConv, BaseConvTranspose, BaseDepthwiseConv, BaseSeparableConv, ConvLSTMCell)
# Packages of Keras whose layers have no products: a rule for operands says nothing to them.
_NO_PRODUCTS = tuple(
    f"keras.src.layers.{package}."
    for package in ("activations", "merging", "normalization", "pooling", "regularization", "reshaping")
)


def check_layers(table: Table, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse what the table asks of layers and cannot be, all of them at once.

    layers    (path, layer)
    raises    ConfigError with a way out
    """
    _check_convolutions(table, layers)
    _check_recomputed(table, layers)


def _check_convolutions(table: Table, layers: Sequence[tuple[str, Any]]) -> None:
    blocks: dict[str, str] = {}
    for path, layer in layers:
        if isinstance(layer, CONVOLUTIONS):
            found = table.product(path, 0).specs.items()
            bad = [f"{role}={spec}" for role, spec in found if depends_on_axis(spec.fmt) or spec.hadamard]
            if bad:
                blocks[path] = bad[0]
    if not blocks:
        return
    safe = {
        path
        for path, layer in layers
        if type(layer).__module__.startswith(_NO_PRODUCTS) and not isinstance(layer, keras.layers.Dot)
    }
    others = {path for path, _ in layers} - {*blocks} - safe
    rules = "; ".join(
        f"{glob}:{name}=bfloat16"
        for glob in _globs(list(blocks), others)
        for name in ("input", "weight", "grad_output")
    )
    raise ConfigError(
        f"{', '.join(blocks)}: a convolution sums over several axes in its three products, so blocks "
        f"({next(iter(blocks.values()))}) would lie across them; take a format without blocks, such as bfloat16 or "
        f"e4m3@tensor, with the rules {rules}"
    )


def _globs(paths: Sequence[str], others: set[str]) -> list[str]:
    """As few globs as are easily found that match all of `paths` and none of `others`."""

    def glob(some: Sequence[str]) -> str | None:
        if len(some) == 1:
            return some[0]
        start = os.path.commonprefix(list(some))  # noqa: RUF071 - of names, not of files
        return f"{start}*" if start and not any(fnmatchcase(path, f"{start}*") for path in others) else None

    whole = glob(paths)
    if whole is not None:
        return [whole]
    kinds: dict[str, list[str]] = {}
    for path in paths:  # conv2d, conv2d_1 and conv2d_2 are of one kind, block_1_conv and block_2_conv too
        kinds.setdefault(re.sub(r"\d+", "", re.sub(r"_\d+$", "", path)), []).append(path)
    found: list[str] = []
    for kind in kinds.values():
        some = [path for path in kind if not any(fnmatchcase(path, one) for one in found)]
        one = glob(some) if some else None
        found += some if one is None else [one]
    return found


def _check_recomputed(table: Table, layers: Sequence[tuple[str, Any]]) -> None:
    rules = [rule for rule in table.rules if rule.by_call]
    if not rules:
        return
    recomputed = [path for path, layer in layers if _is_recomputed(layer)]
    for path, _ in layers:
        if not any(top in (path, ROOT) or path.startswith(f"{top}.") for top in recomputed):
            continue
        for rule in rules:
            if rule.matches_path(path):
                raise ConfigError(
                    f"{rule}: {path} is computed again in the backward pass (keras.RematScope), where its calls are "
                    f"counted from 0; give {path} one format for all calls, or build it outside of RematScope"
                )


def _is_recomputed(layer: Any) -> bool:
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or mode.mode in (None, "activations"):  # activations have no products
        return False
    return bool(mode.mode != "list_of_layers" or layer.name in mode.layer_names)


def check_order(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of `Precision` that are meant for another one.

    args, kwargs    as given
    raises          ConfigError that says what goes where
    """
    model = args[0] if args else kwargs.get("model")
    second = args[1] if len(args) > 1 else None
    if isinstance(model, (str, Policy)):
        raise ConfigError(f"the model comes first: mezzo.keras.Precision(model, policy={str(model)!r})")
    if any(base.__module__.partition(".")[0] == "torch" for base in type(model).__mro__):
        raise ConfigError(f"{type(model).__name__} is a torch module; under PyTorch it is mezzo.torch.Precision")
    if (args or "model" in kwargs) and not isinstance(model, keras.layers.Layer):
        raise ConfigError(
            f"the model comes first: mezzo.keras.Precision(model, policy='bf16'); got {type(model).__name__}, which is "
            "no Keras model or layer"
        )
    is_optimizer = isinstance(second, keras.optimizers.Optimizer) or (len(args) > 1 and "policy" in kwargs)
    if is_optimizer or "optimizer" in kwargs:
        raise ConfigError(
            "under Keras the optimizer is guarded by compile, or by precision.optimizer(optimizer); write "
            "mezzo.keras.Precision(model, policy=…)"
        )


def check_seed(seed: Any) -> None:
    """Refuse what is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed is a whole number from 0 to 2**64 - 1, got {seed!r}")


def policy_of(policy: Any) -> Policy:
    """`Policy.of`, with an error for what is no policy at all."""
    if not isinstance(policy, (str, Policy)):
        raise ConfigError(f"policy is text such as 'bf16' or a Policy, got {policy!r}")
    return Policy.of(policy)
