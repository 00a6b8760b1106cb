"""Scaled dot-product attention with its operands rounded as the table says.

emulated    query, key and value are rounded, Keras' own attention runs between them in float32, its result is rounded
explicit    where a rule speaks of fprop.probs: the two products with rounded operands, Keras' softmax between them

Heads that several queries share: Keras repeats the key and value heads. In the emulated algorithm their gradients are
summed before they are rounded, where Keras repeats inside (`dot_product_attention`). `GroupQueryAttention` repeats them
itself: there, and in the explicit algorithm, each head's is rounded before the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mezzo.formats import FLOAT32, FLOAT64
from mezzo.keras.products import enter, leave
from mezzo.keras.scope import Scope, entered, suspended
from mezzo.keras.table import SiteSpec, Tensor
from mezzo.policy import Spec
from mezzo.policy.roles import SHOWN_RESULT, SHOWN_SCORES, check_no_blocks, explicit_attention
from mezzo.policy.site import ATTENTION_ROLES

HEADS_FIRST = (0, 2, 1, 3)  # Keras has (B, T, heads, E), torch (B, heads, T, E)


def attention(
    scope: Scope,
    original: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Keras' attention `original(query, key, value, *rest, **kwargs)` under the table.

    query     (B, T, heads, E);  key, value (B, S, heads, E). Over several axes there are more in T's place
    returns   what `original` does: the result, or it and the probabilities
    """
    forward = scope.forward
    spec = forward.layers.table.attention(scope.path, forward.call_index(scope.path, "attention"))
    if spec.plain(query, key, value):
        with suspended():
            out = original(query, key, value, *rest, **kwargs)
        _note(scope, query, key, value, out)
        return out
    if query.shape.rank != 4:
        check_no_blocks(scope.path, spec.specs, "attention over several axes", ATTENTION_ROLES)
    if "fprop.probs" in spec.specs:
        forward.tag(key, "key")
        with entered(Scope(forward, scope.path, explicit_specs(spec))):
            out = original(query, key, value, *rest, **kwargs)
        _note(scope, query, key, value, out)
        return out
    order = HEADS_FIRST if query.shape.rank == 4 else None
    q = enter(spec, query, "fprop.query", "dgrad.query", -1, order)
    k = enter(spec, key, "fprop.key", "dgrad.key", -1, order)
    v = enter(spec, value, "fprop.value", "dgrad.value", 1, order)
    with suspended():
        out = original(q, k, v, *rest, **kwargs)
    _note(scope, query, key, value, out)
    if isinstance(out, tuple):
        return (leave(spec, out[0], "dgrad.dout", order), *out[1:])
    return leave(spec, out, "dgrad.dout", order)


def _note(scope: Scope, query: Tensor, key: Tensor, value: Tensor, out: Any) -> None:
    result = out[0] if isinstance(out, tuple) else out
    scope.forward.layers.note(scope.path, "attention", _heads_first(query, key, value, result))


def _heads_first(*tensors: Tensor) -> list[Sequence[int]]:
    """Shapes as sites are shown in every framework."""
    return [[x.shape[i] for i in HEADS_FIRST] if x.shape.rank == 4 else list(x.shape) for x in tensors]


def explicit_specs(spec: SiteSpec) -> list[SiteSpec]:
    """The two products of explicit attention, their operands' formats taken from attention's own roles."""
    inner = Spec(FLOAT64 if spec.acc.name == "float64" else FLOAT32)
    scores, out = explicit_attention(spec.specs, inner)
    return [
        SiteSpec(spec.path, spec.call, scores, spec.rounder, spec.hooks, SHOWN_SCORES, "scores"),
        SiteSpec(spec.path, spec.call, out, spec.rounder, spec.hooks, SHOWN_RESULT, "result"),
    ]
