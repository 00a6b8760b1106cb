"""What a rounding lost, by the compiled helper: exact counts and sums that do not hang on the number of threads."""

import itertools
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from mezzo.errors import ConfigError
from mezzo.formats import get_format
from mezzo.formats.blocks import Groups
from mezzo.torch import helper
from mezzo.torch.helper import build

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
SIZES = (0, 1, 7, 64, 2049, 100_003)
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-127), 2.0**-126, 1e-30, -1e30, 65504.0, 65520.0]
LARGE = 600_011  # several threads share it
BREAKS = {
    "noise": ("a - __builtin_convertvector", "a + __builtin_convertvector"),
    "counts": ("finite & gone & ~zero", "finite & gone"),
    "histogram": ("bins[0][exponents[i]]++", "bins[0][0]++"),
    "chunks": ("(chunk + 1) * CHUNK, job.count", "(chunk + 1) * CHUNK, job.count / RUN * RUN"),
    "infinities": ("if (!look(", "if (look("),
    "lossy blocks": ("a != 0 && b == 0 ? 1 : 0;\n    }\n    part.amax", "b == 0 ? 1 : 0;\n    }\n    part.amax"),
    "order of blocks": ("job.upright ?", "!job.upright ?"),
    "pieces": ("whole.add(numbers.columns.part(0, here))", "whole = numbers.columns.part(0, here)"),
}
BLOCKS = ("nvfp4", "mxfp8_e4m3", "nvfp4_16x16", "e4m3@row", "e4m3@1x128", "e4m3@128x128", "int8@3x600", "e5m2@tensor")
SHAPES = ((130, 131), (64, 256), (3, 40, 50), (2, 3, 20, 33), (2, 700, 3), (4001,), (1, 1), (3, 0))


