"""The compiled helper: to the bit what `mezzo.formats.quantize` gives, and quietly absent where it cannot be."""

import itertools
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
import textwrap
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, get_format, quantize
from mezzo.torch import helper
from mezzo.torch.helper import build

KEY = (2**63 + 5, 7, "blocks.3.attn.qkv/wgrad/a")
ELEMENTS = [fmt for fmt in FORMATS.values() if helper.supports(fmt)]
BOTH = list(itertools.product(("nearest", "toward_zero", "stochastic"), ("saturate", "cast")))
SCALED = [
    "mxfp8_e4m3",
    "mxfp8_e5m2+floor",
    "mxfp6_e2m3",
    "mxfp4+floor",
    "int8@1x16+pow2",
    "nvfp4",
    "nvfp4_16x16",
    "e2m1@3x5+nvfp4",
    "e4m3@tensor",
    "e5m2@row",
    "e3m2@row+pow2",
    "int8@1x128",
    "e4m3@128x128",
    "e4m3@4x1",
    "e2m3@2x8+pow2",
]
COMPILERS = ("g++", "clang++", "c++")


@pytest.fixture(scope="module")
def compiled():
    found = helper.load()
    if found is None:
        pytest.skip(f"no compiled helper: {helper.status()}")
    return found


@pytest.fixture
def needs_compiler():
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"nothing can be built: {error}")


def numbers(count, seed=0):
    """float32 of every exponent, among them subnormals, ties of every format, limits, infinities and NaN."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32).copy()
    with np.errstate(over="ignore"):
        limits = [s * fmt.max * r for fmt in ELEMENTS for s in (1, -1) for r in (1, 1 + 2**-12, 1 + 2**-5, 1.07, 1.2)]
        special = np.array([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-127), *limits], np.float32)
    quarters = (rng.integers(-2048, 2048, count // 4) / 4 * 2.0 ** rng.integers(-20, 8, count // 4)).astype(np.float32)
    for part in (quarters, special):
        part = part[:count]
        x[rng.permutation(count)[: len(part)]] = part
    return x


def tame(shape, seed=0):
    """float32 of some thirty binades, a few zeros, all finite."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-15, 16, shape) * (rng.random(shape) < 0.95)
    return x.astype(np.float32)


def same(got, expected):
    got = got.numpy() if got.dtype is torch.float32 else got.float().numpy()
    expected = np.asarray(expected).astype(np.float32)
    assert got.shape == expected.shape
    equal = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert equal.all(), (got[~equal][:5], expected[~equal][:5], np.argwhere(~equal)[:5])


def key_of(rounding):
    return KEY if rounding == "stochastic" else None


def check_elements(compiled, x, fmt, rounding="nearest", overflow="saturate"):
    key, out = key_of(rounding), torch.full(x.shape, 99.0)
    compiled.elements(torch.from_numpy(x), out, fmt, rounding, overflow, key)
    same(out, quantize(x, fmt, rounding=rounding, overflow=overflow, key=key))


def check_blocks(compiled, x, fmt, axis=-1, rounding="nearest", overflow="saturate", scale=None):
    fmt, key, out = get_format(fmt), key_of(rounding), torch.full(x.shape, 99.0)
    given = None if scale is None else torch.as_tensor(scale)
    compiled.blocks(torch.from_numpy(x), out, fmt, axis, rounding, overflow, key, given)
    same(out, quantize(x, fmt, axis=axis, rounding=rounding, overflow=overflow, key=key, scale=scale))


