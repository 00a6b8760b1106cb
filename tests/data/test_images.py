"""Pictures of digits: what is read, how it is split, and what a wrong file is told."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mezzo.data import images
from mezzo.data.images import IMAGES, LABELS, initial_weights, load, order, read_idx
from mezzo.errors import DataError, MissingExtraError


def idx(magic: int, array: np.ndarray) -> bytes:
    header = b"".join(int(n).to_bytes(4, "big") for n in (magic, *array.shape))
    return header + array.astype(np.uint8).tobytes()


def digits(n: int, seed: int = 0, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, side, side), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def put(folder: Path, prefix: str, x: np.ndarray, y: np.ndarray, ending: str = "", dot: str = "-") -> None:
    """The two files of one part, gzipped if the ending says so."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if ending else bytes
    (folder / f"{prefix}-images{dot}idx3-ubyte{ending}").write_bytes(pack(idx(IMAGES, x)))
    (folder / f"{prefix}-labels{dot}idx1-ubyte{ending}").write_bytes(pack(idx(LABELS, y)))


@pytest.mark.parametrize(("ending", "dot"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_a_folder_of_idx_files_is_read(tmp_path: Path, ending: str, dot: str, below: str) -> None:
    (x, y), (test_x, test_y) = digits(12), digits(7, seed=1)
    put(tmp_path / below, "train", x, y, ending, dot)
    put(tmp_path / below, "t10k", test_x, test_y, ending, dot)
    data = load(tmp_path)
    assert (data.train_x.dtype, data.train_y.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(data.train_x * np.float32(255), x.reshape(12, 784))
    np.testing.assert_array_equal(data.train_y, y)
    np.testing.assert_array_equal(data.test_x * np.float32(255), test_x.reshape(7, 784))
    np.testing.assert_array_equal(data.test_y, test_y)
    assert data.pixels == 784
    assert data.source.endswith("12 to train on, 7 to test")


def test_mnist_npz_is_read_as_a_file_and_in_a_folder(tmp_path: Path) -> None:
    (x, y), (test_x, test_y) = digits(12), digits(7, seed=1)
    np.savez_compressed(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=test_x, y_test=test_y)
    for path in (tmp_path, tmp_path / "mnist.npz", str(tmp_path / "mnist.npz")):
        data = load(path)
        np.testing.assert_array_equal(data.train_x * np.float32(255), x.reshape(12, 784))
        np.testing.assert_array_equal(data.test_y, test_y)


@pytest.mark.parametrize("prefix", ["t10k", "train"])
def test_one_part_alone_is_split_always_in_the_same_way_and_says_so(tmp_path: Path, prefix: str) -> None:
    x, _ = digits(50)
    put(tmp_path, prefix, x, np.arange(50) % 10)
    data = load(tmp_path)
    assert (len(data.train_y), len(data.test_y)) == (40, 10)
    assert f"where only {prefix} is: split 80/20, 40 to train on, 10 to test" in data.source
    both = np.concatenate([data.train_x, data.test_x]) * np.float32(255)
    assert {row.tobytes() for row in both.astype(np.uint8)} == {row.tobytes() for row in x}  # each on one side
    for row, label in zip(data.test_x, data.test_y, strict=True):  # with its own label
        (where,) = np.flatnonzero((x.reshape(50, -1) == np.rint(row * 255)).all(axis=1))
        assert label == where % 10
    np.testing.assert_array_equal(load(tmp_path).test_x, data.test_x)
    assert not np.array_equal(data.test_x * np.float32(255), x[40:].reshape(10, -1))  # not simply the last ones


def test_without_a_path_the_digits_of_scikit_learn_are_read() -> None:
    pytest.importorskip("sklearn")
    data = load()
    assert data.train_x.shape == (1438, 64)
    assert data.test_x.shape == (359, 64)
    assert data.source == "scikit-learn's digits, 8 × 8: split 80/20, 1,438 to train on, 359 to test"
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
    assert set(data.test_y) == set(range(10))


def test_without_scikit_learn_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install scikit-learn, or give a folder or mnist\.npz"):
        load()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            idx(LABELS, np.arange(5)),
            r"expected the magic number 0x00000803 \(images, unsigned bytes in 3 dimensions\), "
            r"found 0x00000801 \(labels, unsigned bytes in 1 dimension\)",
        ),
        (b"<!DOCTYPE html>", r"found 0x3c21444f$"),
        (b"", "expected a header of 16 bytes, but the file ends after 0"),
        (idx(IMAGES, digits(3)[0])[:10], "expected a header of 16 bytes, but the file ends after 10"),
        (
            idx(IMAGES, digits(3)[0])[:-1],
            r"is cut short: its header says 3 × 28 × 28, so 2,368 bytes; it has 2,367",
        ),
        (idx(IMAGES, digits(3)[0]) + b"x", r"is too long: .* 2,368 bytes; it has 2,369"),
        (gzip.compress(idx(IMAGES, digits(3)[0]), mtime=0)[:-9], "cannot be read: .*; get it again"),
        (gzip.compress(b"x" * 99, mtime=0)[:12] + b"\xff" * 40, "cannot be read: .*; get it again"),
    ],
)
def test_a_wrong_idx_file_is_told_what_was_expected(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path, IMAGES)
    assert str(path) in str(caught.value)