@pytest.fixture(scope="module")
def compiled():
    found = helper.load()
    if found is None:
        pytest.skip(f"no compiled helper: {helper.status()}")
    return found


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numbers(count, seed=0):
    """float32 of forty binades, zeros and the special ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count) * 2.0 ** rng.integers(-30, 11, count) * (rng.random(count) < 0.95)
    places = rng.permutation(count)[: max(1, count // 50)]
    x[places] = np.resize(rng.permutation(SPECIAL), len(places))
    return torch.from_numpy(x.astype(np.float32))


def reference(x, y, over):
    """The eight sums and the histogram, element by element in float64."""
    x, y = (tensor.contiguous().double().numpy().ravel() for tensor in (x, y))
    sums, bins = [float(x.size), 0.0, 0.0, 0.0, 0.0, 0.0], [0] * 256
    signal, noise = [], []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        sums[1] += a == 0
        if math.isfinite(a):
            sums[3] += a != 0 and b == 0
            sums[4] += abs(a) > over or not math.isfinite(b)
            sums[5] = max(sums[5], abs(a))
            bins[0 if abs(a) < 2.0**-126 else math.frexp(a)[1] + 126] += 1
            if math.isfinite(b):
                signal.append(a * a)
                noise.append((a - b) ** 2)
        else:
            sums[2] += 1
    return [*sums, math.fsum(signal), math.fsum(noise)], bins


def check(compiled, x, y, over):
    sums, histogram = compiled.measure(x, y, over)
    assert (sums.dtype, sums.shape, sums.device.type) == (torch.float64, (8,), "cpu")
    assert (histogram.dtype, histogram.shape, histogram.device.type) == (torch.int64, (256,), "cpu")
    expected, bins = reference(x, y, over)
    assert sums[:6].tolist() == expected[:6]
    assert sums[6:].tolist() == pytest.approx(expected[6:], rel=1e-12, abs=0)
    assert histogram.tolist() == bins


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_it_is_the_reference(compiled, before, after, size):
    x = numbers(size) if size else torch.empty(0)
    check(compiled, x.to(before), (x * 2.0**-14).to(torch.float8_e5m2).float().mul(2.0**14).to(after), 448.0)


@pytest.mark.parametrize("over", [math.inf, 65504.0, 1.0, 0.0])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_special_values_meet_each_other(compiled, before, after, over):
    x, y = (torch.tensor(side) for side in zip(*itertools.product(SPECIAL, SPECIAL), strict=True))
    check(compiled, x.to(before), y.to(after), over)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits(compiled, dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    check(compiled, x, x.flip(0), 100.0)


def test_the_smallest_and_the_largest_squares_count(compiled):
    for scale in (2.0**-149, 1e-25, 1e37):
        x = torch.linspace(-9, 9, 999) * scale
        sums, _ = compiled.measure(x, x * 0.5, math.inf)
        assert sums[7] > 0
        check(compiled, x, x * 0.5, math.inf)
    most = torch.full((100,), torch.finfo(torch.float32).max)
    check(compiled, most, -most, math.inf)  # a difference that float32 does not hold


def test_a_hand_made_case(compiled):
    x = torch.tensor([0.0, -0.0, math.nan, math.inf, 1.0, 2.0**-20, 300.0, -500.0, 70000.0, 2.0**-140])
    y = torch.tensor([0.0, 0.0, math.nan, 448.0, 1.5, 0.0, 304.0, -448.0, math.inf, 0.0])
    sums, histogram = compiled.measure(x, y, 448.0)
    assert sums[:6].tolist() == [10, 2, 2, 2, 2, 70000]
    assert sums[6] == pytest.approx(1 + 2.0**-40 + 300**2 + 500**2, rel=1e-15)
    assert sums[7] == pytest.approx(0.25 + 2.0**-40 + 16 + 52**2, rel=1e-15)
    found = {i: n for i, n in enumerate(histogram.tolist()) if n}
    assert found == {0: 3, 127: 1, 107: 1, 135: 2, 143: 1}


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_the_number_of_threads_changes_no_bit(compiled, before, after):
    x = numbers(LARGE)
    x, y = x.to(before), x.bfloat16().to(after)
    with threads(1):
        sums, histogram = compiled.measure(x, y, 448.0)
    for count in (2, 2, 2, 5):
        with threads(count):
            again, bins = compiled.measure(x, y, 448.0)
        assert torch.equal(again.view(torch.int64), sums.view(torch.int64))
        assert torch.equal(bins, histogram)


def test_threads_share_the_numbers(compiled):
    with threads(2):
        check(compiled, numbers(LARGE), numbers(LARGE, seed=1), 10.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_tensors_are_measured_where_they_lie(compiled, dtype):
    x = numbers(35 * 64).reshape(64, 35)
    y = x.to(dtype)
    check(compiled, x.t(), y.t(), 10.0)
    cube = numbers(3 * 5 * 70).reshape(3, 5, 70)
    check(compiled, cube.permute(2, 0, 1), cube.to(dtype).permute(2, 0, 1), 10.0)
    check(compiled, x[3:60], y[3:60], 10.0)
    check(compiled, x[0, 3:24], y[0, 3:24], 10.0)  # aligned to nothing
    check(compiled, torch.tensor(2.5), torch.tensor(2.0).to(dtype), 10.0)
    check(compiled, torch.ones(3, 0), torch.ones(3, 0, dtype=dtype), 10.0)


def test_the_tensors_stay_as_they_are(compiled):
    for dtype in DTYPES:
        x = numbers(20_011).to(dtype).requires_grad_()
        y = x.detach().clone()
        before = y.clone()
        compiled.measure(x, y, 1.0)
        assert torch.equal(x.detach().view(torch.uint8), before.view(torch.uint8))
        assert torch.equal(y.view(torch.uint8), before.view(torch.uint8))


def test_the_callers_flushing_of_subnormals_is_not_heeded(compiled):
    x = torch.arange(1, 4001, dtype=torch.int32).view(torch.float32)
    half = torch.arange(1, 1001, dtype=torch.int16).view(torch.float16)
    expected = [compiled.measure(x, torch.zeros(4000), 1.0), compiled.measure(half, half, 1.0)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = [compiled.measure(x, torch.zeros(4000), 1.0), compiled.measure(half, half, 1.0)]
    finally:
        torch.set_flush_denormal(False)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
    assert expected[0][0][:5].tolist() == [4000, 0, 0, 4000, 0]


def test_what_does_not_fit_is_refused(compiled):
    x = torch.ones(4, 4)
    for x_, y in (
        (x.double(), x),
        (x, x.to(torch.int32)),
        (x, x.to(torch.float8_e4m3fn)),
        (x, torch.ones(5)),
        (x, torch.ones(16)),
        (x, torch.ones(4, 4).t()),
        (torch.ones(4, 8)[:, ::2], torch.ones(4, 8)[:, ::2]),
        (torch.ones(4, 1).expand(4, 4), torch.ones(4, 1).expand(4, 4)),
        (x.to("meta"), x),
    ):
        with pytest.raises(ValueError, match=r"helper takes dense|y must have the shape and the strides of x"):
            compiled.measure(x_, y, 1.0)
    for over in (math.nan, -1.0):
        with pytest.raises(ValueError, match="over is a magnitude, not"):
            compiled.measure(x, x, over)


# --------------------------------------------------------------------------------------------------------------- blocks


def check_blocks(compiled, x, y, fmt, axis):
    """Hold `measure_blocks` against NumPy in float64."""
    found = compiled.measure_blocks(x, y, fmt, axis)
    amax, signal, noise, lossy = found
    assert [one.dtype for one in found] == [torch.float32, torch.float64, torch.float64, torch.bool]
    if not x.numel():
        assert all(one.shape == (0,) for one in found)
        return found
    groups = Groups(tuple(x.shape), fmt, axis)
    before, after = (groups.divide(side.double().numpy()) for side in (x, y))
    most = np.abs(before).max(axis=(2, 4)).ravel()
    finite = np.isfinite(most)
    assert torch.isfinite(amax).numpy().tolist() == finite.tolist()
    assert amax.numpy()[finite].tolist() == most[finite].tolist()
    assert lossy.tolist() == ((before != 0) & (after == 0)).any(axis=(2, 4)).ravel().tolist()
    with np.errstate(invalid="ignore"):
        sums = [(side**2).sum(axis=(2, 4)).ravel() for side in (before, before - after)]
    for got, expected in zip((signal, noise), sums, strict=True):
        np.testing.assert_allclose(got.numpy()[finite], expected[finite], rtol=1e-12, atol=0)
        assert not np.isfinite(got.numpy()[~finite]).any()
    return found


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_the_reference(compiled, shape, name):
    fmt = get_format(name)
    if len(shape) == 1 and fmt.group[0] not in (1, "r", "t"):
        pytest.skip("blocks of several rows need a matrix")
    for axis in range(-len(shape), len(shape)):
        x = numbers(math.prod(shape)).reshape(shape) if math.prod(shape) else torch.empty(shape)
        y = (x * 2.0**-14).to(torch.float8_e5m2).float().mul(2.0**14)
        check_blocks(compiled, x, y, fmt, axis)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_16x16", "e4m3@row"])
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_blocks_of_every_dtype(compiled, before, after, name):
    x, fmt = numbers(70 * 90).reshape(70, 90).to(before), get_format(name)
    for axis in (0, 1):
        check_blocks(compiled, x, x.bfloat16().to(after), fmt, axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_small_and_of_large_numbers(compiled, axis):
    for scale in (2.0**-149, 1e-30, 1e37):
        x = (torch.linspace(1, 9, 40 * 50) * scale).reshape(40, 50)
        _, _, noise, _ = check_blocks(compiled, x, x * 0, get_format("nvfp4"), axis)
        assert (noise > 0).all()
    most = torch.full((40, 50), torch.finfo(torch.float32).max)
    check_blocks(compiled, most, -most, get_format("nvfp4"), axis)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_number_of_threads_changes_no_bit_of_a_block(compiled, name):
    fmt, x = get_format(name), numbers(LARGE)[: 4 * 300 * 500].reshape(4, 300, 500)
    y = x.bfloat16()
    for axis in (0, 1, 2):
        with threads(1):
            expected = check_blocks(compiled, x, y, fmt, axis)
        for count in (2, 2, 5):
            with threads(count):
                found = compiled.measure_blocks(x, y, fmt, axis)
            for got, one in zip(found, expected, strict=True):
                assert torch.equal(got.view(torch.uint8), one.view(torch.uint8))


def test_a_hand_made_pair_of_blocks(compiled):
    x = torch.zeros(2, 18)
    x[0, :3], x[1, 16] = torch.tensor([3.0, -4.0, 2.0**-20]), math.inf
    y = x.clone()
    y[0, :3] = torch.tensor([3.5, -4.0, 0.0])
    amax, signal, noise, lossy = compiled.measure_blocks(x, y, get_format("nvfp4"), -1)
    assert amax.tolist() == [4, 0, 0, math.inf]
    assert signal.tolist() == [25 + 2.0**-40, 0, 0, math.inf]
    assert noise[:3].tolist() == [0.25 + 2.0**-40, 0, 0]
    assert lossy.tolist() == [True, False, False, False]


def test_blocks_do_not_heed_the_callers_flushing_of_subnormals(compiled):
    x = torch.arange(1, 4001, dtype=torch.int32).view(torch.float32).reshape(40, 100)
    expected = [compiled.measure_blocks(x, x * 0, get_format("nvfp4"), axis) for axis in (0, 1)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = [compiled.measure_blocks(x, torch.zeros(40, 100), get_format("nvfp4"), axis) for axis in (0, 1)]
    finally:
        torch.set_flush_denormal(False)
    for got, wanted in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    assert (expected[0][1] > 0).all()


def test_blocks_that_do_not_fit_are_refused(compiled):
    x, fmt = torch.ones(4, 6), get_format("nvfp4")
    with pytest.raises(ValueError, match="blocks are measured in contiguous tensors"):
        compiled.measure_blocks(x.t(), x.t(), fmt, -1)
    with pytest.raises(ValueError, match="helper takes dense"):
        compiled.measure_blocks(x.double(), x, fmt, -1)
    with pytest.raises(ValueError, match="y must have the shape"):
        compiled.measure_blocks(x, torch.ones(6, 4), fmt, -1)
    with pytest.raises(ConfigError, match="needs an axis"):
        compiled.measure_blocks(x, x, fmt, 2)
    with pytest.raises(ConfigError, match="blocks of 16 rows"):
        compiled.measure_blocks(x[0], x[0], get_format("nvfp4_16x16"), -1)


# ------------------------------------------------------------------------------------------------------------ the build


@pytest.mark.parametrize("part", BREAKS)
def test_a_compiler_that_breaks_the_measure_is_found_out(tmp_path, part):
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"nothing can be built: {error}")
    right, wrong = BREAKS[part]
    text = build.MEASURE.read_text()
    assert text.count(right) == 1
    (tmp_path / "wrong.cpp").write_text(text.replace(right, wrong))
    code = f"""
