"""What a rule gives a site: a number format, and how tensors get into it.

bfloat16                     rounded to nearest
nvfp4 stochastic hadamard    random Hadamard transform in blocks of 16, then stochastic rounding
e4m3@tensor delayed          the scale follows the amax of the last 16 steps
bfloat16 kahan               a stored weight whose updates keep what rounding takes from them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mezzo.errors import ConfigError
from mezzo.formats import AnyFormat, ScaledFormat, get_format
from mezzo.formats.rounding import ROUNDINGS, Rounding

Keep = Literal["", "kahan", "split"]
HADAMARD, HISTORY = 16, 16  # what the bare words hadamard and delayed stand for
_WORDS = "stochastic, toward_zero, hadamard, hadamard=BLOCK, delayed, delayed=STEPS, kahan, split"


@dataclass(frozen=True)
class Spec:
    """The format of a site and the way into it; `str(Spec.parse(s)) == s` for the canonical spelling.

    fmt        the number format
    rounding   "nearest", "stochastic" or "toward_zero"
    hadamard   block of the random Hadamard transform before the rounding; 0: none. Both operands of a product have it
    delayed    steps whose amax decide the scale; 0: the tensor's own amax does
    keep       of stored weights: what becomes of the part of an update that the format cannot hold. "": lost;
               "kahan": carried over to the next update in a tensor of the same format; "split": kept beside the weight,
               16 bits, so that both together are the float32 weight
    """

    fmt: AnyFormat
    rounding: Rounding = "nearest"
    hadamard: int = 0
    delayed: int = 0
    keep: Keep = ""

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"unknown rounding {self.rounding!r}; known: {', '.join(ROUNDINGS)}")
        n = self.hadamard
        if n and (n < 4 or n & (n - 1) or n.bit_length() % 2 == 0):
            raise ConfigError(f"a Hadamard block is a power of four (4, 16, 64, …), not {n}")
        if self.delayed < 0 or self.hadamard < 0:
            raise ConfigError(f"delayed and hadamard are counts, got {self.delayed} and {self.hadamard}")
        if self.delayed and not (
            isinstance(self.fmt, ScaledFormat) and self.fmt.group == "tensor" and self.fmt.scaling == "free"
        ):
            raise ConfigError(f"delayed scaling is for formats with one float32 scale, e4m3@tensor; not for {self.fmt}")
        if self.keep and self.rounding != "nearest":
            raise ConfigError(f"{self.keep} keeps what rounding takes, so the rounding is to nearest, not stochastic")
        if self.keep and self.fmt.name != "bfloat16":
            raise ConfigError(f"{self.keep} is for weights in bfloat16, not in {self.fmt}")

    @classmethod
    def parse(cls, text: str) -> Spec:
        """From `FORMAT [WORD …]`.

        raises    ConfigError on an unknown format or word, on one given twice, and on words that do not go together
        """
        name, *words = text.split() or [""]
        found: dict[str, object] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key in ("stochastic", "toward_zero") and not equals:
                field, given = "rounding", key
            elif key in ("kahan", "split") and not equals:
                field, given = "keep", key
            elif key in ("hadamard", "delayed") and (not equals or (value.isdecimal() and int(value))):
                usual = HADAMARD if key == "hadamard" else HISTORY
                field, given = key, int(value) if equals else usual  # type: ignore[assignment]
            else:
                raise ConfigError(f"unknown word {word!r} after the format {name!r}; known: {_WORDS}")
            if field in found:
                raise ConfigError(f"{text!r} says its {field} twice")
            found[field] = given
        return cls(get_format(name), **found)  # type: ignore[arg-type]

    @property
    def plain(self) -> bool:
        """Whether this is the format alone, rounded to nearest."""
        return self == Spec(self.fmt)

    def __str__(self) -> str:
        words = [self.fmt.name]
        if self.rounding != "nearest":
            words.append(self.rounding)
        for name, value, usual in (("hadamard", self.hadamard, HADAMARD), ("delayed", self.delayed, HISTORY)):
            if value:
                words.append(name if value == usual else f"{name}={value}")
        return " ".join([*words, self.keep] if self.keep else words)
