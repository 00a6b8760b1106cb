"""What the mode does with each operation it knows: products, attention, norms, softmaxes, losses, look-ups."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from mezzo.errors import ConfigError
from mezzo.torch.attention import attention
from mezzo.torch.products import Matmul, bilinear, linear
from mezzo.torch.table import SiteSpec

if TYPE_CHECKING:
    from mezzo.torch.intercept import SiteMode

Func = Callable[..., Any]
Handler = Callable[["SiteMode", Func, tuple[Any, ...], dict[str, Any]], Any]


def _linear(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _linear_on(mode, func, *args, **kwargs)


def _linear_on(mode: SiteMode, func: Func, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _floating(input, weight):
        return func(input, weight, bias)
    path = mode.weight_path(weight)
    mode.note(path, "linear" if weight.dim() == 2 else "product", input, weight)
    spec = mode.table.product(path, mode.call_index(path, "product"))
    if spec.plain(input, weight, bias):
        return func(input, weight, bias)
    if weight.dim() != 2:
        return bilinear(spec, F.linear, input, weight, bias, "F.linear with a weight of one dimension")
    return linear(spec, input, weight, bias)


def _floating(*tensors: Any) -> bool:
    return all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)


def _matmul_spec(mode: SiteMode, a: Tensor, b: Tensor) -> SiteSpec:
    mode.note(mode.path, "product", a, b)
    return mode.table.product(mode.path, mode.call_index(mode.path, "product"))


def _with_names(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    """The positional arguments, and those that were given by keyword; `names` lists each place's spellings."""
    found = list(args)
    for spellings in names[len(args) :]:
        key = next((key for key in spellings.split("|") if key in kwargs), None)
        if key is None:
            break
        found.append(kwargs.pop(key))
    return tuple(found)


