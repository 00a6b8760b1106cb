"""One check for each family of cases: it raises AssertionError where an adapter's answer is not the case's."""

import hashlib
import json
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

CASES = Path(__file__).parent / "cases"
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@cache
def load(name):
    return json.loads((CASES / f"{name}.json").read_text())


def unhex(text, shape=None):
    """The array that generate.py wrote."""
    dtype, *numbers = text.split(" ")
    dtype = np.dtype(getattr(ml_dtypes, dtype) if dtype in HALVES and dtype != "float16" else dtype)
    x = np.array([int(n, 16) for n in numbers], f"u{dtype.itemsize}").view(dtype)
    return x.reshape(shape) if shape is not None else x


def same(got, want, what):
    """The same bits, once both are in want's dtype, which holds them; every NaN is like every other."""
    got = np.asarray(got)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    with np.errstate(invalid="ignore"):  # a signalling NaN is quieted
        wide = got.astype(want.dtype)
        assert np.array_equal(wide.astype(np.float64), got.astype(np.float64), equal_nan=True), what
    raw = f"u{want.dtype.itemsize}"
    equal = (wide.view(raw) == want.view(raw)) | (np.isnan(wide) & np.isnan(want))
    assert equal.all(), (what, np.argwhere(~equal)[:3].tolist(), wide[~equal][:3], want[~equal][:3])


def values_of(case):
    """(codes, float32 values) of all codes of a format."""
    if "values" in case:
        values = unhex(case["values"])
        return np.arange(values.size, dtype=np.uint8), values
    codes = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        return codes, codes.view(HALVES[case["format"]]).astype(np.float32)


def check_codes(adapter, case):
    """Every code decodes to its value, and every value encodes to its code; NaN to some code of NaN."""
    fmt = case["format"]
    codes, values = values_of(case)
    decoded = np.asarray(adapter.decode(codes, fmt))
    same(decoded, values, fmt)
    if "sha256" in case:
        plain = np.where(np.isnan(decoded), np.float32(np.nan), decoded).astype("<f4")
        assert hashlib.sha256(plain.tobytes()).hexdigest() == case["sha256"], fmt
    encoded, nan = np.asarray(adapter.encode(values, fmt)), np.isnan(values)
    # An infinite value saturates unless it is cast, so it is not asked for here; elements.json does.
    known = ~nan & np.isfinite(values)
    assert np.array_equal(encoded[known], codes[known]), (fmt, "encode")
    assert np.isnan(np.asarray(adapter.decode(encoded[nan], fmt))).all(), (fmt, "NaN")


def check_fixed_points(adapter, case):
    """No rounding moves what the format holds: not a value, an infinity, a signed zero or NaN."""
    fmt = case["format"]
    values = np.unique(values_of(case)[1].view(np.uint32)).view(np.float32)
    finite = values[np.isfinite(values)]
    for rounding, key in (("nearest", None), ("toward_zero", None), ("stochastic", (1, 2, "fixed"))):
        same(adapter.quantize(values, fmt, rounding=rounding, overflow="cast", key=key), values, (fmt, rounding))
        same(adapter.quantize(finite, fmt, rounding=rounding, key=key), finite, (fmt, rounding, "saturate"))


def check_elements(adapter, case):
    x = unhex(case["x"])
    for how, answer in case["y"].items():
        rounding, overflow = how.split(" ")
        got = np.asarray(adapter.quantize(x, case["format"], rounding=rounding, overflow=overflow))
        what = case["format"], x.dtype.name, how
        assert got.dtype.name == case["dtype"], (what, got.dtype.name, case["dtype"])
        same(got.astype(np.float32), unhex(answer), what)


def check_stochastic(adapter, case):
    x, y = unhex(case["x"], case.get("shape")), unhex(case["y"], case.get("shape"))
    got = adapter.quantize(x, case["format"], rounding="stochastic", key=tuple(case["key"]))
    same(got, y, case["format"])


