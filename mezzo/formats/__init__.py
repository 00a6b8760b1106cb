"""L0: number formats as frozen data, rounding, counter-based random bits. NumPy and ml_dtypes only."""

from mezzo.formats.rounding import quantize
from mezzo.formats.spec import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, FORMATS, TF32, Format, get_format

__all__ = ["BFLOAT16", "FLOAT16", "FLOAT32", "FLOAT64", "FORMATS", "Format", "TF32", "get_format", "quantize"]
