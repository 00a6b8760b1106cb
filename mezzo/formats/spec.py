"""Number formats as frozen data; everything else is derived from the fields.

Sources: IEEE 754-2019 (float64, float32, float16); NVIDIA A100 whitepaper, 2020 (tf32); the bfloat16 definition of
Google Brain as adopted by LLVM. `ml_dtypes` is the oracle in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from mezzo.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, signed zero, infinities and NaN (IEEE layout).

    name           as NumPy, ml_dtypes and torch spell it
    bits           bits an element occupies in memory (tf32 lives in 32)
    exponent_bits  width of the exponent field
    mantissa_bits  width of the stored fraction, without the hidden bit
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max(self) -> float:
        """Largest finite value."""
        return float((2 - 2.0**-self.mantissa_bits) * 2.0**self.bias)

    @property
    def min_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Gap between 1 and the next value; rounding to nearest errs by at most half of it, relatively."""
        return 2.0**-self.mantissa_bits

    @property
    def item_bytes(self) -> int:
        return self.bits // 8

    def __str__(self) -> str:
        return self.name


FLOAT64 = Format("float64", 64, 11, 52)
FLOAT32 = Format("float32", 32, 8, 23)
TF32 = Format("tf32", 32, 8, 10)
BFLOAT16 = Format("bfloat16", 16, 8, 7)
FLOAT16 = Format("float16", 16, 5, 10)

FORMATS: dict[str, Format] = {f.name: f for f in (FLOAT64, FLOAT32, TF32, BFLOAT16, FLOAT16)}

_ALIASES = {
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
}


def get_format(name: str | Format) -> Format:
    """The format of that name (or alias such as bf16).

    raises    ConfigError naming the known formats
    """
    if isinstance(name, Format):
        return name
    found = FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise ConfigError(f"unknown number format {name!r}; known: {', '.join(FORMATS)}")
    return found
