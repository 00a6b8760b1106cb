import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import U, rounded, three, worst
from torch import nn

from mezzo.errors import ConfigError
from mezzo.formats import get_format
from mezzo.policy import Policy, Site
from mezzo.torch import Precision
from mezzo.torch.intercept import SiteMode
from mezzo.torch.products import Linear, Matmul
from mezzo.torch.scales import Scales
from mezzo.torch.table import Hooks, Table

pytestmark = pytest.mark.usefixtures("slow_16_bits")
EMULATED = frozenset({"float32", "float64"})


class Product(nn.Module):
    """A bare operation of two tensors."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, a, b):
        return self.op(a, b)


# name: (operation, shape of a, shape of b). In a convolution b is the weight.
CASES = {
    "linear": (F.linear, (3, 5, 8), (6, 8)),
    "linear on a vector": (F.linear, (8,), (6, 8)),
    "linear, weight of one dimension": (F.linear, (3, 8), (8,)),
    "matmul 2-D": (torch.matmul, (4, 8), (8, 5)),
    "matmul 1-D by 1-D": (torch.matmul, (8,), (8,)),
    "matmul 1-D by 2-D": (torch.matmul, (8,), (8, 5)),
    "matmul 2-D by 1-D": (torch.matmul, (4, 8), (8,)),
    "matmul 1-D by 3-D": (torch.matmul, (8,), (3, 8, 5)),
    "matmul 3-D by 1-D": (torch.matmul, (3, 4, 8), (8,)),
    "matmul 3-D by 2-D": (torch.matmul, (3, 4, 8), (8, 5)),
    "matmul 2-D by 3-D": (torch.matmul, (4, 8), (3, 8, 5)),
    "matmul, batches broadcast": (torch.matmul, (2, 1, 4, 8), (3, 8, 5)),
    "the @ operator": (lambda a, b: a @ b, (4, 8), (8, 5)),
    "matmul by keyword": (lambda a, b: torch.matmul(input=a, other=b), (4, 8), (8, 5)),
    "mm": (torch.mm, (4, 8), (8, 5)),
    "mm of a transposed view": (lambda a, b: torch.mm(a.t(), b.t()), (8, 4), (5, 8)),
    "mv": (torch.mv, (4, 8), (8,)),
    "dot": (torch.dot, (8,), (8,)),
    "bmm": (torch.bmm, (3, 4, 8), (3, 8, 5)),
    "bmm method by keyword": (lambda a, b: a.bmm(mat2=b), (3, 4, 8), (3, 8, 5)),
    "einsum": (lambda a, b: torch.einsum("bik,kj->jbi", a, b), (3, 4, 8), (8, 5)),
    "einsum over two axes": (lambda a, b: torch.einsum("bhik,bhjk->bij", [a, b]), (2, 3, 4, 8), (2, 3, 5, 8)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), (3, 4, 8), (4, 8, 5)),
    "inner": (torch.inner, (4, 8), (5, 8)),
    "conv1d": (lambda a, b: F.conv1d(a, b, stride=2, padding=1), (2, 4, 9), (6, 4, 3)),
    "conv1d in groups": (lambda a, b: F.conv1d(a, b, groups=2), (2, 4, 9), (6, 2, 3)),
    "conv2d": (lambda a, b: F.conv2d(a, b, padding=1), (2, 3, 5, 6), (4, 3, 3, 3)),
    "conv2d by keyword": (lambda a, b: F.conv2d(input=a, weight=b, stride=2), (2, 3, 5, 6), (4, 3, 3, 3)),
    "conv2d in groups, dilated": (lambda a, b: F.conv2d(a, b, groups=3, dilation=2), (2, 3, 7, 7), (6, 1, 3, 3)),
    "conv_transpose1d": (lambda a, b: F.conv_transpose1d(a, b, stride=2), (2, 4, 5), (4, 3, 3)),
    "conv_transpose2d": (lambda a, b: F.conv_transpose2d(a, b, padding=1), (1, 3, 4, 4), (3, 2, 3, 3)),
}  # fmt: skip
POLICIES = {
    "bf16": "bf16",
    "fp16": "fp16",
    "tf32": "tf32",
    "bf16, results in float32": "bf16; *:fprop.out=float32; *:dgrad.out=float32",
    "bf16, weight gradients too": "bf16; *:wgrad.out=bfloat16",
}
# Operations that keep one rounded copy of an operand cannot give a product a format of its own.
APART = ("linear", "linear on a vector", "matmul 2-D", "matmul 1-D", "matmul 3-D", "matmul,", "mm", "mv", "dot", "bmm")
SEPARABLE = [name for name in CASES if name.startswith(APART) and name != "linear, weight of one dimension"]


def operands(case, scale=1.0):
    op, *shapes = CASES[case]
    a, b = (torch.randn(shape) * scale for shape in shapes)
    return op, a, b, torch.randn(op(a, b).shape)


def run(policy, op, a, b, g):
    model = Product(op)
    precision = Precision(model, policy=policy)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = model(a, b)
    out.backward(g)
    precision.remove()
    assert out.dtype is a.grad.dtype is b.grad.dtype is torch.float32
    return {"fprop": out, "dgrad": a.grad, "wgrad": b.grad}


def formats(policy):
    policy = Policy.of(policy)
    return {
        f"{product}.{role}": policy.format(Site("", f"{product}.{role}")).name
        for product in ("fprop", "dgrad", "wgrad")
        for role in ("a", "b", "out")
    }


def expected(policy, op, a, b, g):
    f = formats(policy)
    if f["fprop.out"] in ("bfloat16", "float16"):
        g = rounded(g, f["fprop.out"])  # autograd hands a 16-bit tensor its gradient in its own dtype
    return three(
        op,
        {"fprop": rounded(a, f["fprop.a"]), "dgrad": rounded(a, f["fprop.a"]), "wgrad": rounded(a, f["wgrad.b"])},
        {"fprop": rounded(b, f["fprop.b"]), "dgrad": rounded(b, f["dgrad.b"]), "wgrad": rounded(b, f["fprop.b"])},
        {"dgrad": rounded(g, f["dgrad.a"]), "wgrad": rounded(g, f["wgrad.a"])},
    )


def ratios(policy, op, a, b, g):
    """Product → error as a multiple of the derived bound."""
    f, got, want = formats(policy), run(policy, op, a, b, g), expected(policy, op, a, b, g)
    return {product: worst(got[product], *want[product], f[f"{product}.out"]) for product in got}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_a_product_and_its_gradients_are_within_the_derived_bound(case, policy):
    found = ratios(POLICIES[policy], *operands(case))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("case", CASES)
def test_that_bound_is_missed_where_operands_are_not_rounded(case):
    op, a, b, g = operands(case)
    plain = run("fp32", op, a, b, g)
    want = expected("bf16; *:out=float32", op, a, b, g)
    assert min(worst(plain[p], *want[p], "float32") for p in plain) > 1


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-9, 2.0**5])
def test_the_bound_holds_where_results_are_subnormal_or_large(policy, scale):
    found = ratios(policy, *operands("linear", scale))
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("role", ["fprop.a", "fprop.b", "fprop.out", "dgrad.a", "dgrad.b", "dgrad.out", "wgrad.a",
                                  "wgrad.b", "wgrad.out"])  # fmt: skip
@pytest.mark.parametrize("case", SEPARABLE)
def test_a_rule_for_one_role_changes_exactly_that_role(case, role):
    policy = f"fp32; *:{role}=bfloat16"
    op, a, b, g = operands(case)
    found = ratios(policy, op, a, b, g)
    assert max(found.values()) <= 1, found
    plain, ruled = run("fp32", op, a, b, g), run(policy, op, a, b, g)
    product = role.partition(".")[0]
    changed = {p for p in plain if not torch.allclose(plain[p], ruled[p], rtol=1e-4, atol=1e-5)}
    assert changed == ({product} if role != "fprop.out" else {*plain})


def test_operations_that_share_a_rounded_copy_refuse_to_tell_its_roles_apart():
    for case, (role, pair) in itertools.product(
        ["conv2d", "einsum"],
        {"dgrad.a": "dgrad.a=bfloat16, wgrad.a=float32", "wgrad.b": "fprop.a=float32, wgrad.b=bfloat16"}.items(),
    ):
        with pytest.raises(ConfigError, match=f"{case} keeps one rounded copy for {pair}; give these roles one format"):
            run(f"fp32; *:{role}=bfloat16", *operands(case))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv_transpose1d"])
@pytest.mark.parametrize("policy", ["bf16", "fp16", "tf32"])
def test_a_bias_is_rounded_like_the_weight_and_added_before_the_result_is_rounded(kind, policy):
    layer, x = {
        "linear": (nn.Linear(8, 6), torch.randn(5, 8)),
        "conv1d": (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 7)),
        "conv2d": (nn.Conv2d(3, 6, 3), torch.randn(2, 3, 5, 5)),
        "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
    }[kind]
    f = formats(policy)
    w, c = rounded(layer.weight, f["fprop.b"]), rounded(layer.bias, f["fprop.b"])
    channels = -1 if kind == "linear" else 1
    shape = [-1 if i == channels % x.dim() else 1 for i in range(x.dim())]
    op = {"linear": F.linear, "conv1d": F.conv1d, "conv2d": F.conv2d, "conv_transpose1d": F.conv_transpose1d}[kind]
    g = torch.randn(op(x, layer.weight).shape)
    precision = Precision(layer, policy=policy)
    out = layer(x)
    out.backward(g)
    xr, gr = rounded(x, f["fprop.a"]), rounded(g, f["dgrad.a"])
    exact, absolute, terms = op(xr, w), op(xr.abs(), w.abs()), op(torch.ones_like(xr), torch.ones_like(w))
    bias = c.view(shape)
    assert worst(out, exact + bias, absolute + bias.abs(), terms + 1, f["fprop.out"]) <= 1
    others = [d for d in range(g.dim()) if d != channels % g.dim()]
    many = torch.tensor(g.numel() / g.shape[channels], dtype=torch.float64)
    assert worst(layer.bias.grad, gr.sum(others), gr.abs().sum(others), many, f["wgrad.out"]) <= 1
    precision.remove()


def test_addmm_adds_its_first_operand_unrounded_after_the_product():
    class Add(nn.Module):
        def forward(self, c, a, b):
            return torch.addmm(c, a, b, beta=0.5, alpha=2)

    model, c, a, b = Add(), torch.randn(4, 5), torch.randn(4, 8), torch.randn(8, 5)
    Precision(model, policy="bf16; *:fprop.out=float32")
    ar, br = rounded(a, "bfloat16"), rounded(b, "bfloat16")
    exact, absolute = 0.5 * c + 2 * (ar @ br), 0.5 * c.abs() + 2 * (ar.abs() @ br.abs())
    assert worst(model(c, a, b), exact, absolute, torch.tensor(10.0), "float32") <= 1  # 8 products, a sum, its rounding


def test_baddbmm_with_beta_zero_hides_even_a_nan():
    class Add(nn.Module):
        def forward(self, c, a, b):
            return torch.baddbmm(c, a, b, beta=0)

    model = Add()
    Precision(model, policy="bf16")
    c = torch.full((2, 3, 3), float("nan"))
    assert model(c, torch.randn(2, 3, 4), torch.randn(2, 4, 3)).isfinite().all()


def test_an_out_argument_is_refused():
    class Out(nn.Module):
        def forward(self, a, b):
            return torch.mm(a, b, out=torch.empty(2, 2))

    model = Out()
    Precision(model, policy="bf16")
    with pytest.raises(ConfigError, match=r"mm\(out=…\) cannot be rounded by site; drop out="):
        model(torch.eye(2), torch.eye(2))


@pytest.mark.parametrize("product", [torch.addmv, torch.addr, torch.addbmm, torch.linalg.multi_dot])
def test_a_product_that_is_not_covered_runs_in_float32_and_is_listed(product):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.own = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            h, w = self.layer(x), self.own
            if product is torch.linalg.multi_dot:
                return product([h, w, h])
            if product is torch.addbmm:
                return product(w, h[None], w[None])
            return product(
                w[0] if product is torch.addmv else w, *((h, w[1]) if product is torch.addmv else (h[0], w[1]))
            )

    model = Odd()
    precision = Precision(model, policy="bf16")
    assert model(torch.randn(4, 4)).dtype is torch.float32
    row = next(row for row in precision.sites() if row.site == f"(model):op {product.__name__}")
    assert (row.route, row.format) == ("not covered", "bfloat16" if product is torch.linalg.multi_dot else "float32")


def test_integers_and_complex_numbers_pass_untouched():
    model = Product(torch.matmul)
    Precision(model, policy="bf16")
    whole = torch.arange(4).view(2, 2)
    assert torch.equal(model(whole, whole), whole @ whole)
    z = torch.randn(3, 3, dtype=torch.complex64)
    model.op = F.linear
    assert torch.equal(model(z, z), F.linear(z, z))


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["linear", "matmul, batches broadcast", "bmm", "einsum", "conv2d"])
def test_the_native_route_agrees_with_the_emulated_one_within_the_bound(case, policy):
    # A matrix product's kernel sums in float32 and rounds its result to 16 bits; a result asked for in float32 has
    # that one rounding too. Where a gradient is a sum of several products (a broadcast batch, a convolution's windows)
    # the kernels add in 16 bits: then every one of the terms may cost a 16-bit unit roundoff.
    op, a, b, g = operands(case)
    want = expected(policy, op, a, b, g)
    fmt = "bfloat16" if policy == "bf16" else "float16"
    model = Product(op)
    precision = Precision(model, policy=policy)
    precision.mode.table = Table(precision.policy, EMULATED | {fmt}, precision.hooks, precision.scales)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = model(a, b)
    out.backward(g)
    for product, got in {"fprop": out, "dgrad": a.grad, "wgrad": b.grad}.items():
        exact, absolute, terms = want[product]
        unit = U if case in ("linear", "bmm", "einsum") else get_format(fmt).epsilon / 2
        assert worst(got, exact, absolute, terms, fmt, unit) <= 1, product


def test_what_is_native_is_given_to_the_kernel_in_its_own_dtype():
    seen = []
    spec = Table(
        Policy.parse("bf16; *:wgrad.out=bfloat16"), EMULATED | {"bfloat16"}, Hooks(), Scales(0, torch.device("cpu"))
    ).product("x", 0)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                seen.append({a.dtype for a in args if isinstance(a, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with Watch():
        Linear.apply(x, w, None, spec).sum().backward()
        Matmul.apply(x, w.t(), spec).sum().backward()
    assert seen == [{torch.bfloat16}] * 6


def test_differentiating_twice_through_a_rounded_product_is_refused_not_wrong():
    model = nn.Linear(3, 3)
    Precision(model, policy="bf16")
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_call_index_rule_changes_only_that_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x), self.layer(x)

    model = Twice()
    precision = Precision(model, policy="fp32; layer#1:fprop.*=bfloat16")
    x = torch.randn(2, 8)
    for _ in range(2):  # the count starts anew with every forward pass
        first, second = model(x)
        assert torch.equal(first, F.linear(x, model.layer.weight, model.layer.bias))
        assert not torch.equal(first, second)
    assert isinstance(precision.mode, SiteMode)


def test_a_bias_gets_the_sum_of_its_gradient_where_the_weight_gets_a_transformed_one():
    """Rows of a Hadamard transform are mixtures of the gradient's rows: their sum is another number."""
    x = torch.randn(32, 16)
    model = nn.Sequential(nn.Linear(16, 4))
    Precision(model, None, "bf16; *:wgrad.a=nvfp4 stochastic hadamard; *:wgrad.b=nvfp4 hadamard")
    y = model(x)
    y.retain_grad()
    y.pow(2).sum().backward()
    # The output is a bfloat16 number, its gradient is twice that: nothing is rounded before the sum.
    assert torch.allclose(
        model[0].bias.grad, y.grad.sum(0), rtol=0, atol=32 * 2.0**-24 * y.grad.abs().sum(0).max().item()
    )
