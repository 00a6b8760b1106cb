"""JAX and TensorFlow compiled: a few cases of the kit under jit, vmap, tf.function and XLA; and what only they have."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from checks import check_blocks, check_elements, check_hadamard, check_stochastic, load
from jax_adapter import EagerAdapter, JitAdapter, VmapAdapter
from keras_adapter import FunctionAdapter, array

from mezzo.errors import ConfigError
from mezzo.formats import hadamard as transform
from mezzo.formats import philox
from mezzo.formats import quantize as reference

in_jax, in_keras = (import_module(f"mezzo.{name}.quantize") for name in ("jax", "keras"))

FEW = [
    (check_elements, "elements", lambda c: c["format"] == "float8_e4m3fn" and c["x"].startswith("float32")),
    (check_elements, "elements", lambda c: c["format"] == "bfloat16" and c["x"].startswith("float32")),
    (check_stochastic, "stochastic", lambda c: c["format"] == "bfloat16" and c["x"].startswith("float32")),
    (check_blocks, "blocks", lambda c: c["what"] == "the order of scale operations"),
    (check_blocks, "blocks", lambda c: c["what"] == "an ulp from ties"),
    (check_blocks, "blocks", lambda c: c["what"] == "a given scale"),
    (check_blocks, "blocks", lambda c: c["format"] == "float8_e4m3fn@2x8" and c["what"] == "columns"),
    (check_blocks, "blocks", lambda c: c["format"] == "float8_e5m2@row" and c["what"] == "columns"),
    (check_blocks, "blocks", lambda c: c["format"] == "mxfp8_e4m3" and c["what"] == "subnormal numbers"),
    (check_blocks, "blocks", lambda c: c["format"] == "nvfp4" and c["what"] == "subnormal numbers"),
    (check_hadamard, "hadamard", lambda c: c["what"] == "another seed"),
]
ADAPTERS = [
    JitAdapter(),
    EagerAdapter(),
    VmapAdapter(),
    FunctionAdapter(),
    FunctionAdapter(unknown=1),
    FunctionAdapter(unknown=2),
    FunctionAdapter(jit_compile=True),
]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_compiled_adapter_gives_the_answers_of_the_oracles_on_a_few_cases(adapter):
    for check, name, chosen in FEW:
        if check is check_hadamard and getattr(adapter, "unknown", 0) == 2:
            continue  # the axis has to be known, to be a multiple of the block
        check(adapter, next(filter(chosen, load(name))))


def hard():
    """float32 of every size, and rows of subnormal numbers."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, (64, 96), dtype=np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(1))
    with np.errstate(all="ignore"):
        x[::4] = np.ldexp(rng.standard_normal((16, 96)), rng.integers(-152, -110, (16, 96)))
        x[1::4] = rng.standard_normal((16, 96))
    return x


def same(got, want):
    assert got.dtype == want.dtype
    raw = f"u{want.dtype.itemsize}"
    equal = (got.view(raw) == want.view(raw)) | (np.isnan(got) & np.isnan(want))
    assert equal.all(), (np.argwhere(~equal)[:5].tolist(), got[~equal][:5], want[~equal][:5])


@pytest.mark.parametrize(("rounding", "key"), [("nearest", None), ("toward_zero", None), ("stochastic", (3, 5, "a"))])
@pytest.mark.parametrize("fmt", ["bfloat16", "float16", "e4m3@tensor", "e5m2@row", "int8@1x16", "nvfp4", "mxfp8"])
def test_numbers_of_every_size_under_a_compiler(fmt, rounding, key):
    # Truncating shows a quotient that is an ulp off, as that by a reciprocal would be.
    x, options = hard(), {"fmt": fmt, "rounding": rounding, "key": key}
    with np.errstate(all="ignore"):
        want = reference(x, **options)
    same(np.asarray(jax.jit(partial(in_jax.quantize, **options))(x)), want)
    same(np.asarray(in_jax.quantize(x, **options)), want)
    function = partial(in_keras.quantize, **options)
    same(array(function(tf.constant(x))), want)
    same(array(tf.function(function)(tf.constant(x))), want)
    same(array(tf.function(function, jit_compile=True)(tf.constant(x))), want)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_transform_of_numbers_of_every_size_under_a_compiler(inverse):
    x = hard()
    x[2::4] = np.where(np.arange(96) % 16 < 2, np.float32(1), x[0])  # sums that cancel to subnormal ones
    with np.errstate(all="ignore"):
        want = transform(x, inverse=inverse)
    for module, run in ((in_jax, jax.jit), (in_keras, tf.function), (in_keras, partial(tf.function, jit_compile=True))):
        same(np.asarray(run(partial(module.hadamard, inverse=inverse))(x)), want)


def test_a_scale_that_is_a_constant_of_the_program_divides():
    x = np.linspace(-3, 3, 4096, dtype=np.float32)
    options = {"fmt": "int8@tensor", "rounding": "toward_zero", "scale": 0.0327}
    want = reference(x, **options)
    same(np.asarray(jax.jit(partial(in_jax.quantize, **options))(x)), want)
    for compiled in (None, True):
        function = tf.function(partial(in_keras.quantize, **options), jit_compile=compiled)
        same(array(function(tf.constant(x))), want)


