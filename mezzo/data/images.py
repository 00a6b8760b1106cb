"""Pictures of digits, and what a small experiment on them begins with: splits, order, initial weights. No framework.

The same seed gives the same pictures in the same order and the same initial weights whatever framework trains on them,
so that a difference between two runs is a difference between the frameworks or the policies.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mezzo.errors import DataError, MissingExtraError
from mezzo.formats.philox import permute

IMAGES, LABELS = 0x00000803, 0x00000801  # magic numbers of IDX: 0x08 is "unsigned bytes", then the number of dimensions
_KINDS = {IMAGES: "images, unsigned bytes in 3 dimensions", LABELS: "labels, unsigned bytes in 1 dimension"}
_ZIP, _NPY = b"PK", b"\x93NUMPY"  # what .npz and .npy files begin with
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_NAMES = {"train": "train", "test": "t10k"}
_SPLIT = (0, 0)  # key of the shuffle that holds out a fifth: one split for every seed, so that runs can be compared
_WHERE = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"


@dataclass(frozen=True)
class Images:
    """Labelled pictures of ten classes, flattened.

    train_x   (n, pixels) float32 in 0 … 1
    train_y   (n,) int64 in 0 … 9
    test_x    (m, pixels) float32, never trained on
    test_y    (m,) int64
    source    what they are, where they came from and how they were split, for people
    """

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    source: str

    @property
    def pixels(self) -> int:
        return int(self.train_x.shape[1])


def load(path: str | Path | None = None) -> Images:
    """Read MNIST, or a data set laid out like it.

    path      a folder with the four IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…; gzipped or
              not), or with one pair of them, of which a fifth is then held out; a folder with mnist.npz; such a file.
              None: the 1,797 digits of 8 × 8 pixels that come with scikit-learn, a fifth held out
    raises    DataError saying what was expected and what was found; MissingExtraError without scikit-learn
    """
    if path is None:
        return _digits()
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; MNIST as one file: {_WHERE}")
    if path.is_file():
        return _npz(path)
    for folder in (path, path / "raw", path / "MNIST" / "raw"):  # the last two: as torchvision lays it out
        pairs = {name: pair for name, prefix in _NAMES.items() if (pair := _pair(folder, prefix)) is not None}
        if pairs:
            return _from_pairs(folder, pairs)
        if (folder / "mnist.npz").exists():
            return _npz(folder / "mnist.npz")
    raise DataError(
        f"{path} holds neither mnist.npz nor IDX files; expected train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with or without .gz"
    )


def order(n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch takes n examples: a pure function of seed and epoch.

    returns   (n,) each of 0 … n-1 once
    """
    return permute(np.arange(n), n, (seed, epoch + 1))


def initial_weights(sizes: tuple[int, ...], seed: int) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights and biases for a stack of dense layers.

    sizes     widths, from the input's to the output's: (784, 128, 10)
    returns   for each layer W (in, out) and b (out,), float32. W is uniform in ±sqrt(6 / (in + out)), b is zero
    source    Glorot and Bengio, Understanding the difficulty of training deep feedforward networks (AISTATS 2010)
    """
    generator = np.random.default_rng(seed)
    layers = []
    for width, following in itertools.pairwise(sizes):
        limit = math.sqrt(6 / (width + following))
        W = generator.uniform(-limit, limit, (width, following)).astype(np.float32)
        layers.append((W, np.zeros(following, np.float32)))
    return layers


def read_idx(path: str | Path, magic: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, gzipped or not.

    magic     IMAGES or LABELS: the magic number that the file must have
    returns   (n, rows, columns) or (n,) uint8
    raises    DataError if it is another kind of file, cut short, or longer than its header says
    source    Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database: "the IDX file format"
    """
    path = Path(path)
    data = _bytes(path)
    dimensions = magic & 0xFF
    header = 4 + 4 * dimensions
    found = int.from_bytes(data[:4], "big")
    if len(data) >= 4 and found != magic:
        what = f" ({_KINDS[found]})" if found in _KINDS else ""
        raise DataError(f"{path}: expected the magic number 0x{magic:08x} ({_KINDS[magic]}), found 0x{found:08x}{what}")
    if len(data) < header:
        raise DataError(f"{path}: expected a header of {header} bytes, but the file ends after {len(data)}")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    expected = header + math.prod(shape)
    if len(data) != expected:
        size = " × ".join(f"{n:,}" for n in shape)
        state = "cut short" if len(data) < expected else "too long"
        raise DataError(f"{path} is {state}: its header says {size}, so {expected:,} bytes; it has {len(data):,}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{path} cannot be read: {error}; get it again") from error


