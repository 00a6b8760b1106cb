"""What a product under a table must give, from NumPy's reference and float64; nothing here uses mezzo.keras.

u = 2^-24 is float32's unit roundoff. A sum of K products in float32, in any order, errs by at most gamma(K) * S,
gamma(K) = K u / (1 - K u), S the sum of |a||b| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
Below float32's smallest normal number each operation adds half of 2^-149. Rounding the result to a format with M bits
of fraction adds |y| 2^-(M+1), or half of its smallest subnormal number.
"""

import numpy as np

from mezzo.formats import get_format, hadamard, quantize
from mezzo.policy import Policy, Site, Spec

U = 2.0**-24
WIDE = ("float64", "float32", "tf32", "bfloat16", "float16")


def operand(spec, x, axis, site, seed=0, draws=0, order=None):
    """float64 array of `x` as a product sees it that sums over `axis`; elements are numbered in `order`."""
    if order is not None:
        x, axis = np.transpose(x, order), list(order).index(axis % x.ndim)
    if spec.hadamard:
        missing = -x.shape[axis] % spec.hadamard
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, missing)
        x = hadamard(np.pad(x, pad), axis=axis, block=spec.hadamard)
    key = (seed, draws, str(site)) if spec.rounding == "stochastic" else None
    overflow = "cast" if spec.fmt.name in WIDE else "saturate"
    y = quantize(x, spec.fmt, axis=axis, rounding=spec.rounding, overflow=overflow, key=key).astype(np.float64)
    return y if order is None else np.transpose(y, np.argsort(order))


def specs(policy, path):
    policy = Policy.of(policy)
    roles = [f"{p}.{r}" for p in ("fprop", "dgrad", "wgrad") for r in ("a", "b", "out")]
    return {role: policy.spec(Site(path, role)) or Spec(get_format("float32")) for role in roles}


def three(policy, path, a, b, g, weight=False, **key):
    """Product → (exact, sum of magnitudes, terms) of a (…, M, K) · b (…, K, N) and of its gradients."""
    s = specs(policy, path)
    order = (1, 0) if weight and b.ndim == 2 else None
    if s["fprop.out"].fmt.name in ("bfloat16", "float16"):
        g = quantize(g, s["fprop.out"].fmt, overflow="cast").astype(np.float32)

    def rounded(role, x, axis, order=None):
        return operand(s[role], x, axis, Site(path, role), order=order, **key)

    def multiplied(x, y):
        return x @ y, np.abs(x) @ np.abs(y), x.shape[-1]

    return {
        "fprop": multiplied(rounded("fprop.a", a, -1), rounded("fprop.b", b, -2, order)),
        "dgrad": multiplied(rounded("dgrad.a", g, -1), rounded("dgrad.b", b, -1, order).swapaxes(-1, -2)),
        "wgrad": multiplied(rounded("wgrad.b", a, -2).swapaxes(-1, -2), rounded("wgrad.a", g, -2)),
    }


def summed(found, shape):
    """A gradient summed over batches that were broadcast."""
    exact, absolute, terms = found
    lead = exact.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, n in enumerate(shape[:-2]) if n == 1 and exact.shape[lead + i] != 1
    )
    count = int(np.prod([exact.shape[axis] for axis in axes]))
    return exact.sum(axes).reshape(shape), absolute.sum(axes).reshape(shape), terms * count


def worst(got, found, out):
    """The largest error of `got` as a multiple of its bound: at most 1."""
    exact, absolute, terms = found
    got = np.asarray(got, np.float64)
    assert got.shape == exact.shape
    fmt = get_format(out)
    err = terms * U / (1 - terms * U) * absolute + terms * 2.0**-149
    last = 0.0 if fmt.mantissa_bits >= 23 else fmt.epsilon / 2
    limit = err + last * (np.abs(exact) + err) + (fmt.min_subnormal / 2 if last else 0.0)
    error = np.abs(got - exact)
    return float(np.where(error == 0, 0.0, error / limit).max())


def holds(x, fmt):
    """Whether every element of `x` is a value of the format."""
    return np.array_equal(x, quantize(np.asarray(x), fmt, overflow="cast").astype(np.asarray(x).dtype))
