"""Adapters that are each wrong in one plausible way: the kit's checks must tell."""

import numpy as np
import pytest
from checks import FAMILIES, run
from numpy_adapter import NumpyAdapter

from mezzo.formats import get_format, philox, quantize
from mezzo.formats.rounding import round_elements
from mezzo.policy import LossScaling

BROKEN = []  # (family, adapter)


def breaks(*families):
    """Note that the adapter must fail these families."""

    def note(adapter):
        BROKEN.extend((family, adapter) for family in families)
        return adapter

    return note


class Quantizes(NumpyAdapter):
    """`change(x, fmt, y)` makes of the right answer a wrong one, in y's dtype."""

    def quantize(self, x, fmt, **options):
        y = quantize(x, fmt, **options)
        with np.errstate(all="ignore"):
            return np.asarray(self.change(np.asarray(x), fmt, y, options)).astype(y.dtype)

    def change(self, x, fmt, y, options):
        raise NotImplementedError


@breaks("elements")
class TiesAwayFromZero(Quantizes):
    def change(self, x, fmt, y, options):
        if options.get("rounding", "nearest") != "nearest":
            return y
        wide, found = x.astype(np.float64), get_format(fmt)
        if not hasattr(found, "epsilon"):
            return y
        further = round_elements(wide * (1 + 2.0**-50), found, "nearest", options.get("overflow", "saturate"))
        return np.where(np.isnan(y), y, further)


@breaks("elements", "fixed points", "codes")
class E4m3StopsAt240(Quantizes):
    def change(self, x, fmt, y, options):
        return np.clip(y, -240, 240) if fmt == "float8_e4m3fn" else y

    def decode(self, codes, fmt):
        values = super().decode(codes, fmt)
        return np.where(np.abs(values) > 240, np.nan, values).astype(np.float32) if fmt == "float8_e4m3fn" else values


@breaks("elements")
class WrapsInsteadOfSaturating(Quantizes):
    def change(self, x, fmt, y, options):
        whole = np.rint(np.where(np.isfinite(x), x, 0).astype(np.float64))
        return np.where(np.isfinite(x), (whole + 128) % 256 - 128, y) if fmt == "int8" else y


@breaks("elements", "blocks")
class InfinitiesSaturateWhereTheyAreCast(Quantizes):
    def quantize(self, x, fmt, **options):
        return quantize(x, fmt, **options | {"overflow": "saturate"})


@breaks("elements", "fixed points", "stochastic")
class FlushesSubnormals(Quantizes):
    def change(self, x, fmt, y, options):
        smallest = getattr(get_format(fmt), "min_normal", 0)
        return np.where(np.abs(y) < smallest, np.copysign(0, y), y) if fmt != "float8_e8m0fnu" else y


@breaks("elements", "fixed points", "blocks")
class LosesTheSignOfZero(Quantizes):
    def change(self, x, fmt, y, options):
        return y + 0.0


@breaks("elements")
class RoundsFloat64Twice(Quantizes):
    def change(self, x, fmt, y, options):
        return quantize(x.astype(np.float32), fmt, **options) if x.dtype == np.float64 else y


@breaks("elements", "blocks")
class MakesZeroOfNan(Quantizes):
    def change(self, x, fmt, y, options):
        return np.where(np.isnan(y), 0, y)


@breaks("stochastic")
class TruncatesInsteadOfDrawing(NumpyAdapter):
    def quantize(self, x, fmt, *, key=None, rounding="nearest", **options):
        return quantize(x, fmt, rounding="nearest" if key is None else "toward_zero", **options)


@breaks("stochastic")
class RoundsUpOneWordTooOften(Quantizes):
    """word <= fraction · 2**32 where word < fraction · 2**32 is meant."""

    def change(self, x, fmt, y, options):
        found, key = get_format(fmt), options.get("key")
        if key is None or not hasattr(found, "epsilon") or x.dtype != np.float64:
            return y
        gap = np.ldexp(1.0, np.frexp(x)[1] - 1 - found.mantissa_bits)
        return quantize(x + np.copysign(gap * 2.0**-32, x), fmt, **options)


@breaks("stochastic")
class DrawsAnotherStep(Quantizes):
    def change(self, x, fmt, y, options):
        seed, step, site = options.get("key") or (0, 0, 0)
        return quantize(x, fmt, **options | {"key": (seed, step + 1, site)}) if options.get("key") else y


