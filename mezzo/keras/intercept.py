"""Where the table meets TensorFlow: its products, wrapped where Python last sees them.

`keras.ops.matmul`, `tf.matmul`, `@`, `einsum`, `tensordot` and every layer end in one of a few generated functions.
Each is replaced by one that does nothing but call it, unless a layer under a `Precision` is running in this thread.
Gradients that TensorFlow computes itself call them too, but no layer is running then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn as keras_nn
from keras.src.layers.attention.grouped_query_attention import GroupedQueryAttention
from keras.src.layers.attention.multi_head_attention import MultiHeadAttention
from tensorflow.python.ops import gen_array_ops, gen_linalg_ops, gen_math_ops, gen_nn_ops
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

from mezzo.keras.attention import attention
from mezzo.keras.products import bilinear, contraction, einsum, product
from mezzo.keras.scope import Scope, current
from mezzo.keras.table import SiteSpec, Tensor
from mezzo.policy.roles import check_no_blocks
from mezzo.policy.site import PRODUCT_ROLES

Op = Callable[..., Any]
Handler = Callable[..., Any]


def install() -> None:
    """Wrap TensorFlow's products; once is enough."""
    if hasattr(gen_math_ops.mat_mul, "_mezzo"):
        return
    _wrap(gen_math_ops, "mat_mul", _mat_mul)
    _wrap(gen_math_ops, "batch_mat_mul", _batch_mat_mul)
    _wrap(gen_math_ops, "batch_mat_mul_v2", _batch_mat_mul)
    _wrap(gen_linalg_ops, "einsum", _einsum)
    for name in ("conv2d", "conv3d", "depthwise_conv2d_native"):
        _wrap(gen_nn_ops, name, functools.partial(_convolution, name))
    for name in ("conv2d_backprop_input", "conv3d_backprop_input_v2"):  # a transposed convolution
        _wrap(gen_nn_ops, name, functools.partial(_transposed_convolution, name))
    for module, name in ((gen_array_ops, "reshape"), (gen_array_ops, "transpose"), (gen_array_ops, "identity"),
                         (gen_array_ops, "expand_dims"), (gen_array_ops, "squeeze"), (gen_array_ops, "stop_gradient"),
                         (gen_math_ops, "cast")):  # fmt: skip
        _wrap(module, name, _same)
    _wrap(BaseResourceVariable, "_read_variable_op", _read)
    _wrap(keras_nn, "dot_product_attention", _attention)
    for layer in (MultiHeadAttention, GroupedQueryAttention):
        _wrap(layer, "_compute_attention", _layer_attention)


def _wrap(owner: Any, name: str, handler: Handler) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        scope = current()
        return original(*args, **kwargs) if scope is None else handler(scope, original, *args, **kwargs)

    wrapped._mezzo = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _spec(scope: Scope) -> SiteSpec:
    """What the next product of the running layer is given."""
    if scope.parts:
        return scope.parts.pop(0)
    forward = scope.forward
    return forward.layers.table.product(scope.path, forward.call_index(scope.path, "product"))


def _known(*tensors: Any) -> bool:
    """Whether these are tensors that the table speaks of; others pass untouched."""
    if not all(tf.is_tensor(x) and x.dtype in (tf.float32, tf.float64) for x in tensors):
        return False
    return all(x.dtype == tensors[0].dtype and x.shape.rank is not None for x in tensors)


def _tensors(*given: Any) -> list[Any]:
    """Variables read: TensorFlow's operations take them as they are."""
    return [tf.convert_to_tensor(x) if _is_variable(x) else x for x in given]


def _is_variable(x: Any) -> bool:
    return isinstance(x, (tf.Variable, keras.Variable))


def _rounded(scope: Scope, original: Op, a: Tensor, b: Tensor, run: Callable[[SiteSpec], Tensor]) -> Tensor:
    """`run(spec)`, or the operation itself where nothing is rounded."""
    spec = _spec(scope)
    y = original() if spec.plain(a, b) else run(spec)
    if spec.shown is None:  # a part of attention is attention
        scope.forward.layers.note(scope.path, "product", [list(a.shape), list(b.shape), list(y.shape)])
    return y


def _turns(scope: Scope, a: Tensor, b: Tensor) -> bool:
    """Whether the first operand has the second's part: it is the weight, or attention's key, and the second is not."""
    kind = scope.forward.kind(a)
    return bool(kind) and kind != scope.forward.kind(b)


