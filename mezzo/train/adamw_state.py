"""AdamW's moments as every framework writes and reads them: in the layout that torch's own optimizer gives.

    optimizer.safetensors     state.{i}.step  float32, 0-d     state.{i}.exp_avg, state.{i}.exp_avg_sq  as the parameter
    manifest, meta.optimizer  the groups: first the matrices, which decay, then the vectors, which do not

i counts through the groups; within a group the parameters stand in the order of `parameter_shapes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezzo.errors import CheckpointError
from mezzo.train.arrays import Array, Named, describe
from mezzo.train.checkpoint import check_fit

EPS = 1e-8  # torch's
KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamW:
    """What AdamW remembers.

    count    steps taken, skipped ones not counted
    begun    whether there was a step, be it a skipped one: before it nothing is on disk
    first    parameter → running mean of its gradients (exp_avg)
    second   parameter → that of their squares (exp_avg_sq)
    """

    count: int
    first: Mapping[str, Array]
    second: Mapping[str, Array]
    begun: bool = True


@dataclass(frozen=True)
class Options:
    """Of the optimizer; a resumed run goes on with those that it was saved with."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float = EPS


def groups(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names of the parameters that decay, and of those that do not, if there are any."""
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    return [matrices, vectors] if vectors else [matrices]


def to_disk(
    shapes: Mapping[str, tuple[int, ...]], state: AdamW, options: Options, lr: float
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The optimizer's group of arrays and its meta; as torch's own writes them."""
    arrays: dict[str, Array] = {}
    meta = []
    keys = list(KEYS) if state.begun else []
    for g, names in enumerate(groups(shapes)):
        parameters: list[dict[str, Any]] = []
        for name in names:
            i = sum(len(before) for before in groups(shapes)[:g]) + len(parameters)
            if state.begun:
                step: Array = np.array(state.count, np.float32)
                arrays |= zip(
                    (f"state.{i}.{key}" for key in KEYS), (step, state.first[name], state.second[name]), strict=True
                )
            parameters.append({"is": _shown(shapes[name]), "order": keys, "tensors": keys, "values": {}})
        values = {
            "weight_decay": 0.0 if g else options.weight_decay, "lr": lr, "betas": list(options.betas),
            "eps": options.eps, "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
            "differentiable": False, "fused": True, "decoupled_weight_decay": True,
        }  # fmt: skip
        meta.append(
            {"names": [], "options": {"order": list(values), "tensors": [], "values": values}, "parameters": parameters}
        )
    return arrays, {"optimizer": "AdamW", "groups": meta}


def from_disk(shapes: Mapping[str, tuple[int, ...]], arrays: Named, meta: Mapping[str, Any]) -> tuple[AdamW, Options]:
    """What `to_disk` or torch's AdamW over these parameters was written from, bit for bit.

    raises    CheckpointError that names what does not fit
    """
    if meta["optimizer"] != "AdamW":
        raise _misfit([f"the checkpoint is of {meta['optimizer']}, this optimizer is AdamW"])
    wanted = groups(shapes)
    saved = [[entry["is"] for entry in group["parameters"]] for group in meta["groups"]]
    here = [[_shown(shapes[name]) for name in names] for names in wanted]
    if saved != here:
        raise _misfit(_differences(wanted, saved, here))
    values = meta["groups"][0]["options"]["values"]
    options = Options((values["betas"][0], values["betas"][1]), values["weight_decay"], values["eps"])
    if not arrays:
        first, second = ({name: np.zeros(shape, np.float32) for name, shape in shapes.items()} for _ in range(2))
        return AdamW(0, first, second, begun=False), options
    if not any(name.endswith(".exp_avg") for name in arrays):
        raise CheckpointError(
            "the moments of this checkpoint rest in less than 32 bits, which only torch reads; go on with it under "
            "--framework torch and the rule *:state=float32 first"
        )
    names = [name for group in wanted for name in group]
    expected = {f"state.{i}.{key}": _shown(shapes[name] if key != "step" else ())
                for i, name in enumerate(names) for key in KEYS}  # fmt: skip
    check_fit(expected, {name: describe(array) for name, array in arrays.items()}, "optimizer")
    counts = sorted({int(arrays[f"state.{i}.step"]) for i in range(len(names))})
    if len(counts) > 1:
        raise _misfit([f"parameters were stepped a different number of times: {counts}"])
    first, second = ({name: arrays[f"state.{i}.{key}"] for i, name in enumerate(names)} for key in KEYS[1:])
    return AdamW(counts[0], first, second), options


def _shown(shape: tuple[int, ...]) -> str:
    return f"float32[{', '.join(map(str, shape))}]"


def _differences(wanted: list[list[str]], saved: list[list[str]], here: list[list[str]]) -> Iterable[str]:
    if [len(group) for group in saved] != [len(group) for group in here]:
        counts = " and ".join(str(len(group)) for group in saved), " and ".join(str(len(group)) for group in here)
        return [f"groups of {counts[0]} parameters in the checkpoint, of {counts[1]} in this optimizer"]
    triples = [
        (name, was, now) for g in zip(wanted, saved, here, strict=True) for name, was, now in zip(*g, strict=True)
    ]
    return [f"{name} was {was}, is {now}" for name, was, now in triples if was != now]


def _misfit(problems: Iterable[str]) -> CheckpointError:
    return CheckpointError("the checkpoint does not fit the optimizer, nothing was loaded:\n  " + "\n  ".join(problems))
