"""Scaled formats: elements of a low format that share one scale among a block, a row or a tensor.

Written ELEMENT@GROUP or ELEMENT@GROUP+SCALING, or by a name of the field:

    float8_e4m3fn@tensor      one float32 scale: amax / 448
    float8_e4m3fn@1x128+pow2  128 elements along the axis share a power of two, rounded up
    mxfp8_e4m3                the same with 32: OCP Microscaling; mxfp8_e4m3+floor has the scale rule of its appendix
    nvfp4, nvfp4_16x16        float4_e2m1fn, one float8_e4m3fn scale for 16 (or 16 x 16) and one float32 for the tensor

value = element · scale (· tensor scale). `mezzo/formats/blocks.py` says how the scales come about.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from mezzo.errors import ConfigError
from mezzo.formats.spec import ALIASES, E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, FLOAT32, FORMATS, INT8, Format

Group = tuple[int, int] | Literal["row", "tensor"]
Scaling = Literal["free", "pow2", "floor", "nvfp4"]
ELEMENTS = (E4M3, E5M2, E2M3, E3M2, E2M1, INT8)

_OCP = "OCP Microscaling Formats v1.0, sections 5.2 and 6.3; scale rounded up: arXiv 2506.08027"


@dataclass(frozen=True)
class ScaledFormat:
    """Elements of one format, a scale for each group of them.

    element   format of the elements
    group     (rows, columns): columns along the axis that a product sums over, rows along the last of the others;
              "row": all along the axis; "tensor": everything
    scaling   "free": scale = amax / element.max, a float32
              "pow2": the smallest power of two that leaves nothing above element.max, as e8m0
              "floor": 2**(floor(log2 amax) - element.max_exponent), as e8m0; up to half of the top binade saturates
              "nvfp4": e4m3 scales relative to a float32 scale of the whole tensor
    """

    element: Format
    group: Group
    scaling: Scaling = "free"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            names = ", ".join(f.name for f in ELEMENTS)
            raise ConfigError(f"{self.element} needs no scale; formats that are scaled: {names}")
        if self.scaling not in ("free", "pow2", "floor", "nvfp4"):
            raise ConfigError(f"unknown scaling {self.scaling!r}; known: free, pow2, floor, nvfp4")
        if isinstance(self.group, tuple):
            if len(self.group) != 2 or any(size < 1 for size in self.group) or self.group == (1, 1):
                raise ConfigError(f"a block is ROWSxCOLUMNS with at least two elements, got {self.group}")
        elif self.group not in ("row", "tensor"):
            raise ConfigError(f"unknown group {self.group!r}; known: (rows, columns), row, tensor")
        if self.scaling == "nvfp4" and (self.element is not E2M1 or not isinstance(self.group, tuple)):
            raise ConfigError("nvfp4 scaling is for blocks of float4_e2m1fn")

    @property
    def name(self) -> str:
        return str(self)

    @property
    def scale(self) -> Format:
        """The format of a group's scale."""
        return {"free": FLOAT32, "pow2": E8M0, "floor": E8M0, "nvfp4": E4M3}[self.scaling]

    @property
    def group_size(self) -> int | None:
        """Elements that share a scale; None where that is up to the tensor's shape."""
        return self.group[0] * self.group[1] if isinstance(self.group, tuple) else None

    @property
    def bits(self) -> float:
        """Bits of an element with its share of the block's scale."""
        return self.element.bits + (self.scale.bits / self.group_size if self.group_size else 0.0)

    @property
    def source(self) -> str:
        if self.scaling == "nvfp4":
            return "NVIDIA 2025, arXiv 2509.25149, appendix C"
        if self.scaling == "free":
            return "DeepSeek-V3, arXiv 2412.19437, section 3.3" if isinstance(self.group, tuple) else "arXiv 2209.05433"
        return _OCP

    def __str__(self) -> str:
        for name, fmt in SCALED.items():
            if (fmt.element, fmt.group) == (self.element, self.group) and "nvfp4" not in (fmt.scaling, self.scaling):
                if self.scaling == "pow2":
                    return name
                if self.scaling == "floor":
                    return f"{name}+floor"
            elif fmt == self:
                return name
        group = f"{self.group[0]}x{self.group[1]}" if isinstance(self.group, tuple) else self.group
        return f"{self.element.name}@{group}" + ("" if self.scaling == "free" else f"+{self.scaling}")


AnyFormat = Format | ScaledFormat

SCALED: dict[str, ScaledFormat] = {
    "mxfp8_e4m3": ScaledFormat(E4M3, (1, 32), "pow2"),
    "mxfp8_e5m2": ScaledFormat(E5M2, (1, 32), "pow2"),
    "mxfp6_e2m3": ScaledFormat(E2M3, (1, 32), "pow2"),
    "mxfp6_e3m2": ScaledFormat(E3M2, (1, 32), "pow2"),
    "mxfp4": ScaledFormat(E2M1, (1, 32), "pow2"),
    "nvfp4": ScaledFormat(E2M1, (1, 16), "nvfp4"),
    "nvfp4_16x16": ScaledFormat(E2M1, (16, 16), "nvfp4"),
}

SCALED_ALIASES = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3", "mxfp4_e2m1": "mxfp4"}


def get_format(name: str | AnyFormat) -> AnyFormat:
    """The format of that name: an element format, an alias such as bf16 or e4m3, or a scaled one.

    raises    ConfigError naming the known formats and the way scaled ones are written
    """
    if isinstance(name, (Format, ScaledFormat)):
        return name
    found = FORMATS.get(ALIASES.get(name, name)) or SCALED.get(SCALED_ALIASES.get(name, name))
    return found if found is not None else _parse(name)


def get_element(name: str | AnyFormat) -> Format:
    """As `get_format`, for places that take no scaled format.

    raises    ConfigError if the format is unknown or scaled
    """
    fmt = get_format(name)
    if isinstance(fmt, ScaledFormat):
        raise ConfigError(f"{fmt} is a scaled format; a format of single elements is needed here: {', '.join(FORMATS)}")
    return fmt


def _parse(name: str) -> ScaledFormat:
    base, plus, scaling = name.partition("+")
    known = SCALED.get(SCALED_ALIASES.get(base, base))
    if plus and known is not None and known.scaling == "pow2" and scaling in ("pow2", "floor"):
        return ScaledFormat(known.element, known.group, scaling)  # type: ignore[arg-type]
    element_name, at, group_name = base.partition("@")
    element = FORMATS.get(ALIASES.get(element_name, element_name))
    if at and element is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", group_name)
        group: Group = (int(match[1]), int(match[2])) if match else group_name  # type: ignore[assignment]
        return ScaledFormat(element, group, scaling if plus else "free")  # type: ignore[arg-type]
    close = difflib.get_close_matches(name, [*FORMATS, *ALIASES, *SCALED], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"unknown number format {name!r}; known: {', '.join([*FORMATS, *SCALED])}; scaled ones are written "
        f"ELEMENT@ROWSxCOLUMNS, ELEMENT@row or ELEMENT@tensor, with +pow2 or +floor for powers of two{hint}"
    )
