"""The same roundings once more, one number at a time in exact arithmetic: slow, and plain to read beside the standards.

round_scalar        one number to an element format
round_group_scalar  the numbers that share a scale to a scaled format
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from mezzo.formats.blocks import MIN_SCALE, max_scale
from mezzo.formats.rounding import Overflow, Rounding
from mezzo.formats.scaled import ScaledFormat
from mezzo.formats.spec import E8M0, FLOAT32, Format

FLOAT32_MAX = FLOAT32.max


def round_scalar(
    x: float | Fraction,
    fmt: Format,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    word: int = 0,
    negative: bool | None = None,
) -> float:
    """One number rounded to an element format.

    x         a float, or an exact fraction
    word      random word in 0 … 2**32 - 1, for stochastic rounding
    negative  the sign of x where x itself cannot say it: a fraction of zero
    returns   float, a value of the format, or infinity or NaN where the format has them; NaN stays NaN
    """
    if isinstance(x, float) and math.isnan(x):
        return math.nan
    sign = (math.copysign(1.0, x) < 0 if isinstance(x, float) else x < 0) if negative is None else negative
    limit = -fmt.min if sign else fmt.max
    if not fmt.signed and sign and x != 0:
        return math.nan
    beyond = limit if overflow == "saturate" or not fmt.nan else math.inf if fmt.infinity else math.nan
    if isinstance(x, float) and math.isinf(x):
        magnitude = beyond
    elif fmt.is_scale and x == 0:
        magnitude = fmt.min if overflow == "saturate" else math.nan
    else:
        exact = _to_grid(abs(Fraction(x)), fmt, rounding, word)
        magnitude = float(exact) if exact <= Fraction(limit) else limit if rounding == "toward_zero" else beyond
    if fmt.is_scale:
        return magnitude
    return magnitude + 0.0 if fmt.is_integer and magnitude == 0 else math.copysign(magnitude, -1 if sign else 1)


def _to_grid(x: Fraction, fmt: Format, rounding: Rounding, word: int) -> Fraction:
    """x >= 0 to the format's grid, as if there were no largest value."""
    exponent = max(fmt.min_exponent, _floor_log2(x)) if x else fmt.min_exponent
    gap = Fraction(2) ** (exponent - fmt.mantissa_bits)
    down, rest = divmod(x / gap, 1)
    if rounding == "stochastic":
        up = word < math.floor(rest * 2**32)
    elif rounding == "toward_zero":
        up = False
    else:
        odd = True if fmt.is_scale else down % 2 == 1  # one digit is always odd: IEEE takes the larger
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and odd)
    rounded = (down + up) * gap
    return max(rounded, Fraction(fmt.min)) if fmt.is_scale else rounded


def _floor_log2(x: Fraction) -> int:
    """The e with 2**e <= x < 2**(e + 1), x > 0."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()  # 2**(exponent - 1) < x < 2**(exponent + 1)
    return exponent if x >= Fraction(2) ** exponent else exponent - 1


def round_group_scalar(
    values: Sequence[float],
    fmt: ScaledFormat,
    tensor_amax: float | None = None,
    rounding: Rounding = "nearest",
    overflow: Overflow = "saturate",
    words: Sequence[int] | None = None,
    work: Format = FLOAT32,
) -> tuple[list[float], float]:
    """The numbers that share one scale, rounded; and that scale. Each step is one rounding in `work` (see blocks.py).

    values       numbers of `work`
    tensor_amax  for nvfp4: the largest magnitude of the whole tensor
    """

    def step(x: Fraction, to: Format = work) -> Fraction:
        rounded = round_scalar(x, to, overflow="saturate")
        return Fraction(rounded)

    drawn = words or [0] * len(values)
    # nvfp4 counts in float32 from the amax on, in which what a float64 holds beyond it is infinite.
    if tensor_amax is not None:
        tensor_amax = round_scalar(tensor_amax, FLOAT32, overflow="cast")
    finite = all(map(math.isfinite, values)) and (tensor_amax is None or math.isfinite(tensor_amax))
    if not finite:
        return [math.nan] * len(values), math.nan
    amax = Fraction(max(map(abs, values), default=0.0))
    top = Fraction(fmt.element.max)
    if fmt.scaling == "nvfp4":
        assert tensor_amax is not None
        encode = step(2688 / Fraction(tensor_amax), FLOAT32) if tensor_amax else Fraction(1)
        tensor_scale = step(1 / encode, FLOAT32)
        scale = step(step(step(step(amax, FLOAT32) / 6, FLOAT32) * encode, FLOAT32), fmt.scale)
        product = step(scale * tensor_scale, FLOAT32)
        back = step(1 / product, FLOAT32) if product else Fraction(FLOAT32_MAX)
        scaled = [step(Fraction(x) * back) for x in values]
    else:
        tensor_scale = Fraction(1)
        if fmt.scaling == "free":
            bounded = min(step(step(amax / top), FLOAT32), Fraction(max_scale(fmt.element.max)))
            scale = max(bounded, Fraction(MIN_SCALE))
        else:
            scale = Fraction(2) ** _power(amax, fmt)
        scaled = [step(Fraction(x) / scale) for x in values]
    rounded = [
        round_scalar(y, fmt.element, rounding, overflow, word, math.copysign(1, x) < 0)
        for x, y, word in zip(values, scaled, drawn, strict=True)
    ]
    whole = []
    for q in rounded:
        if math.isfinite(q):
            # Only here may a number leave the range of `work`: a power-of-two scale rounds 3.4e38 up to 2**128.
            product = Fraction(abs(q)) * scale  # exact in nvfp4: 2 bits by 4
            q = math.copysign(round_scalar(product * tensor_scale, work, overflow="cast"), q)
        whole.append(q)
    return whole, float(scale)


def _power(amax: Fraction, fmt: ScaledFormat) -> int:
    """The exponent of a power-of-two scale."""
    exponent = E8M0.min_exponent
    if fmt.scaling == "pow2":
        while amax > Fraction(fmt.element.max) * Fraction(2) ** exponent and exponent < E8M0.max_exponent:
            exponent += 1
    elif amax:
        exponent = min(max(_floor_log2(amax) - fmt.element.max_exponent, exponent), E8M0.max_exponent)
    return exponent