def test_the_step_may_be_an_array_that_a_program_is_given():
    x = np.linspace(-3, 3, 64, dtype=np.float32)

    def options(step):
        return {"fmt": "bfloat16", "rounding": "stochastic", "key": (1, step, "a")}

    jitted = jax.jit(lambda x, step: in_jax.quantize(x, **options(step)))
    graph = tf.function(lambda x, step: in_keras.quantize(x, **options(step)))
    for step in (0, 7, 2**31 - 1):
        want = reference(x, **options(step))
        same(np.asarray(jitted(x, jnp.int32(step))), want)
        same(array(graph(tf.constant(x), tf.constant(step, tf.int64))), want)
        same(array(in_keras.quantize(x, **options(tf.Variable(step, dtype=tf.int64)))), want)
    words = philox.bits(1, 2**31 + 1, "a", 9)
    assert np.array_equal(jax.jit(lambda step: in_jax.bits(1, step, "a", 9))(jnp.uint32(2**31 + 1)), words)
    assert np.array_equal(in_keras.bits(1, 2**31 + 1, "a", 9), words)


def test_a_function_takes_batches_of_any_size():
    x = hard()
    for fmt in ("mxfp8", "nvfp4_16x16", "e4m3@tensor", "bfloat16"):
        for axis in (0, 1):
            for key in (None, (1, 2, 3)):
                options = {"fmt": fmt, "axis": axis, "rounding": "stochastic" if key else "nearest", "key": key}
                function = tf.function(
                    partial(in_keras.quantize, **options), input_signature=[tf.TensorSpec((None, 96))]
                )
                assert function.get_concrete_function().output_shapes == tf.TensorShape((None, 96))
                for n in (64, 5):
                    with np.errstate(all="ignore"):
                        same(array(function(tf.constant(x[:n]))), reference(x[:n], **options))


@pytest.mark.parametrize("fmt", ["bfloat16", "mxfp8", "e4m3"])
def test_the_gradient_passes_straight_through(fmt):
    x, g = np.float32([[1.1, 2.3, -500.0] * 8]), np.arange(24, dtype=np.float32)[None]
    y, back = jax.vjp(jax.jit(lambda x: in_jax.quantize(x, fmt)), x)
    assert np.array_equal(back(jnp.asarray(g, y.dtype))[0], g)
    tangent = jax.jvp(lambda x: in_jax.quantize(x, fmt), (jnp.asarray(x),), (jnp.asarray(g),))[1]
    assert np.array_equal(tangent, g)
    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = in_keras.quantize(variable, fmt)
    assert np.array_equal(tape.gradient(y, variable, g), g)
    half = jax.grad(lambda x: in_jax.quantize(x, "bfloat16").sum().astype(jnp.float32))(jnp.float16(x))
    assert half.dtype == jnp.float16


@pytest.mark.parametrize("inverse", [False, True])
def test_the_gradient_of_the_transform_is_its_transpose(inverse):
    rng = np.random.default_rng(0)
    x, g = (rng.integers(-8, 8, (3, 32)).astype(np.float32) for _ in "xg")
    matrix = np.asarray(in_jax.hadamard(np.eye(32, dtype=np.float32), inverse=inverse))  # sums of x and g are exact
    want = g @ matrix.T
    assert np.array_equal(jax.vjp(lambda x: in_jax.hadamard(x, inverse=inverse), x)[1](g)[0], want)
    assert np.array_equal(jax.jvp(lambda x: in_jax.hadamard(x, inverse=inverse), (x,), (g,))[1], g @ matrix)
    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = in_keras.hadamard(variable, inverse=inverse)
    assert np.array_equal(tape.gradient(y, variable, g), want)


def test_jax_says_what_float64_needs():
    for x, fmt in ((np.ones(3), "bfloat16"), (np.ones(3, np.float32), "float64")):
        with pytest.raises(ConfigError, match=r'jax.config.update\("jax_enable_x64", True\)'):
            in_jax.quantize(x, fmt)
    with jax.enable_x64(True):
        assert in_jax.quantize(np.ones(3), "bfloat16").dtype == np.float64


@pytest.mark.parametrize("quantize", [in_jax.quantize, in_keras.quantize])
def test_arguments_that_cannot_be_are_refused(quantize):
    with pytest.raises(ConfigError, match="takes float16, bfloat16, float32 or float64 arrays, got int32"):
        quantize(np.arange(3, dtype=np.int32), "bfloat16")
    with pytest.raises(ConfigError, match="a given scale must be positive and finite"):
        quantize(np.ones(3, np.float32), "e4m3@tensor", scale=0.0)
    with pytest.raises(ConfigError, match="stochastic rounding needs key"):
        quantize(np.ones(3, np.float32), "bfloat16", rounding="stochastic")


def test_a_scale_known_only_at_run_time_that_cannot_be_makes_nan():
    x = np.ones(3, np.float32)
    for bad in (0.0, -1.0, np.inf, np.nan):
        got = jax.jit(lambda x, s: in_jax.quantize(x, "e4m3@tensor", scale=s))(x, jnp.float32(bad))
        assert np.isnan(got).all()
        got = tf.function(lambda x, s: in_keras.quantize(x, "e4m3@tensor", scale=s))(tf.constant(x), tf.constant(bad))
        assert np.isnan(got).all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_tensorflow_s_own_conversion_to_bfloat16_is_the_reference_s_on_every_prefix(jit_compile):
    """All 2^16 upper halves with lower halves on both sides of a tie; a compiler may not delete it, either."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper[:, None] | lower).reshape(-1).view(np.float32)
    rounded = tf.function(partial(in_keras.quantize, fmt="bfloat16", overflow="cast"), jit_compile=jit_compile)
    same(rounded(tf.constant(x)).numpy(), reference(x, "bfloat16", overflow="cast"))
