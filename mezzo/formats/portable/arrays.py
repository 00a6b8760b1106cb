"""What the algorithms of this package need of a framework's arrays.

Beside these functions they use the operators + - * / // & | ^ ~ and comparisons between arrays of one dtype, or an
array and a Python number, which takes the array's dtype; and slices such as x[:, :n]. Integers wrap around.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any
Size = Any  # an int, or a scalar of the framework where a size is known only when the program runs


class Arrays(Protocol):
    """One framework's arrays. Dtypes go by their NumPy names, such as "int32" and "bfloat16"."""

    @property
    def fuses(self) -> bool:
        """Whether operations on elements are mostly joined into one pass over them."""
        ...

    def dtype(self, x: Array) -> str: ...

    def shape(self, x: Array) -> tuple[Size, ...]:
        """Sizes: ints where they are known."""
        ...

    def array(self, value: Any, dtype: str) -> Array:
        """An array of a number, a NumPy array or an array of the framework."""
        ...

    def cast(self, x: Array, dtype: str) -> Array:
        """The same numbers in another dtype; integers modulo its size. Floats are never narrowed by more than they
        hold here, but for integers made float32, which round to nearest even."""
        ...

    def bitcast(self, x: Array, dtype: str) -> Array:
        """The same bits in a dtype of the same size."""
        ...

    def where(self, condition: Array, x: Array, y: Array) -> Array:
        """Elements of x where the condition holds, else of y; one of the two may be a Python number."""
        ...

    def minimum(self, x: Array, y: Array) -> Array: ...

    def maximum(self, x: Array, y: Array) -> Array: ...

    def shift_left(self, x: Array, by: Array) -> Array:
        """x << by for an array x, or a Python number and an array `by`; 0 <= by < bits."""
        ...

    def shift_right(self, x: Array, by: Array) -> Array:
        """x >> by of an array; the sign comes in from the left where the dtype has one; 0 <= by < bits."""
        ...

    def rint(self, x: Array) -> Array:
        """Floats to whole numbers, ties to even."""
        ...

    def amax(self, x: Array, axes: tuple[int, ...]) -> Array:
        """The largest along axes, which stay with size 1; 0 at least."""
        ...

    def reshape(self, x: Array, shape: Sequence[Size]) -> Array:
        """As in NumPy; one size may be -1."""
        ...

    def moveaxis(self, x: Array, source: int, destination: int) -> Array: ...

    def pad(self, x: Array, after: Sequence[Size]) -> Array:
        """Zeros after each axis's end."""
        ...

    def stack(self, arrays: Sequence[Array], axis: int) -> Array: ...

    def arange(self, count: Size) -> Array:
        """0 … count - 1 in uint32."""
        ...

    def is_known(self, x: Array) -> bool:
        """Whether NumPy can look at x's values now: not while a program is traced."""
        ...
