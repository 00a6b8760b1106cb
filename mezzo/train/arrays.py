"""Safetensors files of NumPy arrays, 16- and 8-bit floats included, so that no framework is needed for a checkpoint.

The library's own NumPy side knows neither bfloat16 nor float8; the format itself is a header of JSON and the bytes
behind it. source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Named = dict[str, NDArray[Any]]


class Array(Protocol):
    """What can be written: a NumPy array, a JAX array, or anything that becomes an array when somebody asks for it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __array__(self, dtype: None = None, /, *, copy: bool | None = None) -> NDArray[Any]: ...


Groups = Mapping[str, Mapping[str, Array]]

CHUNK = 1 << 24  # bytes hashed and written at once
# NumPy's dtypes and the names that the format has for them.
DTYPES: dict[np.dtype[Any], str] = {
    np.dtype(kind): name
    for kind, name in (
        (np.float64, "F64"),
        (np.float32, "F32"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int16, "I16"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.uint16, "U16"),
        (np.uint32, "U32"),
        (np.uint64, "U64"),
        (np.bool_, "BOOL"),
    )
}
_NAMES = {name: dtype for dtype, name in DTYPES.items()}


def describe(array: Array) -> str:
    """As in "float32[4, 3]"."""
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


def bytes_of(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array in order, of any dtype and strides; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_file(path: Path, arrays: Mapping[str, Array]) -> tuple[int, str]:
    """Write one safetensors file, hashing what goes out; returns its size and SHA-256.

    Written here rather than by the library because the hash must be of what was meant, not of what is read back, and
    because an error must keep its errno. Without a copy of the state: at most one array is copied at a time.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))  # keeps every array aligned
    header, end = {}, 0
    for name in order:
        array = arrays[name]
        start, end = end, end + int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        header[name] = {"dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in _chunks(len(head).to_bytes(8, "little") + head, order, arrays):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + 8 + end, digest.hexdigest()


def _chunks(head: bytes, order: list[str], arrays: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    yield head
    for name in order:
        data = bytes_of(np.asarray(arrays[name])).data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def read_file(path: Path) -> Named:
    """Read one safetensors file into memory.

    returns   name → array, each with memory of its own, none a view of a mapped file
    raises    OSError; ValueError if the file is not of the format, or holds a dtype that NumPy has not
    """
    with open(path, "rb") as file:
        header, begin = _header(file)
        return {name: _read(file, begin, name, entry) for name, entry in header.items() if name != "__metadata__"}


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(file.read(8), "little")
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is longer than the file")
    header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    return header, 8 + size


def _read(file: BinaryIO, begin: int, name: str, entry: Any) -> NDArray[Any]:
    try:
        dtype, shape, (start, end) = _NAMES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header says of {name}: {entry!r}") from error
    array = np.empty(shape, dtype)
    if end - start != array.nbytes:
        raise ValueError(f"{name} is {describe(array)} of {array.nbytes} bytes, and has {end - start}")
    file.seek(begin + start)
    if array.nbytes and file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError(f"it ends before {name} does")
    return array
