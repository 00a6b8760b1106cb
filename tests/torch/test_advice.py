"""What is said before training: errors that the backward pass would meet, and advice about formats and shapes."""

import pytest
import torch
from torch import nn

from mezzo import hardware
from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, SCALED, get_format
from mezzo.policy import Policy, Site, Spec
from mezzo.torch import Precision
from mezzo.torch.advice import GRADIENTS, Operand, advise, operands

TURNED = "bf16; *:wgrad.a=mxfp4 stochastic hadamard=64; *:wgrad.b=mxfp4 hadamard=64"


def stack(d_in=64, hidden=64, d_out=64):
    return nn.Sequential(nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, d_out))


# --- Hadamard blocks ---


def gradients(policy, rows, sizes=(64, 64, 64)):
    torch.manual_seed(0)
    model = stack(*sizes)
    precision = Precision(model, None, policy)
    x = torch.randn(rows, sizes[0], generator=torch.Generator().manual_seed(1))
    g = torch.randn(rows, sizes[2], generator=torch.Generator().manual_seed(2))
    precision.backward((model(x) * g).sum())
    return [p.grad for p in model.parameters()]


def test_a_short_block_of_rows_is_one_filled_with_zeros():
    """Rows of zeros in both operands add nothing: the gradient is the same to the bit with them and without."""
    x, g = torch.randn(100, 64), torch.randn(100, 32)
    found = []
    for fill in (0, 28):
        torch.manual_seed(0)
        layer = nn.Linear(64, 32, bias=False)
        precision = Precision(layer, None, TURNED)
        a, b = (torch.cat([t, t.new_zeros(fill, t.shape[1])]) for t in (x, g))
        precision.backward((layer(a) * b).sum())
        found.append(layer.weight.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(("product", "sizes"), [("fprop", (72, 64, 60)), ("dgrad", (64, 72, 60)), ("wgrad", (9, 5, 3))])
def test_a_transform_of_any_length_changes_a_product_by_rounding_alone(product, sizes):
    """bfloat16 operands err by 2**-9 each; those of the transform by as much again, on sums of the same size."""
    plain = gradients("bf16", 37, sizes)
    turned = gradients(f"bf16; *:{product}.?=bf16 hadamard", 37, sizes)
    for a, b in zip(plain, turned, strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 1 - 2.0**-8
    assert not all(map(torch.equal, plain, turned))


# --- the pure function ---


def one(role="fprop.a", spec="bf16", along=64, across=64, path="up", **more):
    return Operand(Site(path, role), Spec.parse(spec), along, across, **more)


def texts(*found, device="cpu", loss_scaling=False):
    return advise(found, device=device, loss_scaling=loss_scaling)


@pytest.mark.parametrize(
    ("spec", "along", "across", "block", "length"),
    [
        ("mxfp8", 40, 64, 32, 40),
        ("nvfp4", 24, 1, 16, 24),
        ("nvfp4_16x16", 32, 24, 16, 24),
        ("e4m3@1x128", 192, 3, 128, 192),
        ("e4m3@128x128", 100, 128, 128, 100),
    ],
)
def test_a_block_that_does_not_divide_its_axis_is_advised_against(spec, along, across, block, length):
    assert texts(one(spec=spec, along=along, across=across)) == [
        f"up:fprop.a: blocks of {block} do not divide {length} elements, so the last one is short; mezzo emulates "
        f"that, but matrix units take whole blocks: make the size a multiple of {block}, or take a format without "
        "blocks, as with the rule up:fprop.a=bfloat16"
    ]
    assert texts(one(spec=spec, along=128, across=128)) == []


@pytest.mark.parametrize("spec", ["bf16", "e4m3@tensor", "e4m3@row", "int8"])
def test_without_blocks_any_size_is_well(spec):
    assert texts(one(spec=spec, along=7, across=3)) == []


NARROW = [fmt.name for fmt in FORMATS.values() if fmt.bits <= 8 and not fmt.is_scale and not fmt.is_integer]


@pytest.mark.parametrize("role", GRADIENTS)
@pytest.mark.parametrize("name", NARROW)
def test_gradients_want_a_scale_below_16_bits(role, name):
    (text,) = texts(one(role, name), loss_scaling=True)
    fmt = get_format(name)
    assert text.startswith(f"up:{role}: {name} without a scale holds {fmt.min_subnormal:.3g} to {fmt.max:g}, and gradi")
    better = Spec.parse(text.rpartition(f"up:{role}=")[2])
    assert better.fmt.element == fmt
    assert texts(one(role, str(better))) == texts(one("fprop.a", name)) == []


@pytest.mark.parametrize("spec", ["int8", "int8@row", "int8@1x32+pow2", "int8@tensor stochastic"])
def test_gradients_want_steps_that_are_not_even(spec):
    (text,) = texts(one("wgrad.a", spec))
    name = spec.split()[0]
    assert text == (
        f"up:wgrad.a: the steps of {name} are evenly spaced, and gradients span many powers of two: the small ones "
        "become zero; give them a floating-point format, as with the rule up:wgrad.a=float8_e5m2@tensor"
    )
    assert texts(one("wgrad.b", spec)) == []


@pytest.mark.parametrize("role", GRADIENTS)
def test_float16_gradients_want_a_loss_scale(role):
    (text,) = texts(one(role, "fp16"))
    assert text == (
        f"up:{role}: float16 holds nothing between zero and 5.96e-08, and gradients are often smaller; add "
        f"loss_scale=dynamic to the policy, or give them float32's range, as with the rule up:{role}=bfloat16"
    )
    assert texts(one(role, "fp16"), loss_scaling=True) == texts(one(role)) == texts(one("fprop.a", "fp16")) == []


@pytest.mark.parametrize("spec", [*SCALED, "bf16", "fp32", "e5m2@row"])
def test_formats_that_gradients_are_trained_in_need_no_advice(spec):
    assert texts(*(one(role, spec) for role in GRADIENTS)) == []


def test_small_float8_products_are_advised_against_where_they_are_native():
    small, large = (one(spec="e4m3@tensor", float8=n, path=f"p{n}") for n in (1024, 4096))
    assert texts(small, large, device="cuda") == [
        "p1024:fprop.a: float8 products with a side below 4,096 (here 1,024) can be slower than bfloat16's; measure "
        "both, and leave small layers in bfloat16, as with the rule p1024:*=bfloat16"
    ]
    assert texts(small, device="cpu") == texts(one(spec="e4m3@tensor"), device="cuda") == []


def test_one_line_says_what_is_emulated():
    found = [one(spec=name, native=False) for name in ("nvfp4", "bf16", "nvfp4", "fp32", "fp64")]
    assert texts(*found) == [
        "emulated on this CPU: nvfp4, bfloat16. The numbers are those of the formats, the time is that of an "
        "emulation; `mezzo probe` shows what runs natively here"
    ]
    assert texts(*found, device="cuda")[0].startswith("emulated on this GPU: nvfp4")


def test_many_sites_that_say_the_same_are_named_by_patterns():
    found = [
        one(role, "fp16", path=f"blocks.{block}.{layer}")
        for block in range(12) for layer in ("qkv", "up", "down") for role in ("dgrad.a", "wgrad.a")
    ]  # fmt: skip
    (text,) = texts(*found, one("dgrad.a", "fp16", path="head"))
    assert text.startswith(
        "blocks.*.qkv:dgrad.a (12 sites), blocks.*.qkv:wgrad.a (12 sites), blocks.*.up:dgrad.a (12 sites) and 4 more "
        "like these: float16 holds nothing"
    )
    (text,) = texts(one("dgrad.a", "fp16", path="0"), one("dgrad.a", "fp16", path="1"))
    assert text.startswith("0:dgrad.a, 1:dgrad.a: float16"), "the pattern * would mean every path"
    (text,) = texts(one("dgrad.a", "fp16", path="blocks.0.up"), one("dgrad.a", "fp16", path="layer2.up"))
    assert text.startswith("blocks.0.up:dgrad.a, layer2.up:dgrad.a: float16")


# --- what a model gives it ---


def met(model, policy, *example):
    precision = Precision(model, None, policy)
    precision.sites(*example)
    return {(str(o.site), o.along, o.across) for o in operands(precision._seen.values(), precision.mode.table)}


def test_each_operand_of_a_linear_layer_knows_its_axes():
    assert met(nn.Sequential(nn.Linear(3, 5)), "bf16", torch.ones(2, 7, 3)) == {
        ("0:fprop.a", 3, 14), ("0:fprop.b", 3, 5), ("0:dgrad.a", 5, 14), ("0:dgrad.b", 5, 3), ("0:wgrad.a", 14, 5),
        ("0:wgrad.b", 14, 3),
    }  # fmt: skip


class Apply(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, *args):
        return self.op(*args)


def test_each_factor_of_a_product_knows_its_axes():
    found = met(Apply(torch.matmul), "bf16", torch.ones(9, 2, 3), torch.ones(9, 3, 5))
    assert found == {
        ("(model):fprop.a", 3, 2), ("(model):fprop.b", 3, 5), ("(model):dgrad.a", 5, 2), ("(model):dgrad.b", 5, 3),
        ("(model):wgrad.a", 2, 5), ("(model):wgrad.b", 2, 3),
    }  # fmt: skip


def test_each_tensor_of_attention_knows_its_axes():
    q, k, v = torch.ones(1, 2, 5, 8), torch.ones(1, 2, 7, 8), torch.ones(1, 2, 7, 4)
    sdpa = Apply(nn.functional.scaled_dot_product_attention)
    found = {
        ("(model):fprop.query", 8, 5), ("(model):fprop.key", 8, 7), ("(model):fprop.value", 7, 4),
        ("(model):dgrad.dout", 4, 5),
    }  # fmt: skip
    assert met(sdpa, "bf16", q, k, v) == found
    sdpa = Apply(nn.functional.scaled_dot_product_attention)
    assert met(sdpa, "bf16; *:fprop.probs=bf16", q, k, v) == found | {("(model):fprop.probs", 7, 5)}


def test_axes_are_those_that_the_roundings_take_their_blocks_along(monkeypatch):
    """Held against the roundings themselves: (size of the axis, role) of every one, forward and backward."""
    from mezzo.torch import table

    heard = []
    real = table.SiteSpec._round

    def listening(self, role, x, axis):
        heard.append((f"{self.path}:{role}", x.shape[axis]))
        return real(self, role, x, axis)

    monkeypatch.setattr(table.SiteSpec, "_round", listening)
    model = nn.Sequential(nn.Linear(24, 40, bias=False))
    policy = "bf16; *:input=mxfp8; *:weight=mxfp8; *:grad_output=mxfp8"
    expected = {(site, along) for site, along, _ in met(model, policy, torch.ones(3, 24))}
    heard.clear()
    model(torch.ones(3, 24, requires_grad=True)).sum().backward()
    assert {pair for pair in heard if not pair[0].endswith("out")} == expected


@pytest.mark.usefixtures("slow_16_bits")
def test_a_users_own_model_is_advised_before_its_first_step():
    precision = Precision(stack(48, 64, 10), None, "mxfp8")
    with pytest.raises(ConfigError, match="no forward pass seen yet"):
        precision.advice()
    advice = precision.advice(torch.ones(64, 48))
    assert "output head" in advice[0]
    assert [text.partition(": ")[0] for text in advice[1:]] == [
        "0:fprop.a, 0:fprop.b", "2:dgrad.a, 2:dgrad.b", "emulated on this CPU",
    ]  # fmt: skip
    assert precision.advice() == advice
    assert Precision(stack(), None, "fp32").advice(torch.ones(64, 64)) == []


def test_float8_that_is_native_is_not_called_emulated(monkeypatch):
    rates = {"float32": 1.0, "bfloat16": 10.0, "float16": 10.0, "float8": 20.0}
    fast = hardware.Hardware("cuda", "a test", rates, 10.0, "test")
    monkeypatch.setattr(hardware, "measure", lambda *_, **__: fast)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    precision = Precision(model, None, "fp8; 1:*=bf16")
    precision.table(precision.policy)
    for module, (out, into) in ((0, (32, 16)), (1, (8, 32))):
        precision._seen[(str(module), "linear")] = _linear(str(module), (64, into), (out, into))
    found = operands(precision._seen.values(), precision.mode.table)
    assert {o.site.path: o.float8 for o in found} == {"0": 16, "1": 0}
    assert all(o.native for o in found)
    (text,) = advise(found, device="cuda", loss_scaling=False)
    assert text.startswith("0:fprop.a, 0:fprop.b, 0:dgrad.a and 3 more like these: float8 products with a side below")


def _linear(path, x, w):
    from mezzo.torch.intercept import Seen

    return Seen(path, "linear", (x, w), torch.float32, torch.device("cpu"), (x[0], w[0]))


def test_rules_in_the_advice_are_rules_that_help():
    """Each text ends with a rule; put on top of the policy, that text is gone."""
    policy = "fp16; loss_scale=none; *:wgrad.a=int8@row; *:dgrad.a=e4m3; *:fprop.a=mxfp8"
    for _ in range(20):
        model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 64))
        advice = [text for text in Precision(model, None, policy).advice(torch.ones(64, 40)) if "rule" in text]
        if not advice:
            break
        rule = advice[0].rpartition("with the rule ")[2]
        policy = str(Policy.parse(f"{policy}; {rule}"))
    assert not advice
    assert len(Policy.parse(policy).rules) > 3


def test_a_model_without_a_head_by_that_name_is_told_so():
    named, unnamed = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    named.add_module("lm_head", nn.Linear(64, 64))
    x = torch.ones(64, 64)
    assert not any("output head" in text for text in Precision(named, None, "mxfp8").advice(x))
    told = Precision(unnamed, None, "mxfp8").advice(x)[0]
    assert told.startswith("mxfp8 keeps the output head in bfloat16, and no module here has a name that ends in head")
    assert not any("output head" in text for text in Precision(nn.Linear(64, 64), None, "bf16").advice(x))