def _matmul(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    args = _with_names(args, kwargs, ("input", "other|mat2|vec|tensor"))
    if len(args) != 2 or kwargs or not _floating(*args) or 0 in (args[0].dim(), args[1].dim()):
        return _refuse_out(mode, func, args, kwargs)
    a, b = args
    spec = _matmul_spec(mode, a, b)
    if spec.plain(a, b):
        return func(a, b)
    if func in _RIGHT_HAND:
        a, b = b, a
    x = a.unsqueeze(0) if a.dim() == 1 else a
    y = b.unsqueeze(1) if b.dim() == 1 else b
    out = Matmul.apply(x, y, spec)
    if b.dim() == 1:
        out = out.squeeze(-1)
    return out.squeeze(-2 if b.dim() > 1 else -1) if a.dim() == 1 else out


def _refuse_out(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("out") is not None and not _written_by_inductor():
        raise ConfigError(f"{mode.path}: {func.__name__}(out=…) cannot be rounded by site; drop out=")
    return func(*args, **kwargs)


def _written_by_inductor() -> bool:
    """Whether compiled code is calling, as where a part of the model was compiled: its roundings are in it already."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and "extern_kernels" not in frame.f_globals:
        frame = frame.f_back
    return frame is not None


def _add_matmul(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """addmm, baddbmm, addbmm …: beta·input + alpha·(a·b)."""
    kwargs = dict(kwargs)
    args = _with_names(args, kwargs, ("input", "mat1|batch1", "mat2|batch2"))
    base, a, b = args[:3]
    if not _floating(a, b) or kwargs.get("out") is not None or len(args) > 3:
        return _refuse_out(mode, func, args, kwargs)
    spec = _matmul_spec(mode, a, b)
    if spec.plain(base, a, b):
        return func(*args, **kwargs)
    product = kwargs.get("alpha", 1) * Matmul.apply(a, b, spec)
    beta = kwargs.get("beta", 1)
    return product if beta == 0 else beta * base + product  # beta = 0 hides even a NaN in base


def _bilinear(op: Func, a_at: int, b_at: int, bias_at: int | None, name: str) -> Handler:
    """A handler for an operation that torch differentiates; positions are those of its operands."""

    def handle(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        given = list(args)
        names = {a_at: "input", b_at: "weight", bias_at: "bias"}
        for at in sorted(at for at in (a_at, b_at, bias_at) if at is not None):
            if len(given) == at and names[at] in kwargs:
                given.append(kwargs.pop(names[at]))
        if not _floating(given[a_at], given[b_at]):
            return _refuse_out(mode, func, tuple(given), kwargs)
        a, b = given[a_at], given[b_at]
        bias = given[bias_at] if bias_at is not None and len(given) > bias_at else None
        spec = _matmul_spec(mode, a, b)
        if spec.plain(a, b, bias):
            return func(*given, **kwargs)

        def run(x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
            call = list(given)
            call[a_at], call[b_at] = x, w
            if bias_at is not None and len(call) > bias_at:
                call[bias_at] = c
            return func(*call, **kwargs)  # type: ignore[no-any-return]

        return bilinear(spec, run, a, b, bias, name)

    return handle


def _einsum(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = args[1:] if len(args) != 2 or isinstance(args[1], Tensor) else tuple(args[1])
    if len(operands) != 2 or not isinstance(args[0], str) or not _floating(*operands):
        return _compute(mode, func, args, kwargs)  # one operand is no product; of three, torch chooses the order
    spec = _matmul_spec(mode, *operands)
    if spec.plain(*operands):
        return func(*args, **kwargs)
    return bilinear(spec, lambda x, y, _: func(args[0], x, y), operands[0], operands[1], None, "einsum")


def _sdpa(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    query, key, value = (*args, *(kwargs.get(name) for name in ("query", "key", "value")[len(args) :]))[:3]
    mode.note(mode.path, "attention", query, key, value)
    spec = mode.table.attention(mode.path, mode.call_index(mode.path, "attention"))
    if spec.plain(query, key, value):
        return func(*args, **kwargs)
    return attention(spec, *args, **kwargs)


def _compute(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms, softmaxes and losses: every floating operand in the compute format, so is the result."""
    dtype = mode.table.compute(mode.path)
    mode.note(mode.path, "compute", *(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return func(*map(convert, args), **{k: convert(v) for k, v in kwargs.items()})


def _running_norm(names: tuple[str, ...]) -> Handler:
    """Batch and instance norm write their running statistics: those tensors stay, and the weights go with them.

    names   of the first five arguments, in order
    """

    def handle(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        mode.note(mode.path, "compute", *(given.get(name) for name in names))
        dtype = mode.table.compute(mode.path)
        mean = given.get("running_mean")
        given["input"] = given["input"].to(dtype)
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = given[name].to(dtype if mean is None else mean.dtype)
        return func(*(given.pop(name) for name in names[: len(args)]), *args[len(names) :], **given)

    return handle


def _uncovered_product(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product that no site speaks of: it runs in the widest dtype of its operands, and is listed as not covered."""
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
    mode.note(mode.path, func.__name__, *leaves)
    widest = functools.reduce(torch.promote_types, (x.dtype for x in leaves), torch.float32)
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(widest) if x.is_floating_point() else x, (args, kwargs))
    return func(*args, **kwargs)


def _embedding(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A look-up is no product: its rows leave in the compute format; gradients are summed in the master's."""
    mode.note(mode.path, "compute", *(t for t in args if isinstance(t, Tensor)))
    return func(*args, **kwargs).to(mode.table.compute(mode.path))


def _without_dispatch(func: Func) -> Func:
    """A function of torch.nn.functional without its own hand-over to the mode, so that its inner calls get there."""
    given: Any = func
    bare = types.FunctionType(given.__code__, {**given.__globals__, "has_torch_function": lambda *_: False})
    bare.__defaults__, bare.__kwdefaults__ = given.__defaults__, given.__kwdefaults__
    return bare


def _composite(mode: SiteMode, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with mode:
        return _without_dispatch(func)(*args, **kwargs)


_RIGHT_HAND = {Tensor.__rmatmul__}

HANDLERS: dict[Func, Handler] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _sdpa,
    F.embedding: _embedding,
    F.embedding_bag: _embedding,
    F.multi_head_attention_forward: _composite,
    torch.einsum: _einsum,
    torch.tensordot: _bilinear(torch.tensordot, 0, 1, None, "tensordot"),
    torch.inner: _bilinear(torch.inner, 0, 1, None, "inner"),
    torch.linalg.vecdot: _bilinear(torch.linalg.vecdot, 0, 1, None, "vecdot"),
    F.batch_norm: _running_norm(("input", "running_mean", "running_var", "weight", "bias")),
    F.instance_norm: _running_norm(("input", "running_mean", "running_var", "weight", "bias")),
    torch.batch_norm: _running_norm(("input", "weight", "bias", "running_mean", "running_var")),
    torch.instance_norm: _running_norm(("input", "weight", "bias", "running_mean", "running_var")),
}
_f: Any
for _f in (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv,
           Tensor.dot, Tensor.__matmul__, Tensor.__rmatmul__, torch.linalg.matmul):  # fmt: skip
    HANDLERS[_f] = _matmul
for _f in (torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm):
    HANDLERS[_f] = _add_matmul
for _f in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    HANDLERS[_f] = _bilinear(_f, 0, 1, 2, _f.__name__)
for _name in [
    "layer_norm",
    "rms_norm",
    "group_norm",
    "local_response_norm",
    "normalize",
    "softmax",
    "log_softmax",
    "gumbel_softmax",
    "softmin",
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "poisson_nll_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "ctc_loss",
    "prelu",
    "grid_sample",
    "pairwise_distance",
    "margin_ranking_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "cosine_embedding_loss",
    "cosine_similarity",
    "multi_margin_loss",
]:
    HANDLERS[getattr(F, _name)] = _compute
for _f in (torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax, torch.logsumexp, Tensor.logsumexp,
           torch.layer_norm, torch.rms_norm, torch.group_norm, torch.cdist, torch.cosine_similarity):  # fmt: skip
    HANDLERS[_f] = _compute
# What these keep for the backward pass has roles of its own.
PRODUCTS = frozenset(
    func for func, handler in HANDLERS.items() if handler not in (_compute, _embedding, _composite)
) - {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}
for _f in (torch.addmv, torch.addbmm, torch.addr, torch.vdot, torch.chain_matmul, torch.linalg.multi_dot, F.bilinear,
           torch.bilinear, Tensor.addmv, Tensor.addbmm, Tensor.addr, Tensor.inner, Tensor.vdot):  # fmt: skip
    HANDLERS[_f] = _uncovered_product