def in_a_new_process(code, **environment):
    """What the code printed; nothing may come on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


# ------------------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize(("rounding", "overflow"), BOTH)
@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_elements_are_those_of_the_reference(compiled, fmt, rounding, overflow):
    check_elements(compiled, numbers(20_001), fmt, rounding, overflow)


@pytest.mark.parametrize("fmt", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (1023,), (1025,), (3, 0, 2), (5, 7, 31)])
def test_elements_come_in_any_shape(compiled, shape, fmt, rounding):
    check_elements(
        compiled, numbers(max(64, math.prod(shape)))[: math.prod(shape)].reshape(shape), FORMATS[fmt], rounding
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_threads_share_the_elements(compiled, rounding, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_elements(compiled, numbers(600_011), FORMATS["float8_e5m2"], rounding)
        check_elements(compiled, numbers(600_011), FORMATS["tf32"], rounding)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_elements_are_rounded_in_place(compiled, fmt):
    x = numbers(5_000)
    y = torch.from_numpy(x.copy())
    compiled.elements(y, y, fmt, "nearest", "cast", None)
    same(y, quantize(x, fmt, overflow="cast"))


@pytest.mark.parametrize("overflow", ["saturate", "cast"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8"])
def test_results_may_go_to_sixteen_bits(compiled, name, overflow):
    x = numbers(5_000)
    for dtype, carrier in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        if FORMATS[carrier].holds(FORMATS[name]):
            out = torch.empty(x.shape, dtype=dtype)
            compiled.elements(torch.from_numpy(x), out, FORMATS[name], "nearest", overflow, None)
            same(out, quantize(x, name, overflow=overflow))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ELEMENTS, ids=str)
def test_every_number_of_sixteen_bits_may_come_in(compiled, fmt, dtype):
    codes = np.arange(1 << 16, dtype=np.uint16)
    x = codes.view(ml_dtypes.bfloat16 if dtype is torch.bfloat16 else np.float16)
    tensor = torch.from_numpy(codes.view(np.int16).copy()).view(dtype)
    out = torch.empty(x.shape)
    compiled.elements(tensor, out, fmt, "nearest", "cast", None)
    with np.errstate(invalid="ignore"):
        same(out, quantize(x, fmt, overflow="cast"))
        compiled.elements(tensor, tensor, FORMATS["float8_e4m3fn"], "stochastic", "saturate", KEY)
        same(tensor, quantize(x, "e4m3", rounding="stochastic", key=KEY))


def test_a_large_result_that_passes_the_cache_is_the_same(compiled):
    x = torch.from_numpy(numbers(1 << 20)).repeat(9)[: (8 << 20) + 77]
    for begin in (0, 3):  # aligned, and not
        out = torch.zeros(x.numel() + 3)[begin : begin + x.numel()]
        compiled.elements(x, out, FORMATS["float16"], "nearest", "saturate", None)
        small = x[: 1 << 20].clone()
        compiled.elements(small, small, FORMATS["float16"], "nearest", "saturate", None)
        assert torch.equal(out.view(torch.int32), small.repeat(9)[: x.numel()].view(torch.int32))


def test_a_transposed_tensor_is_rounded_where_it_lies(compiled):
    x = numbers(35 * 64).reshape(64, 35)
    out = torch.empty(64, 35).t()
    compiled.elements(torch.from_numpy(x).t(), out, FORMATS["float8_e4m3fn"], "nearest", "saturate", None)
    same(out.contiguous(), quantize(x.T, "e4m3"))


# --------------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("rounding", "overflow"), BOTH)
@pytest.mark.parametrize("name", SCALED)
def test_blocks_are_those_of_the_reference(compiled, name, rounding, overflow):
    x = tame((37, 150))
    for axis in (0, 1):
        check_blocks(compiled, x, name, axis, rounding, overflow)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize(
    "shape", [(1,), (31,), (2500,), (2, 767), (17, 1500), (1, 1), (64, 64), (3, 5, 70), (2, 3, 20, 33), (2, 260, 3)]
)
def test_blocks_lie_along_any_axis_and_may_be_short(compiled, shape, name):
    fmt = get_format(name)
    if len(shape) == 1 and isinstance(fmt.group, tuple) and fmt.group[0] > 1:
        shape = (1, *shape)  # blocks of several rows need two axes
    for axis in (*range(len(shape)), -1):
        check_blocks(compiled, tame(shape), fmt, axis)
        check_blocks(compiled, tame(shape), fmt, axis, "stochastic")


@pytest.mark.parametrize("name", SCALED)
def test_an_empty_tensor_has_no_blocks(compiled, name):
    for shape, axis in (((0, 4), 0), ((0, 4), 1), ((3, 0, 2), 1), ((3, 0, 2), 2)):
        out = torch.empty(shape)
        compiled.blocks(torch.empty(shape), out, get_format(name), axis, "nearest", "saturate", None, None)
        assert out.shape == shape


@pytest.mark.parametrize("name", SCALED)
def test_blocks_hold_any_numbers(compiled, name):
    """Every exponent of float32: scales at their limits, subnormal results, groups that hold infinities and NaN."""
    fmt = get_format(name)
    x = numbers(96 * 80).reshape(96, 80)
    finite = np.where(np.isfinite(x), x, np.float32(1))
    small = (finite * np.float32(2.0**-120)).astype(np.float32)
    for array in (x, finite, small, np.zeros_like(x), -np.zeros_like(x), np.full_like(x, 2.0**-149)):
        with np.errstate(all="ignore"):
            for axis in (0, 1):
                check_blocks(compiled, array, fmt, axis)
                check_blocks(compiled, array, fmt, axis, "toward_zero", "cast")


@pytest.mark.parametrize("name", SCALED)
def test_threads_share_the_blocks(compiled, name):
    x = tame((520, 1030))
    for axis in (0, 1):
        check_blocks(compiled, x, name, axis)
    check_blocks(compiled, x, name, 1, "stochastic")


@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@row", "int8@row", "e4m3@1x100000", "e2m1@1x70000+nvfp4"])
def test_threads_share_a_few_large_groups(compiled, name):
    x = tame((3, 150_001))
    check_blocks(compiled, x, name)
    check_blocks(compiled, x, name, 1, "stochastic", "cast")
    check_blocks(compiled, x.T.copy(), name, 0)


@pytest.mark.parametrize("name", ["e4m3@tensor", "e5m2@row", "int8@1x16", "e2m1@5x8", "e4m3@128x128", "e2m3@1x4"])
@pytest.mark.parametrize("shape", [(130, 150), (2, 3, 20, 33), (4, 2100)])
def test_scales_may_be_given(compiled, shape, name):
    rng = np.random.default_rng(1)
    x = numbers(math.prod(shape)).reshape(shape)
    for axis in range(len(shape)):
        expected = helper.Groups(shape, get_format(name), axis).scales_shape
        for scale in (np.float32(0.37), np.exp2(rng.uniform(-140, 127, expected)).astype(np.float32)):
            with np.errstate(all="ignore"):
                check_blocks(compiled, x, name, axis, scale=scale)
                check_blocks(compiled, x, name, axis, "toward_zero", "cast", scale=scale)
                check_blocks(compiled, x, name, axis, "stochastic", "cast", scale=scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_given_scale_is_positive_and_finite(compiled, scale):
    x = torch.ones(4, 4)
    with pytest.raises(ConfigError, match="a given scale must be positive and finite"):
        compiled.blocks(x, x, get_format("e4m3@tensor"), -1, "nearest", "saturate", None, torch.tensor(scale))


def test_given_scales_have_the_shape_of_the_groups(compiled):
    x = torch.ones(4, 40)
    with pytest.raises(ConfigError, match=r"the shape \(\) or \(4, 2\), one for each group, not \(4, 3\)"):
        compiled.blocks(x, x, get_format("e4m3@1x32"), -1, "nearest", "saturate", None, torch.ones(4, 3))


@pytest.mark.parametrize("name", SCALED)
def test_blocks_are_rounded_in_place(compiled, name):
    x = tame((70, 90))
    y = torch.from_numpy(x.copy())
    compiled.blocks(y, y, get_format(name), 0, "nearest", "saturate", None, None)
    same(y, quantize(x, name, axis=0))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "mxfp6_e2m3"])
def test_blocks_come_and_go_in_sixteen_bits(compiled, name):
    x = tame((64, 96)).astype(ml_dtypes.bfloat16)
    tensor = torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    for axis in (0, 1):
        out = torch.empty_like(tensor)
        compiled.blocks(tensor, out, get_format(name), axis, "nearest", "saturate", None, None)
        same(out, quantize(x, name, axis=axis))
    half = torch.from_numpy(x.astype(np.float32)).half()
    wide = torch.empty(half.shape)
    compiled.blocks(half, wide, get_format(name), 1, "nearest", "saturate", None, None)
    same(wide, quantize(half.numpy(), name))


def test_large_blocks_that_pass_the_cache_are_the_same(compiled):
    x = torch.from_numpy(tame((1024, 1056))).repeat(8, 1)
    for name in ("mxfp8_e4m3", "nvfp4"):
        out = torch.empty_like(x)
        compiled.blocks(x, out, get_format(name), -1, "nearest", "saturate", None, None)
        same(out, np.tile(quantize(x[:1024].numpy(), name), (8, 1)))


# ------------------------------------------------------------------------------------------------ the state around them


def test_the_callers_flushing_of_subnormals_is_neither_heeded_nor_lost(compiled):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        x = torch.from_numpy(np.linspace(-4, 4, 4001).astype(np.float32)) * 1.0
        bits = torch.arange(1, 4001, dtype=torch.int32)
        out = torch.empty(4000)
        compiled.elements(bits.view(torch.float32), out, FORMATS["bfloat16"], "nearest", "saturate", None)
        scaled = torch.empty(4000)
        compiled.blocks(bits.view(torch.float32), scaled, get_format("mxfp4"), -1, "nearest", "saturate", None, None)
        still = (torch.tensor(2.0**-120) * torch.tensor(2.0**-10)).item()
    finally:
        torch.set_flush_denormal(False)
    assert still == 0.0
    assert x.abs().max() == 4
    subnormal = bits.numpy().view(np.float32)
    same(out, quantize(subnormal, "bfloat16"))
    same(scaled, quantize(subnormal, "mxfp4"))


def test_several_python_threads_may_round_at_once(compiled):
    arrays = [tame((600, 700), seed) for seed in range(4)]
    expected = [(quantize(x, "e5m2", rounding="stochastic", key=KEY), quantize(x, "nvfp4")) for x in arrays]
    failures = []

    def work(x, of_elements, of_blocks):
        try:
            for _ in range(5):
                out = torch.empty(x.shape)
                compiled.elements(torch.from_numpy(x), out, FORMATS["float8_e5m2"], "stochastic", "saturate", KEY)
                same(out, of_elements)
                compiled.blocks(torch.from_numpy(x), out, get_format("nvfp4"), -1, "nearest", "saturate", None, None)
                same(out, of_blocks)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(x, *e)) for x, e in zip(arrays, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_rounds_with_several_threads(compiled):
    code = """
        import os, warnings, numpy as np, torch
        from mezzo.formats import FORMATS, quantize
        from mezzo.torch import helper
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        torch.set_num_threads(3)
        x = torch.randn(700_000)
        x + 1  # torch's threads are there
        def rounded():
            out = torch.empty_like(x)
            helper.load().elements(x, out, FORMATS["float8_e4m3fn"], "nearest", "saturate", None)
            return np.array_equal(out.numpy(), quantize(x.numpy(), "e4m3"))
        assert rounded()
        child = os.fork()
        if child == 0:
            os._exit(0 if rounded() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert rounded()
        print("both")
    """
    assert in_a_new_process(code) == "both"


def test_what_does_not_fit_is_refused(compiled):
    x = torch.ones(4, 4)
    for x_, out in (
        (x.double(), x),
        (x, torch.ones(5)),
        (x, x.to(torch.int32)),
        (torch.ones(4, 8)[:, ::2], x),
        (x, torch.ones(4, 4).t()),
        (x.to("meta"), x),
    ):
        with pytest.raises(ValueError, match=r"helper takes dense|strides of x"):
            compiled.elements(x_, out, FORMATS["bfloat16"], "nearest", "saturate", None)
    for name in ("float64", "float8_e8m0fnu"):
        with pytest.raises(ValueError, match="does not round to"):
            compiled.elements(x, x, FORMATS[name], "nearest", "saturate", None)
    with pytest.raises(ValueError, match="the key is"):
        compiled.elements(x, x, FORMATS["bfloat16"], "stochastic", "saturate", (0, 2**32, 0))
    with pytest.raises(ValueError, match="unknown"):
        compiled.elements(x, x, FORMATS["bfloat16"], "stochastic", "saturate", None)
    with pytest.raises(ConfigError, match="needs an axis"):
        compiled.blocks(x, x, get_format("mxfp4"), 2, "nearest", "saturate", None, None)


# ------------------------------------------------------------------------------------------ built, absent, switched off

STATUS = "from mezzo.torch import helper; print(helper.load() is None, helper.status())"
# What is built here need not be fast; so it is built quickly.
QUICK = """
from mezzo.torch.helper import build
build.FLAGS = tuple(flag for flag in build.FLAGS if flag != "-O3")
"""


def test_off_is_for_what_is_inside(compiled):
    with helper.off():
        assert helper.load() is None
        assert helper.status() == "absent: switched off by mezzo.torch.helper.off()"
    assert helper.load() is compiled
    assert helper.status().startswith("built with ")


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("MEZZO_HELPER", "off")
    assert helper.load() is None
    assert helper.status() == "absent: switched off by MEZZO_HELPER=off"


def test_importing_it_builds_nothing(tmp_path):
    assert in_a_new_process("import mezzo.torch.helper; print('imported')", XDG_CACHE_HOME=str(tmp_path)) == "imported"
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_it_is_quietly_absent(tmp_path):
    printed = in_a_new_process(STATUS, PATH=str(tmp_path), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert printed == "True absent: no C++ compiler (set CXX)"


def test_a_compiler_that_is_not_there_is_named(tmp_path):
    printed = in_a_new_process(STATUS, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert printed == "True absent: CXX names 'no-such-compiler', which is not there"


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="the compilers are shell scripts")
def test_a_compiler_that_fails_leaves_it_absent(tmp_path):
    version = 'if [ "$1" = --version ]; then echo "odd++ 1.2.3"; exit 0; fi\n'
    cases = {
        "fails": (version + "echo 'rounding.cpp:1: error: no such thing' >&2; exit 1", "error: no such thing"),
        "empty": (version + 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "does not load"),
        "nothing": (version, "does not load"),
        "dies": ("exit 3", "does not run"),
    }
    for name, (text, why) in cases.items():
        cache = tmp_path / f"cache-{name}"
        printed = in_a_new_process(STATUS, CXX=script(tmp_path / name, text), XDG_CACHE_HOME=str(cache))
        assert printed.startswith("True absent: ")
        assert why in printed
        assert len(printed.splitlines()) == 1
        assert not list(cache.glob("mezzo/*.so"))


def test_a_library_in_the_cache_that_does_not_load_is_built_anew(tmp_path, needs_compiler):
    first = in_a_new_process(f"{QUICK}\n{STATUS}", XDG_CACHE_HOME=str(tmp_path))
    (kept,) = tmp_path.glob("mezzo/*.so")
    kept.write_bytes(b"rubbish")
    assert in_a_new_process(f"{QUICK}\n{STATUS}", XDG_CACHE_HOME=str(tmp_path)) == first
    assert kept.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_leaves_it_absent(tmp_path, needs_compiler):
    (tmp_path / "mezzo").write_text("a file where the folder should be")
    printed = in_a_new_process(STATUS, XDG_CACHE_HOME=str(tmp_path))
    assert printed.startswith(f"True absent: the cache folder {tmp_path / 'mezzo'} cannot be written")


def test_a_compiler_that_breaks_a_routine_is_found_out(tmp_path, needs_compiler):
    wrong = build.SOURCE.read_text().replace("float y = (b + c) - c;", "float y = b + (c - c);")
    (tmp_path / "wrong.cpp").write_text(wrong)
    code = f"{QUICK}\nfrom pathlib import Path\nbuild.SOURCE = Path({str(tmp_path / 'wrong.cpp')!r})\n{STATUS}"
    printed = in_a_new_process(code, XDG_CACHE_HOME=str(tmp_path))
    assert printed.startswith("True absent: what ")
    assert "gives other bits than mezzo.formats: float16, nearest, saturate" in printed
    assert not list(tmp_path.glob("mezzo/*.so"))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="-march=x86-64 is for that")
def test_the_code_without_special_instructions_gives_the_same_bits(tmp_path, needs_compiler):
    code = f'{QUICK}\nbuild.NATIVE = (("-march=x86-64", "-O1"),)\n{STATUS}'
    printed = in_a_new_process(code, XDG_CACHE_HOME=str(tmp_path))
    assert printed == f"False built with {needs_compiler.label}"


def test_processes_that_need_it_at_once_build_it_once(tmp_path, needs_compiler):
    log = tmp_path / "log"
    real = " ".join(needs_compiler.command)
    counting = f'[ "$1" = --version ] || echo built >> {log}\nexec {real} "$@"'
    environment = os.environ | {"CXX": script(tmp_path / "counting", counting), "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", QUICK + STATUS], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        assert process.communicate(timeout=120)[0].startswith("False built with ")
    assert log.read_text() == "built\n"
    assert len(list(tmp_path.glob("mezzo/*.so"))) == 1


def test_it_is_built_where_there_is_a_compiler():
    """Elsewhere tests skip where it is absent; here it may not be."""
    if os.environ.get("MEZZO_HELPER") == "off" or os.environ.get("CXX") or not any(map(shutil.which, COMPILERS)):
        pytest.skip("switched off, or no compiler that is known to work")
    assert helper.load() is not None, helper.status()
