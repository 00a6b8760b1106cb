"""L0: number formats as frozen data, rounding, counter-based random bits. NumPy and ml_dtypes only."""

from mezzo.formats.blocks import Encoded, decode_scaled, encode_scaled
from mezzo.formats.codes import decode, encode
from mezzo.formats.hadamard import hadamard
from mezzo.formats.rounding import quantize
from mezzo.formats.scaled import SCALED, AnyFormat, ScaledFormat, get_element, get_format
from mezzo.formats.spec import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FORMATS, TF32, Format

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "FLOAT64",
    "FORMATS",
    "SCALED",
    "TF32",
    "AnyFormat",
    "Encoded",
    "Format",
    "ScaledFormat",
    "decode",
    "decode_scaled",
    "encode",
    "encode_scaled",
    "get_element",
    "get_format",
    "hadamard",
    "quantize",
]