def _pair(folder: Path, prefix: str) -> tuple[Path, Path] | None:
    """The files of images and labels, None if neither is there."""
    images, labels = (_find(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        there, missing = (labels, "images-idx3-ubyte") if images is None else (images, "labels-idx1-ubyte")
        raise DataError(f"{there} is there, but {folder / f'{prefix}-{missing}'}[.gz] is missing")
    return images, labels


def _find(folder: Path, name: str) -> Path | None:
    names = [name, name.replace("-idx", ".idx")]  # some copies have a dot there
    paths = [folder / f"{one}{ending}" for one in names for ending in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _from_pairs(folder: Path, pairs: dict[str, tuple[Path, Path]]) -> Images:
    parts = {}
    for name, (images, labels) in pairs.items():
        where = f"{images} and {labels.name}"
        parts[name] = _checked(read_idx(images, IMAGES), read_idx(labels, LABELS), where)
    if len(parts) == 2:
        return _whole(*parts["train"], *parts["test"], f"MNIST, IDX files in {folder}")
    ((name, (x, y)),) = parts.items()
    return _split(x, y, f"{folder}, where only {_NAMES[name]} is")


def _npz(path: Path) -> Images:
    try:
        with path.open("rb") as handle:
            begins = handle.read(len(_NPY))
            if not begins.startswith((_ZIP, _NPY)):  # NumPy would take it for a pickle
                raise ValueError("it is not a .npz file")
            handle.seek(0)
            file = np.load(handle, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an archive of arrays (.npz), found a single array")
            missing = [key for key in _NPZ_KEYS if key not in file]
            if missing:
                raise DataError(f"{path}: expected the arrays {', '.join(_NPZ_KEYS)}; {', '.join(missing)} missing")
            arrays = [file[key] for key in _NPZ_KEYS]
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} cannot be read as mnist.npz ({error}); for IDX files give their folder; "
            f"MNIST as one file: {_WHERE}"
        ) from error
    train = _checked(arrays[0], arrays[1], f"{path}: x_train and y_train")
    test = _checked(arrays[2], arrays[3], f"{path}: x_test and y_test")
    return _whole(*train, *test, f"MNIST, {path}")


def _checked(x: NDArray[Any], y: NDArray[Any], where: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Bytes to numbers in 0 … 1, one row a picture."""
    if x.ndim != 3 or x.dtype != np.uint8 or y.ndim != 1 or y.dtype.kind not in "ui":
        raise DataError(
            f"{where}: expected images (n, rows, columns) of unsigned bytes and labels (n,) of integers, found "
            f"{x.shape} {x.dtype} and {y.shape} {y.dtype}"
        )
    if len(x) != len(y) or not x.size:
        raise DataError(
            f"{where}: expected as many labels as images, at least one; found {len(x)} images, {len(y)} labels"
        )
    if y.min() < 0 or y.max() > 9:
        raise DataError(f"{where}: expected labels from 0 to 9, found {y.min()} to {y.max()}")
    return x.reshape(len(x), -1).astype(np.float32) / np.float32(255), y.astype(np.int64)


def _whole(
    x: NDArray[np.float32], y: NDArray[np.int64], test_x: NDArray[np.float32], test_y: NDArray[np.int64], source: str
) -> Images:
    if x.shape[1] != test_x.shape[1]:
        raise DataError(f"{source}: training images have {x.shape[1]} pixels, test images {test_x.shape[1]}")
    return Images(x, y, test_x, test_y, f"{source}: {len(x):,} to train on, {len(test_x):,} to test")


def _split(x: NDArray[np.float32], y: NDArray[np.int64], source: str) -> Images:
    """Hold out a fifth, always the same one: MNIST's test files have the easy half first, so not simply the last."""
    n = len(x)
    if n < 5:
        raise DataError(f"{source}: {n} images are too few to hold a fifth of them out; expected at least 5")
    shuffled = permute(np.arange(n), n, _SPLIT)
    test, train = np.sort(shuffled[: n // 5]), np.sort(shuffled[n // 5 :])
    source = f"{source}: split 80/20, {len(train):,} to train on, {len(test):,} to test"
    return Images(x[train], y[train], x[test], y[test], source)


def _digits() -> Images:
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sklearn":
            raise
        raise MissingExtraError(
            "without a path the digits of scikit-learn are read, and scikit-learn is not installed; run: pip install "
            f"scikit-learn, or give a folder or mnist.npz ({_WHERE})"
        ) from error
    x, y = datasets.load_digits(return_X_y=True)
    return _split((x / 16).astype(np.float32), y.astype(np.int64), "scikit-learn's digits, 8 × 8")