def _matrices(scope: Scope, original: Op, a: Tensor, b: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    forward = scope.forward
    turns, kinds = _turns(scope, a, b), (forward.kind(a), forward.kind(b))

    def run(spec: SiteSpec) -> Tensor:
        x = tf.linalg.matrix_transpose(a) if turn_a else a
        y = tf.linalg.matrix_transpose(b) if turn_b else b
        if turns:  # (a·b)ᵀ = bᵀ·aᵀ
            x, y = tf.linalg.matrix_transpose(y), tf.linalg.matrix_transpose(x)
        weight = "weight" in kinds
        if y.shape.rank == 2 < x.shape.rank:  # one matrix for the whole batch: its rows are all rows
            lead = tf.shape(x)[:-1]
            rows = product(spec, tf.reshape(x, [-1, x.shape[-1] or tf.shape(x)[-1]]), y, weight)
            z = tf.ensure_shape(tf.reshape(rows, tf.concat([lead, tf.shape(y)[1:]], 0)), [*x.shape[:-1], y.shape[1]])
        else:
            z = product(spec, x, y, weight)
        return tf.linalg.matrix_transpose(z) if turns else z

    return _rounded(scope, original, a, b, run)


def _mat_mul(
    scope: Scope, original: Op, a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, **kwargs: Any
) -> Any:
    a, b = _tensors(a, b)
    bare = functools.partial(original, a, b, transpose_a=transpose_a, transpose_b=transpose_b, **kwargs)
    return _matrices(scope, bare, a, b, transpose_a, transpose_b) if _known(a, b) else bare()


def _batch_mat_mul(
    scope: Scope, original: Op, x: Any, y: Any, adj_x: bool = False, adj_y: bool = False, **kwargs: Any
) -> Any:
    x, y = _tensors(x, y)
    bare = functools.partial(original, x, y, adj_x=adj_x, adj_y=adj_y, **kwargs)
    return _matrices(scope, bare, x, y, adj_x, adj_y) if _known(x, y) else bare()


def _einsum(scope: Scope, original: Op, inputs: Any, equation: str, name: str | None = None) -> Any:
    inputs = _tensors(*inputs)
    bare = functools.partial(original, inputs, equation, name)
    if len(inputs) != 2 or not _known(*inputs):
        return bare()
    a, b = inputs
    turns = _turns(scope, a, b)
    if turns:
        left, arrow, out = equation.partition("->")
        first, _, second = left.partition(",")
        a, b, equation = b, a, f"{second},{first}{arrow}{out}"
    of = contraction(equation, (a.shape.rank, b.shape.rank))
    if of is None:  # nothing is summed: no product
        return bare()
    weight = scope.forward.kind(b) == "weight"
    return _rounded(scope, bare, a, b, lambda spec: einsum(spec, of, a, b, weight))


def _channels_first(kind: str, data_format: str) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Orders of axes in which torch has a convolution's input and its kernel, from TensorFlow's.

    kind    conv2d (h, w, in, out), conv3d (d, h, w, in, out), depthwise (h, w, in, multiplier)
    """
    rank = 5 if kind.startswith("conv3d") else 4
    spatial = tuple(range(rank - 2))
    first = None if data_format.startswith("NC") else (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 2, rank - 1) if kind.startswith("depthwise") else (rank - 1, rank - 2)
    return first, (*kernel, *spatial)


def _convolution(kind: str, scope: Scope, original: Op, input: Any, filter: Any, *args: Any, **kwargs: Any) -> Any:
    input, filter = _tensors(input, filter)
    bare = functools.partial(original, input, filter, *args, **kwargs)
    if not _known(input, filter):
        return bare()

    def run(spec: SiteSpec) -> Tensor:
        check_no_blocks(scope.path, spec.specs, "a convolution", PRODUCT_ROLES)
        orders = _channels_first(kind, kwargs.get("data_format", "NHWC"))
        again = kwargs | {"name": None}  # a graph takes a name once
        return bilinear(spec, lambda x, w: original(x, w, *args, **again), input, filter, orders)

    return _rounded(scope, bare, input, filter, run)


def _transposed_convolution(
    kind: str, scope: Scope, original: Op, input_sizes: Any, filter: Any, out_backprop: Any, *args: Any, **kwargs: Any
) -> Any:
    filter, out_backprop = _tensors(filter, out_backprop)
    bare = functools.partial(original, input_sizes, filter, out_backprop, *args, **kwargs)
    if not _known(out_backprop, filter):
        return bare()

    def run(spec: SiteSpec) -> Tensor:
        check_no_blocks(scope.path, spec.specs, "a transposed convolution", PRODUCT_ROLES)
        orders = _channels_first(kind, kwargs.get("data_format", "NHWC"))
        again = kwargs | {"name": None}
        return bilinear(spec, lambda x, w: original(input_sizes, w, x, *args, **again), out_backprop, filter, orders)

    return _rounded(scope, bare, out_backprop, filter, run)


def _read(scope: Scope, original: Op, variable: Any, *args: Any, **kwargs: Any) -> Any:
    value = original(variable, *args, **kwargs)
    if value.shape.rank is not None and value.shape.rank > 1:
        scope.forward.tag(value, "weight")
    return value


def _same(scope: Scope, original: Op, *args: Any, **kwargs: Any) -> Any:
    """An operation that leaves a tensor what it is."""
    out = original(*args, **kwargs)
    kind = "" if not args else "weight" if _is_variable(args[0]) else scope.forward.kind(args[0])
    if kind:
        scope.forward.tag(out, kind)
    return out


def _attention(scope: Scope, original: Op, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    if scope.parts:  # called by a layer's attention, which has rounded already or does so at the products
        return original(query, key, value, *args, **kwargs)
    query, key, value = (tf.convert_to_tensor(x) for x in (query, key, value))
    if not _known(query, key, value):
        return original(query, key, value, *args, **kwargs)
    return attention(scope, original, query, key, value, args, kwargs)


def _layer_attention(
    scope: Scope, original: Op, layer: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> Any:
    bound = functools.partial(original, layer)
    if not _known(query, key, value):
        return bound(query, key, value, *args, **kwargs)
    return attention(scope, bound, query, key, value, args, kwargs)
