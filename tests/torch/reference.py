"""What an emulated product must give, from float64 and first principles; nothing here uses mezzo.torch.

u = 2^-24 is float32's unit roundoff. A sum of K products in float32, in any order, errs by at most
    gamma(K) * S,   gamma(K) = K u / (1 - K u),   S = the sum of |a||b|
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1): one u for each product (none for 16-bit
operands, whose products are exact in float32, but tf32 and float32 operands share the bound) and K - 1 for the sums. A
bias is one more term. Below float32's smallest normal number each operation adds up to half of 2^-149. Rounding the
result to a format with M bits of fraction adds |y| 2^-(M+1), or half of its smallest subnormal number.
"""

import torch

from mezzo.formats import get_format, quantize

U = 2.0**-24


def rounded(x, fmt):
    """float64 tensor of `x` rounded once to `fmt`, by the NumPy reference; overflow is infinite, as at the sites."""
    return torch.from_numpy(quantize(x.detach().double().numpy(), fmt, overflow="cast"))


def bound(exact, absolute, terms, out, unit=U):
    """Largest error of a sum of `terms` products with unit roundoff `unit`, then rounded to `out`; float64 tensors."""
    fmt = get_format(out)
    gamma = terms * unit / (1 - terms * unit)
    err = gamma * absolute + terms * 2.0**-149
    # The result is rounded from float32, whatever its own format: 23 bits count nothing extra.
    last = 0.0 if fmt.mantissa_bits >= 23 else fmt.epsilon / 2
    return err + last * (exact.abs() + err) + (fmt.min_subnormal / 2 if last else 0.0)


def worst(got, exact, absolute, terms, out, unit=U):
    """The largest error of `got` as a multiple of its bound: at most 1."""
    assert got.shape == exact.shape
    err = (got.detach().double() - exact).abs()
    limit = bound(exact, absolute, terms, out, unit)
    return float(torch.where(err == 0, 0.0, err / limit).max()) if err.numel() else 0.0


def gradient(op, a, b, g, which):
    """Of op(a, b) with respect to its operand `which`, the incoming gradient being g."""
    operands = [a.clone(), b.clone()]
    operands[which].requires_grad_()
    return torch.autograd.grad(op(*operands), operands[which], g)[0]


def three(op, a, b, g):
    """(exact, sum of absolute values, number of terms) of a bilinear op's result and of its two gradients.

    a, b, g   dicts: product → operand as rounded for it, float64
    """
    ones_a, ones_b, ones_g = (torch.ones_like(x["fprop" if x is not g else "dgrad"]) for x in (a, b, g))
    result = op(a["fprop"], b["fprop"]), op(a["fprop"].abs(), b["fprop"].abs()), op(ones_a, ones_b)
    da, db = (
        tuple(
            gradient(op, *triple, which)
            for triple in (
                (a[product], b[product], g[product]),
                (a[product].abs(), b[product].abs(), g[product].abs()),
                (ones_a, ones_b, ones_g),
            )
        )
        for which, product in enumerate(("dgrad", "wgrad"))
    )
    return {"fprop": result, "dgrad": da, "wgrad": db}