@breaks("codes")
class EncodesWithABiasOf8(NumpyAdapter):
    """As e4m3fnuz, the variant with one zero."""

    def encode(self, x, fmt):
        return super().encode(np.asarray(x) * 2 if fmt == "float8_e4m3fn" else x, fmt)


@breaks("codes")
class DecodesTheTopOfE5m2AsNumbers(NumpyAdapter):
    def decode(self, codes, fmt):
        y = super().decode(codes, fmt)
        return np.where(np.isnan(y), np.float32(2.0**16), y) if fmt == "float8_e5m2" else y


@breaks("blocks")
class FloorsTheScaleThatIsRoundedUp(NumpyAdapter):
    def quantize(self, x, fmt, **options):
        return quantize(x, f"{fmt}+floor" if fmt.startswith("mxf") and "+" not in fmt else fmt, **options)


@breaks("blocks")
class RoundsUpTheScaleThatIsFloored(NumpyAdapter):
    def quantize(self, x, fmt, **options):
        return quantize(x, fmt.removesuffix("+floor"), **options)


@breaks("blocks")
class TakesBlocksAlongTheLastAxis(NumpyAdapter):
    def quantize(self, x, fmt, *, axis=-1, **options):
        return quantize(x, fmt, **options)


@breaks("blocks")
class DividesByAScaleOfZero(Quantizes):
    def change(self, x, fmt, y, options):
        return np.full_like(y, np.nan) if "@" in fmt and not x.any() else y


@breaks("blocks")
class HidesAnInfinityBehindTheLargestValue(NumpyAdapter):
    def quantize(self, x, fmt, **options):
        finite = np.clip(x, -3e38, 3e38) if "@" in fmt or fmt.startswith(("mx", "nv")) else x
        return quantize(finite, fmt, **options)


class Nvfp4(Quantizes):
    """NVFP4 of rows whose length is a multiple of 16, with one step of the scales left to `scales` or `finish`."""

    def change(self, x, fmt, y, options):
        if fmt != "nvfp4" or x.ndim != 2 or x.shape[1] % 16 or options.get("axis", -1) != -1:
            return y
        blocks, one = x.astype(np.float32).reshape(-1, 16), np.float32(1)
        encode = np.float32(2688) / np.abs(blocks).max()
        tensor = one / encode
        amax = np.abs(blocks).max(axis=1, keepdims=True)
        scale = quantize(self.scale(amax, encode, tensor), "float8_e4m3fn")
        return self.finish(blocks, scale, tensor).reshape(x.shape)

    def scale(self, amax, encode, tensor):
        return amax / np.float32(6) * encode

    def finish(self, blocks, scale, tensor):
        return quantize(blocks * (np.float32(1) / (scale * tensor)), "float4_e2m1fn") * scale * tensor


@breaks("blocks")
class Nvfp4DividesByTheScales(Nvfp4):
    def finish(self, blocks, scale, tensor):
        return quantize(blocks / (scale * tensor), "float4_e2m1fn") * scale * tensor


@breaks("blocks")
class Nvfp4MultipliesAmaxFirst(Nvfp4):
    def scale(self, amax, encode, tensor):
        return amax * encode / np.float32(6)


@breaks("blocks")
class Nvfp4MultipliesTheScalesFirst(Nvfp4):
    def finish(self, blocks, scale, tensor):
        return quantize(blocks * (np.float32(1) / (scale * tensor)), "float4_e2m1fn") * (scale * tensor)


@breaks("blocks")
class Nvfp4WithoutATensorScale(Nvfp4):
    def change(self, x, fmt, y, options):
        return quantize(x, "float4_e2m1fn@1x16", **options) if fmt == "nvfp4" else y


@breaks("block codes")
class ScaleCodesOffByOne(NumpyAdapter):
    def encode_scaled(self, x, fmt, *, axis=-1):
        codes, scales, tensor_scale = super().encode_scaled(x, fmt, axis=axis)
        return codes, scales + np.ones((), scales.dtype), tensor_scale


@breaks("block codes")
class PacksTwoElementsInOtherOrder(NumpyAdapter):
    def encode_scaled(self, x, fmt, *, axis=-1):
        codes, scales, tensor_scale = super().encode_scaled(x, fmt, axis=axis)
        return (codes << 4 | codes >> 4) if fmt == "nvfp4" else codes, scales, tensor_scale