from pathlib import Path
from mezzo.torch import helper
from mezzo.torch.helper import build
build.FLAGS = tuple(flag for flag in build.FLAGS if flag != "-O3")
build.MEASURE = Path({str(tmp_path / "wrong.cpp")!r})
helper.ROUNDINGS = ()  # the rest is known to be right
print(helper.load() is None, helper.status())
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "gives other bits than mezzo.formats: measure, " in done.stdout, done.stderr
    assert done.stdout.startswith("True absent: what ")
    assert not list(tmp_path.glob("mezzo/*.so"))


def test_a_change_of_any_source_is_built_anew(tmp_path, monkeypatch):
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"nothing can be built: {error}")
    built = []

    def compile_nothing(_, to):
        built.append(to.name)
        raise build.BuildError("only its name is looked at")

    monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda _: str(tmp_path))
    monkeypatch.setattr(build, "_compile", compile_nothing)
    for changed in (None, "SOURCE", "MEASURE", "HEADER", None):
        with monkeypatch.context() as patch:
            if changed is not None:
                copy = tmp_path / changed
                copy.write_text(getattr(build, changed).read_text() + "// changed\n")
                patch.setattr(build, changed, copy)
            with pytest.raises(build.BuildError, match="only its name"):
                build.library(compiler, lambda _: None)
    assert built[0] == built[-1]
    assert len(set(built)) == 4