def check_blocks(adapter, case):
    x, y = (unhex(case[field], case["shape"]) for field in "xy")
    options = {"axis": case.get("axis", -1), "overflow": case.get("overflow", "saturate"), "scale": case.get("given")}
    got = np.asarray(adapter.quantize(x, case["format"], **options))
    assert got.dtype == y.dtype, (case["format"], case["what"], got.dtype)
    same(got, y, (case["format"], case["what"]))


def check_block_codes(adapter, case):
    """Codes of elements and of scales; a group that is not finite has a NaN for its scale and codes of 0."""
    if "codes" not in case:
        return
    x, what = unhex(case["x"], case["shape"]), (case["format"], case["what"])
    codes, scales, tensor_scale = adapter.encode_scaled(x, case["format"], axis=case.get("axis", -1))
    wanted = unhex(case["scales"], case["scales_shape"])
    assert np.array_equal(codes, unhex(case["codes"], case["shape"])), (what, "codes")
    assert np.asarray(scales).dtype == wanted.dtype, (what, "dtype of the scales")
    if wanted.dtype == np.float32:
        same(scales, wanted, (what, "scales"))
    else:
        assert np.array_equal(scales, wanted), (what, "scales", scales, wanted)
    assert (tensor_scale is None) == ("tensor_scale" not in case), what
    if tensor_scale is not None:
        same(np.float32(tensor_scale).reshape(1), unhex(case["tensor_scale"]), (what, "tensor scale"))


def check_philox(adapter, case):
    want = unhex(case["words"])
    got = np.asarray(adapter.bits(*case["key"], want.size))
    assert np.array_equal(got.astype(np.uint32), want), case["key"]


def check_hadamard(adapter, case):
    x, y = (unhex(case[field], case["shape"]) for field in "xy")
    got = np.asarray(adapter.hadamard(x, **case["options"]))
    assert got.dtype == y.dtype, (case["what"], got.dtype)
    same(got, y, case["what"])


def check_products(adapter, case):
    rows, inputs, outputs = case["shape"]
    a, b, g = (unhex(case[n], shape) for n, shape in
               (("a", (rows, inputs)), ("b", (outputs, inputs)), ("g", (rows, outputs))))  # fmt: skip
    for route in case["routes"]:
        if route not in adapter.routes():
            continue
        got = adapter.product(a, b, g, case["formats"], route)
        for product, shape in (("fprop", g.shape), ("dgrad", a.shape), ("wgrad", b.shape)):
            what = case["what"], route, product
            result, want = np.asarray(got[product]), case[product]
            assert result.dtype == np.float32, (what, result.dtype)
            assert result.shape == shape, (what, result.shape)
            off = np.abs(result.astype(np.float64) - unhex(want["exact"], shape))
            ratio = off / np.array(want["within"]).reshape(shape)
            assert (ratio <= 1).all(), (what, float(ratio.max()))
            out = case["formats"][f"{product}.out"]
            if out in HALVES:
                same(result.astype(HALVES[out]).astype(np.float32), result, (what, "is rounded to its format"))


def check_loss_scale(adapter, case):
    states = adapter.loss_scales(case["scaling"], case["overflows"])
    assert len(states) == len(case["states"])
    for step, (got, want) in enumerate(zip(states, case["states"], strict=True)):
        assert list(got) == want, (case["scaling"], f"after step {step + 1}", got, want)


# family → (file of cases, check)
FAMILIES = {
    "codes": ("codes", check_codes),
    "fixed points": ("codes", check_fixed_points),
    "elements": ("elements", check_elements),
    "stochastic": ("stochastic", check_stochastic),
    "blocks": ("blocks", check_blocks),
    "block codes": ("blocks", check_block_codes),
    "philox": ("philox", check_philox),
    "hadamard": ("hadamard", check_hadamard),
    "products": ("products", check_products),
    "loss scale": ("loss_scale", check_loss_scale),
}


def run(adapter, family):
    """Hold an adapter against all cases of a family."""
    name, check = FAMILIES[family]
    for case in load(name):
        check(adapter, case)