def test_a_name_does_not_say_whether_a_file_is_gzipped(tmp_path: Path) -> None:
    _, y = digits(5)
    (tmp_path / "plain.gz").write_bytes(idx(LABELS, y))
    (tmp_path / "packed").write_bytes(gzip.compress(idx(LABELS, y), mtime=0))
    for name in ("plain.gz", "packed"):
        np.testing.assert_array_equal(read_idx(tmp_path / name, LABELS), y)


def test_a_missing_half_of_a_pair_is_named(tmp_path: Path) -> None:
    put(tmp_path, "t10k", *digits(9))
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is there, but .*t10k-labels-idx1-ubyte\[\.gz\] is"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (digits(6)[0], np.arange(5), "expected as many labels as images, at least one; found 6 images, 5 labels"),
        (digits(6)[0], np.arange(5, 11), "expected labels from 0 to 9, found 5 to 10"),
        (digits(0)[0], np.arange(0), "found 0 images, 0 labels"),
        (digits(4)[0], np.arange(4), "4 images are too few to hold a fifth of them out"),
    ],
)
def test_images_and_labels_must_go_together(tmp_path: Path, x: np.ndarray, y: np.ndarray, message: str) -> None:
    put(tmp_path, "train", x, y)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_both_parts_must_have_pictures_of_one_size(tmp_path: Path) -> None:
    put(tmp_path, "train", *digits(6))
    put(tmp_path, "t10k", *digits(6, side=8))
    with pytest.raises(DataError, match="training images have 784 pixels, test images 64"):
        load(tmp_path)


def test_a_wrong_npz_is_told_what_was_expected(tmp_path: Path) -> None:
    x, y = digits(6)
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x)
    with pytest.raises(DataError, match="expected the arrays x_train, y_train, x_test, y_test; y_test missing"):
        load(path)
    np.savez(path, x_train=x / 255, y_train=y, x_test=x, y_test=y)
    with pytest.raises(
        DataError, match=r"x_train and y_train: expected .* found \(6, 28, 28\) float64 and \(6,\) uint8"
    ):
        load(path)
    np.savez(path, x_train=x, y_train=np.array([None] * 6), x_test=x, y_test=y)  # a pickle inside
    with pytest.raises(DataError, match=r"cannot be read as mnist\.npz"):
        load(path)
    for data in (path.read_bytes()[:-30], b"", b"not a zip"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"cannot be read as mnist\.npz .*; for IDX files give their folder"):
            load(path)
    path.write_text("It was a dark and stormy night.\n")
    with pytest.raises(DataError, match=r"cannot be read as mnist\.npz \(it is not a \.npz file\); for IDX"):
        load(path)
    np.save(tmp_path / "one.npy", x)
    with pytest.raises(DataError, match=r"expected an archive of arrays \(\.npz\), found a single array"):
        load(tmp_path / "one.npy")


def test_a_path_with_nothing_of_use_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither mnist\.npz nor IDX files; expected train-images-idx3-ubyte, "):
        load(tmp_path)
    with pytest.raises(DataError, match=r"there is no file or folder .*nowhere"):
        load(tmp_path / "nowhere")


def test_an_epochs_order_takes_each_example_once_and_depends_on_seed_and_epoch_alone() -> None:
    first = order(100, seed=0, epoch=0)
    assert sorted(first) == list(range(100))
    np.testing.assert_array_equal(first, order(100, seed=0, epoch=0))
    assert not np.array_equal(first, order(100, seed=0, epoch=1))
    assert not np.array_equal(first, order(100, seed=1, epoch=0))
    assert not np.array_equal(first, np.arange(100))


def test_initial_weights_depend_on_the_seed_alone_and_keep_to_glorots_bound() -> None:
    (W1, b1), (W2, b2) = initial_weights((784, 128, 10), seed=3)
    assert [a.shape for a in (W1, b1, W2, b2)] == [(784, 128), (128,), (128, 10), (10,)]
    assert {a.dtype for a in (W1, b1, W2, b2)} == {np.dtype(np.float32)}
    assert not b1.any()
    assert not b2.any()
    for W in (W1, W2):
        limit = (6 / sum(W.shape)) ** 0.5
        assert 0.99 * limit < np.abs(W).max() <= np.float32(limit)
    np.testing.assert_array_equal(W2, initial_weights((784, 128, 10), seed=3)[1][0])
    assert not np.array_equal(W1, initial_weights((784, 128, 10), seed=4)[0][0])


def test_no_framework_is_imported() -> None:
    code = "import sys, mezzo.data.images; print({'torch', 'jax', 'tensorflow', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_key_of_the_split_is_no_key_of_an_epoch() -> None:
    """Else a seed of 0 would train its first epoch in the order that chose the test set; epochs begin at key 1."""
    n = 50
    assert not np.array_equal(order(n, seed=0, epoch=0), images.permute(np.arange(n), n, images._SPLIT))
