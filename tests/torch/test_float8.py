"""The native route of float8: torch's own product of float8 tensors, which its CPU build has too (slowly)."""

import pytest
import torch
from torch import nn

from mezzo import hardware
from mezzo.hardware import Hardware
from mezzo.policy import Policy
from mezzo.torch import Precision, float8
from mezzo.torch.float8 import encode, fits, scaled_mm
from mezzo.torch.quantize import quantize
from mezzo.torch.scales import Scales
from mezzo.torch.table import Hooks, Table

HAS = Hardware("cpu", "with float8", {"float32": 1.0, "bfloat16": 0.1, "float8": 2.0}, 1.0, "test")
LACKS = Hardware("cpu", "without", {"float32": 1.0}, 1.0, "test")
U = 2.0**-24
# What comes back to a layer with a 16-bit result has been rounded to those 16 bits already; here nothing else is.
EXACT = "fp8; *:out=float32"


def layer_under(monkeypatch, machine, policy, sizes=(48, 32), bias=False):
    monkeypatch.setattr(hardware, "measure", lambda *_, **__: machine)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(*sizes, bias=bias))
    return layer, Precision(layer, torch.optim.SGD(layer.parameters(), lr=0.1), policy)


def run(monkeypatch, machine, policy, rows=64, **more):
    layer, precision = layer_under(monkeypatch, machine, policy, **more)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, layer[0].in_features, generator=g).requires_grad_()
    heard = {}
    with precision.tap(lambda site, before, after: heard.setdefault(site.role, after.detach().clone())):
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=g))
    bias = layer[0].bias
    return (
        {"fprop": y.detach(), "dgrad": x.grad, "wgrad": layer[0].weight.grad},
        heard,
        None if bias is None else bias.grad,
    )


@pytest.mark.parametrize("policy", [EXACT, "fp8; *:out=bfloat16; *:wgrad.out=float32", "fp8; *:wgrad.a=e4m3@tensor"])
@pytest.mark.parametrize(("rows", "sizes"), [(64, (48, 32)), (17, (33, 5)), (1, (16, 16))])
def test_the_native_product_agrees_with_the_emulated_one_within_the_bound(monkeypatch, policy, rows, sizes):
    """Same operands to the bit. Each sum of K products is off by at most K u of the sum of magnitudes, u = 2**-24, the
    scales' products add 3 roundings, and a 16-bit result may differ by a unit in the last place beside a tie."""
    calls = []
    monkeypatch.setattr(float8, "scaled_product", lambda *args: calls.append(1) or hardware.scaled_product(*args))
    native, operands, _ = run(monkeypatch, HAS, policy, rows, sizes=sizes)
    assert len(calls) == 3
    emulated, same, _ = run(monkeypatch, LACKS, policy, rows, sizes=sizes)
    for role in ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b"):
        assert torch.equal(operands[role], same[role]), role
    a, b = same["fprop.a"].abs(), same["fprop.b"].abs()
    g_d, g_w = same["dgrad.a"].abs(), same["wgrad.a"].abs()
    sums = {"fprop": (a @ b.T, sizes[0]), "dgrad": (g_d @ b, sizes[1]), "wgrad": (g_w.T @ a, rows)}
    ulp = {"fprop": 2.0**-7 if "out=bfloat16" in policy or policy.startswith("fp8; *:wgrad") else 0.0, "wgrad": 0.0}
    ulp["dgrad"] = ulp["fprop"]
    for product, (absolute, terms) in sums.items():
        bound = (2 * terms + 3) * U * absolute + ulp[product] * emulated[product].abs() + 1e-30
        assert ((native[product] - emulated[product]).abs() <= bound).all(), product
    assert len(calls) == 3, "none when emulated"


def test_a_bias_is_added_before_the_result_is_rounded(monkeypatch):
    native, _, bias = run(monkeypatch, HAS, EXACT, bias=True)
    emulated, _, same = run(monkeypatch, LACKS, EXACT, bias=True)
    assert torch.allclose(native["fprop"], emulated["fprop"], rtol=1e-5, atol=1e-6)
    assert torch.allclose(bias, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_codes_times_scale_are_what_quantize_gives(element):
    policy = f"fp32; *:fprop.a={element}@tensor"
    spec = Table(Policy.parse(policy), frozenset({"float8"}), Hooks(), Scales(0, torch.device("cpu"))).product("x", 0)
    g = torch.Generator().manual_seed(0)
    for factor in (1.0, 2.0**-140, 2.0**120):
        x = torch.randn(40, 60, generator=g) * torch.exp2(torch.randint(-12, 8, (40, 1), generator=g)) * factor
        codes, scale = encode(spec, "fprop.a", x)
        assert codes.element_size() == 1
        assert torch.equal(codes.float() * scale, quantize(x, f"{element}@tensor"))
    codes, scale = encode(spec, "fprop.a", torch.zeros(16, 16))
    assert torch.equal(codes.float() * scale, torch.zeros(16, 16))
    x[3, 4] = torch.inf
    codes, scale = encode(spec, "fprop.a", x)
    assert (codes.float() * scale).isnan().all()


def test_sizes_that_are_no_multiple_of_16_are_filled_with_zeros():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 37, generator=g).to(torch.float8_e4m3fn) for n in (9, 21))
    one = torch.ones(())
    got = scaled_mm(a, b.t(), one, one, torch.float32)
    assert got.shape == (9, 21)
    assert torch.allclose(got, a.float() @ b.float().t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "native"),
    [("fp8", True), ("fp8; *:fprop.a=e4m3@tensor delayed", True), ("fp8-row", False), ("mxfp8", False), ("bf16", False),
     ("fp8; *:fprop.a=e5m2@tensor; *:fprop.b=e5m2@tensor", False), ("fp8; *:wgrad.a=e5m2@tensor stochastic", False),
     ("fp8; *:wgrad.b=bfloat16", False)],
)  # fmt: skip
def test_the_route_is_native_where_all_three_products_can_be(monkeypatch, policy, native):
    layer, precision = layer_under(monkeypatch, HAS, policy)
    assert fits(precision.mode.table.product("0", 0)) == native
    routes = {row.site: row.route for row in precision.sites(torch.randn(16, 48))}
    for role in ("fprop.a", "dgrad.b", "wgrad.out"):
        assert (routes[f"0:{role}"] == "native") == native
    del layer
    _, precision = layer_under(monkeypatch, LACKS, policy)
    assert not fits(precision.mode.table.product("0", 0))


def test_manifests_name_the_route(monkeypatch):
    assert layer_under(monkeypatch, HAS, "fp8")[1].routes["float8_e4m3fn@tensor"] == "native"
    assert layer_under(monkeypatch, LACKS, "fp8")[1].routes["float8_e4m3fn@tensor"] == "emulated"


@pytest.mark.parametrize("policy", ["fp8", "fp8; *:fprop.a=e4m3@tensor delayed; *:wgrad.b=e4m3@tensor delayed"])
def test_it_trains(monkeypatch, policy):
    layer, precision = layer_under(monkeypatch, HAS, policy, bias=True)
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 48, generator=g), torch.randn(64, 32, generator=g)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        precision.backward(loss)
        precision.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_only_what_a_gradient_needs_is_kept(monkeypatch):
    kept = []
    layer, _ = layer_under(monkeypatch, HAS, "fp8", sizes=(64, 32))
    x = torch.randn(128, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    sizes = [t.numel() * t.element_size() for t in kept if t.data_ptr() != layer[0].weight.data_ptr()]
    assert sorted(sizes) == [4, x.numel()], "a byte an element and one scale"
