"""Element formats as frozen data; everything else is derived from the fields.

    value = (-1)^sign · 1.fraction · 2^(field - bias)        field > 0
          = (-1)^sign · 0.fraction · 2^(1 - bias)            field = 0: subnormal

Sources are named beside each format; `ml_dtypes` and `gfloat` are the oracles in the tests. Formats that share a scale
among many elements are in `scaled.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Specials = Literal["ieee", "fn", "none"]


@dataclass(frozen=True)
class Format:
    """One number format of single elements.

    name           as NumPy, ml_dtypes and torch spell it
    bits           bits of a code (tf32's are those of a float32)
    exponent_bits  width of the exponent field; 0 for integers, whose values all lie on the subnormal grid
    mantissa_bits  width of the stored fraction, without the hidden bit
    bias           what the exponent field is counted from
    specials       "ieee": the top exponent field holds infinities and NaN; "fn": only the code of all ones is NaN, no
                   infinity; "none": every code is a number
    source         where this is defined
    signed         whether there are negative values
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    source: str
    signed: bool = True

    @property
    def is_integer(self) -> bool:
        """Two's complement: no negative zero, and one value more below zero than above."""
        return self.exponent_bits == 0

    @property
    def is_scale(self) -> bool:
        """Only powers of two, no zero and no sign: float8_e8m0fnu."""
        return self.mantissa_bits == 0

    @property
    def infinity(self) -> bool:
        return self.specials == "ieee"

    @property
    def nan(self) -> bool:
        return self.specials != "none"

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal; below it the grid does not get finer."""
        return -self.bias if self.is_scale else 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value: 2**max_exponent <= max < 2**(max_exponent + 1)."""
        if self.is_integer:
            return self.mantissa_bits - 1
        top = (1 << self.exponent_bits) - 1 - self.bias
        # Without fraction bits the code of all ones is a whole exponent, as in IEEE formats.
        return top - 1 if self.infinity or (self.is_scale and self.nan) else top

    @property
    def max(self) -> float:
        """Largest finite value."""
        if self.is_integer:
            return float((1 << self.mantissa_bits) - 1)
        lost = 2 if self.specials == "fn" and not self.is_scale else 1  # e4m3fn: the last fraction of the top is NaN
        return float((2 - lost * 2.0**-self.mantissa_bits) * 2.0**self.max_exponent)

    @property
    def min(self) -> float:
        """Lowest finite value."""
        if not self.signed:
            return self.min_normal
        return -self.max - 1 if self.is_integer else -self.max

    @property
    def min_normal(self) -> float:
        return 1.0 if self.is_integer else 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        """Smallest value above zero."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Gap between 1 and the next value; rounding to nearest errs by at most half of it, relatively."""
        return 1.0 if self.is_integer else 2.0**-self.mantissa_bits

    @property
    def item_bytes(self) -> int:
        """Bytes of an element in memory as frameworks keep it, one code in at least one byte."""
        return max(1, self.bits // 8)

    def holds(self, other: Format) -> bool:
        """Whether every number of `other` is one of this format."""
        if self.is_integer or other.is_scale:
            return self == other or (other.is_scale and self.min_subnormal <= other.min and self.max >= other.max)
        digits = other.mantissa_bits if other.is_integer else other.mantissa_bits + 1
        return (
            self.signed
            and self.mantissa_bits + 1 >= digits
            and self.max >= -other.min
            and self.min_subnormal <= other.min_subnormal
        )

    def __str__(self) -> str:
        return self.name


_IEEE = "IEEE 754-2019, table 3.5"
_OFP8 = "OCP 8-bit Floating Point Specification v1.0, table 1"
_MX = "OCP Microscaling Formats v1.0, section 5.3"

FLOAT64 = Format("float64", 64, 11, 52, 1023, "ieee", _IEEE)
FLOAT32 = Format("float32", 32, 8, 23, 127, "ieee", _IEEE)
TF32 = Format("tf32", 32, 8, 10, 127, "ieee", "NVIDIA A100 Tensor Core GPU Architecture, 2020")
BFLOAT16 = Format("bfloat16", 16, 8, 7, 127, "ieee", "Kalamkar et al. 2019, arXiv 1905.12322")
FLOAT16 = Format("float16", 16, 5, 10, 15, "ieee", _IEEE)
E4M3 = Format("float8_e4m3fn", 8, 4, 3, 7, "fn", _OFP8)
E5M2 = Format("float8_e5m2", 8, 5, 2, 15, "ieee", _OFP8)
E2M3 = Format("float6_e2m3fn", 6, 2, 3, 1, "none", _MX)
E3M2 = Format("float6_e3m2fn", 6, 3, 2, 3, "none", _MX)
E2M1 = Format("float4_e2m1fn", 4, 2, 1, 1, "none", _MX)
E8M0 = Format("float8_e8m0fnu", 8, 8, 0, 127, "fn", "OCP Microscaling Formats v1.0, section 5.4.1", signed=False)
# The bias puts the whole numbers on the grid of the subnormals: 2**(1 - bias - mantissa_bits) = 1.
INT8 = Format("int8", 8, 0, 7, -6, "none", "two's complement")

FORMATS: dict[str, Format] = {
    f.name: f for f in (FLOAT64, FLOAT32, TF32, BFLOAT16, FLOAT16, E4M3, E5M2, E2M3, E3M2, E2M1, E8M0, INT8)
}

ALIASES = {
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
    "fp32": "float32",
    "f32": "float32",
    "single": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
    "fp4": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
    "i8": "int8",
}