@breaks("philox")
class PhiloxOfSevenRounds(NumpyAdapter):
    def bits(self, seed, step, site, count):
        number = philox.site_id(site) if isinstance(site, str) else site
        counter = [[i, 0, step, number] for i in range(-(-count // 4))]
        return philox.philox4x32(counter, [seed & 0xFFFFFFFF, seed >> 32], rounds=7).reshape(-1)[:count]


@breaks("philox")
class PhiloxWithASeedOf32Bits(NumpyAdapter):
    def bits(self, seed, step, site, count):
        return super().bits(seed & 0xFFFFFFFF, step, site, count)


@breaks("hadamard")
class HadamardWithoutSigns(NumpyAdapter):
    def hadamard(self, x, *, axis=-1, block=16, seed=0, inverse=False):
        # Undoing the signs of the inverse's end, or of the start, leaves the plain matrix, which is its own inverse.
        return super().hadamard(super().hadamard(x, axis=axis, block=block, seed=seed), axis=axis, block=block)


@breaks("hadamard")
class HadamardThatForgetsItsInverse(NumpyAdapter):
    def hadamard(self, x, *, inverse=False, **options):
        return super().hadamard(x, **options)


@breaks("hadamard")
class HadamardByAMatrixProduct(NumpyAdapter):
    """In another order of the sums."""

    def hadamard(self, x, *, axis=-1, block=16, **options):
        matrix = super().hadamard(np.eye(block, dtype=x.dtype), block=block, **options)
        moved = np.moveaxis(x, axis, -1)
        y = np.zeros((moved.size // block, block), x.dtype)
        for i in range(block):
            y = y + moved.reshape(-1, block)[:, i : i + 1] * matrix[i]
        return np.moveaxis(y.reshape(moved.shape), -1, axis)


@breaks("products")
class LeavesTheGradientUnrounded(NumpyAdapter):
    def product(self, a, b, g, formats, route):
        return super().product(a, b, g, formats | {"dgrad.a": "float32", "wgrad.a": "float32"}, route)


@breaks("products")
class LeavesTheResultUnrounded(NumpyAdapter):
    def result(self, y, fmt):
        return y


@breaks("products")
class RoundsTheWeightOnceAndTransposesIt(NumpyAdapter):
    def operand(self, x, fmt, axis):
        return super().operand(x, fmt, 1)


@breaks("products")
class SumsIn16Bits(NumpyAdapter):
    def result(self, y, fmt):
        return super().result(quantize(y, "bfloat16"), fmt)


@breaks("products")
class ForgetsThatTheGradientHas16Bits(NumpyAdapter):
    """The incoming gradient of a 16-bit result has its 16 bits, whatever the gradient's own format."""

    def product(self, a, b, g, formats, route):
        wide = super().product(a, b, g, formats | {"fprop.out": "float32"}, route)
        return wide | {"fprop": super().product(a, b, g, formats, route)["fprop"]}


class Scaler(NumpyAdapter):
    changed: dict[str, float] = {}  # noqa: RUF012

    def loss_scales(self, scaling, overflows):
        return super().loss_scales(scaling | self.changed, overflows)


@breaks("loss scale")
class HalvesBelowTheFloor(Scaler):
    changed = {"floor": 2.0**-100}  # noqa: RUF012


@breaks("loss scale")
class DoublesBeyondTheCeiling(Scaler):
    changed = {"ceiling": 2.0**100}  # noqa: RUF012


@breaks("loss scale")
class ForgetsTheHysteresis(Scaler):
    changed = {"hysteresis": 1}  # noqa: RUF012


@breaks("loss scale")
class CountsGoodStepsAcrossOverflows(NumpyAdapter):
    def loss_scales(self, scaling, overflows):
        interval, good, states = LossScaling(**scaling).growth_interval, 0, []
        for overflow, (scale, _, bad, at_floor) in zip(overflows, super().loss_scales(scaling, overflows), strict=True):
            good = (good + (not overflow)) % interval
            states.append((scale, good, bad, at_floor))
        return states


@pytest.mark.parametrize(("family", "broken"), BROKEN, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_broken_adapter_is_told(family, broken):
    with pytest.raises(AssertionError):
        run(broken(), family)


def test_every_family_has_an_adapter_that_fails_it():
    assert {family for family, _ in BROKEN} == set(FAMILIES)


def test_the_template_that_broken_nvfp4_changes_is_right_itself():
    run(Nvfp4(), "blocks")
