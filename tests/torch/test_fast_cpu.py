"""mezzo.torch.fast_cpu: 16-bit products on the CPU as float32 products, rounded once."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzo.errors import ConfigError
from mezzo.torch.cpu16 import SIXTEEN_BITS, FastCpu, fast_cpu

module = importlib.import_module("mezzo.torch.cpu16")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the relative error of one rounding to nearest
EPS32 = 2.0**-24
aten = torch.ops.aten


@pytest.fixture
def served() -> Iterator[FastCpu]:
    with fast_cpu(force=True) as report:
        yield report
    assert not report.active


@pytest.fixture(params=SIXTEEN_BITS, ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def wide(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def narrow(result: object, dtype: torch.dtype, kept: tuple[int, ...] = ()) -> list[Tensor]:
    parts = result if isinstance(result, tuple | list) else [result]
    return [part if i in kept else part.to(dtype) for i, part in enumerate(parts)]


a, b, bias = normal(9, 7), normal(7, 6), normal(6)
left, right, batch = normal(3, 5, 7), normal(3, 7, 4), normal(3, 5, 4)
image, filters, filter_bias = normal(2, 4, 6, 6), normal(8, 2, 3, 3), normal(8)
signal = normal(2, 3, 8)
q, k, v = (normal(2, 3, 5, 8, seed=i) for i in range(3))

PRODUCTS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "mm": lambda c: torch.mm(c(a), c(b)),
    "mm of transposed views": lambda c: torch.mm(c(b).t(), c(a).t()),
    "mm of strided slices": lambda c: torch.mm(c(normal(9, 14))[:, ::2], c(normal(14, 12))[::2, 1::2]),
    "mm of an expanded row": lambda c: torch.mm(c(normal(7)).expand(9, 7), c(b)),
    "mm of nothing": lambda c: torch.mm(c(torch.ones(3, 0)), c(torch.ones(0, 5))),
    "mm with no rows": lambda c: torch.mm(c(torch.ones(0, 7)), c(b)),
    "matmul with a batch": lambda c: torch.matmul(c(left), c(b)),
    "linear": lambda c: F.linear(c(left), c(b).t(), c(bias)),
    "addmm": lambda c: torch.addmm(c(normal(9, 6)), c(a), c(b)),
    "addmm, broadcast, alpha and beta": lambda c: torch.addmm(c(bias), c(a), c(b), beta=0.3, alpha=-1.7),
    "addmm of a column": lambda c: torch.addmm(c(normal(9, 1)), c(a), c(b)),
    "addmm, beta 0 over NaN": lambda c: torch.addmm(c(bias * float("nan")), c(a), c(b), beta=0),
    "addmm with relu": lambda c: aten._addmm_activation(c(bias), c(a), c(b)),
    "bmm": lambda c: torch.bmm(c(left), c(right)),
    "bmm of transposed views": lambda c: torch.bmm(c(right).transpose(1, 2), c(left).mT),
    "baddbmm": lambda c: torch.baddbmm(c(batch), c(left), c(right), beta=2, alpha=0.5),
    "addbmm": lambda c: torch.addbmm(c(normal(5, 4)), c(left), c(right), alpha=0.1),
    "conv2d": lambda c: F.conv2d(c(image), c(filters), c(filter_bias), stride=2, padding=1, groups=2),
    "conv2d, channels last": lambda c: F.conv2d(c(image).to(memory_format=torch.channels_last), c(normal(5, 4, 3, 3))),
    "conv2d without bias": lambda c: F.conv2d(c(image), c(normal(5, 4, 1, 1))),
    "conv1d": lambda c: F.conv1d(c(signal), c(normal(4, 3, 3)), c(normal(4)), padding="same"),
    "conv3d": lambda c: F.conv3d(c(normal(1, 2, 4, 4, 4)), c(normal(3, 2, 2, 2, 2)), c(normal(3))),
    "conv_transpose2d": lambda c: F.conv_transpose2d(c(image), c(normal(4, 3, 3, 3)), stride=2),
    "conv_tbc": lambda c: torch.conv_tbc(c(normal(6, 2, 3)), c(normal(3, 3, 4)), c(normal(4))),
    "convolution_backward": lambda c: aten.convolution_backward(
        c(normal(2, 8, 4, 4)), c(image), c(filters), [8], [1, 1], [0, 0], [1, 1], False, [0, 0], 2, [True, True, True]
    ),
    "attention": lambda c: F.scaled_dot_product_attention(c(q), c(k), c(v)),
    "attention, causal, scaled": lambda c: F.scaled_dot_product_attention(c(q), c(k), c(v), is_causal=True, scale=0.2),
    "attention, additive mask": lambda c: F.scaled_dot_product_attention(c(q), c(k), c(v), attn_mask=c(normal(5, 5))),
    "attention, boolean mask": lambda c: F.scaled_dot_product_attention(
        c(q), c(k), c(v), attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_float32_product_of_its_operands_rounded_once(
    served: FastCpu, dtype: torch.dtype, name: str
) -> None:
    """To the bit: the reference runs PyTorch's float32 kernel on the same values."""
    product = PRODUCTS[name]
    got = narrow(product(lambda t: t.to(dtype)), dtype)
    expected = narrow(product(lambda t: t.to(dtype).float()), dtype)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert g.stride() == e.stride()
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "backward" not in name])
def test_a_result_has_the_dtype_and_strides_that_stock_pytorch_gives_it(dtype: torch.dtype, name: str) -> None:
    stock = PRODUCTS[name](lambda t: t.to(dtype))
    with fast_cpu(force=True):
        got = PRODUCTS[name](lambda t: t.to(dtype))
    assert (got.dtype, got.shape) == (stock.dtype, stock.shape)
    if "conv" not in name:  # float32 convolutions choose their layout by their own rules
        assert got.stride() == stock.stride()


def test_a_product_agrees_with_stock_16_bits_within_the_derived_bound(dtype: torch.dtype) -> None:
    """Both round a float32 sum of n terms to 16 bits: each errs by n eps32 sum |a||b| and then by one rounding."""
    x, y, z = a.to(dtype), b.to(dtype), bias.to(dtype)
    stock = torch.addmm(z, x, y).double()
    with fast_cpu(force=True):
        got = torch.addmm(z, x, y).double()
    exact = torch.addmm(z.double(), x.double(), y.double())
    terms = torch.addmm(z.double().abs(), x.double().abs(), y.double().abs())
    sums = (x.shape[1] + 1) * EPS32 * terms
    bound = 2 * (sums + UNIT[dtype] * (exact.abs() + sums))
    assert bool(((got - stock).abs() <= bound).all())


@pytest.mark.parametrize("target", ["right shape", "empty", "transposed", "wrong shape"])
def test_out_variants_round_into_the_given_tensor(served: FastCpu, dtype: torch.dtype, target: str) -> None:
    x, y = a.to(dtype), b.to(dtype)
    out = {
        "right shape": torch.empty(9, 6, dtype=dtype),
        "empty": torch.empty(0, dtype=dtype),
        "transposed": torch.empty(6, 9, dtype=dtype).t(),
        "wrong shape": torch.empty(2, 2, dtype=dtype),
    }[target]
    stride = out.stride()
    if target == "wrong shape":
        with pytest.warns(UserWarning, match="was resized"):
            result = torch.mm(x, y, out=out)
    else:
        result = torch.mm(x, y, out=out)
    assert result is out
    assert torch.equal(out, torch.mm(x.float(), y.float()).to(dtype))
    if target == "transposed":
        assert out.stride() == stride


@pytest.mark.parametrize("addend", [None, (6,), (200, 6), (1, 6), (200, 1), (1,)])
def test_a_product_in_blocks_of_rows_is_the_product_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, served: FastCpu, dtype: torch.dtype, addend: tuple[int, ...] | None
) -> None:
    """Blocks are for temporaries of 32 MiB; here they are made to begin at nothing."""
    x, y = normal(7, 200).t().to(dtype), b.to(dtype)
    arguments = [x, y] if addend is None else [normal(*addend).to(dtype), x, y]
    function, scales = (torch.mm, {}) if addend is None else (torch.addmm, {"beta": 0.5, "alpha": 2})
    whole = function(*arguments, **scales)
    monkeypatch.setattr(module, "BLOCKS_FROM", 0)
    monkeypatch.setattr(module, "BLOCK", 0)  # as few rows as there may be: 64
    assert module._block(module._OPS[0], (x, y), None) == 64
    assert torch.equal(function(*arguments, **scales), whole)
    out = torch.empty(6, 200, dtype=dtype).t()
    assert torch.equal(function(*arguments, **scales, out=out), whole)
    assert torch.equal(function(*arguments, **scales, out=torch.empty(0, dtype=dtype)), whole)
    if addend == (200, 6):
        assert torch.equal(arguments[0].clone().addmm_(x, y, **scales), whole)
    square = normal(200, 200).to(dtype)
    expected = torch.mm(square.float(), square.float()).to(dtype)
    assert torch.equal(torch.mm(square, square, out=square), expected)  # reads what it writes: not in blocks
    with pytest.raises(RuntimeError, match="expand"):
        torch.addmm(torch.ones(64, 6, dtype=dtype), x, y)  # the shape of a block, not of the product


def test_every_out_variant_and_in_place_form_gives_the_same_bits(served: FastCpu, dtype: torch.dtype) -> None:
    x, y, z = (t.to(dtype) for t in (left, right, batch))
    m, n, c = a.to(dtype), b.to(dtype), normal(9, 6).to(dtype)
    flat = normal(5, 4).to(dtype)
    cases = [
        (torch.addmm, (c, m, n), c.clone().addmm_(m, n, beta=0.5, alpha=2)),
        (torch.baddbmm, (z, x, y), z.clone().baddbmm_(x, y, beta=0.5, alpha=2)),
        (torch.addbmm, (flat, x, y), flat.clone().addbmm_(x, y, beta=0.5, alpha=2)),
    ]
    for function, arguments, in_place in cases:
        expected = function(*(t.float() for t in arguments), beta=0.5, alpha=2).to(dtype)
        out = torch.empty_like(expected)
        function(*arguments, beta=0.5, alpha=2, out=out)
        assert torch.equal(out, expected)
        assert torch.equal(in_place, expected)
    out = torch.empty(3, 5, 4, dtype=dtype)
    torch.bmm(x, y, out=out)
    assert torch.equal(out, torch.bmm(x.float(), y.float()).to(dtype))


@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int64])
def test_other_dtypes_keep_their_bits(other: torch.dtype) -> None:
    names = list(PRODUCTS) if other.is_floating_point else ["mm", "bmm", "addmm", "baddbmm"]
    if other is torch.int64:
        calls = [
            lambda c: torch.mm(c(a), c(b)),
            lambda c: torch.bmm(c(left), c(right)),
            lambda c: torch.addmm(c(bias), c(a), c(b), beta=2),
        ]
    else:
        calls = [PRODUCTS[name] for name in names]
    stock = [call(lambda t: t.to(other)) for call in calls]
    with fast_cpu(force=True):
        got = [call(lambda t: t.to(other)) for call in calls]
    for one, two in zip(stock, got, strict=True):
        for e, g in zip(narrow(one, other), narrow(two, other), strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)


h = torch.bfloat16
WRONG: list[Callable[[], object]] = [
    lambda: torch.mm(torch.ones(2, 3, dtype=h), torch.ones(4, 5, dtype=h)),
    lambda: torch.mm(torch.ones(2, 3, dtype=h), torch.ones(3, 5)),
    lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 5, dtype=h)),
    lambda: torch.mm(torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=torch.float16)),
    lambda: torch.mm(torch.ones(3, dtype=h), torch.ones(3, 5, dtype=h)),
    lambda: torch.mm(torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h), out=torch.ones(2, 5)),
    lambda: torch.mm(torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h), out=torch.ones(1, 5, dtype=h).expand(2, 5)),
    lambda: torch.addmm(torch.ones(4, dtype=h), torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h)),
    lambda: torch.addmm(torch.ones(5), torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h)),
    lambda: torch.ones(5, dtype=h).addmm_(torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h)),
    lambda: torch.ones(1, 5, dtype=h).addmm_(torch.ones(2, 3, dtype=h), torch.ones(3, 5, dtype=h)),
    lambda: torch.bmm(torch.ones(2, 2, 3, dtype=h), torch.ones(3, 3, 5, dtype=h)),
    lambda: torch.ones(2, 5, dtype=h).baddbmm_(torch.ones(3, 2, 3, dtype=h), torch.ones(3, 3, 5, dtype=h)),
    lambda: F.conv2d(torch.ones(1, 2, 4, 4, dtype=h), torch.ones(3, 3, 3, 3, dtype=h)),
    lambda: F.conv2d(torch.ones(1, 2, 4, 4, dtype=h), torch.ones(3, 2, 3, 3)),
    lambda: F.conv2d(torch.ones(1, 2, 4, 4, dtype=h), torch.ones(3, 2, 3, 3, dtype=h), torch.ones(3)),
    lambda: F.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 4, dtype=d) for d in (h, torch.float32, h))),
]


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_call_fails_as_it_does_without_fast_cpu(call: Callable[[], object]) -> None:
    with pytest.raises(Exception) as stock:  # noqa: PT011 the point is that the two are the same
        call()
    with fast_cpu(force=True), pytest.raises(Exception) as got:  # noqa: PT011
        call()
    assert type(got.value) is type(stock.value)
    assert str(got.value) == str(stock.value)


class Mixed(nn.Module):
    """One of each: convolution, linear, attention, recurrence by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2)  # (B, 8, T) -> (B, T, 8)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(y + self.attention(y, y, y, need_weights=False)[0])


def gradients(network: nn.Module, autocast: torch.dtype | None, cast: torch.dtype | None = None) -> list[Tensor]:
    x = signal.to(cast or torch.float32).detach().clone().requires_grad_()
    network.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = network(x).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in network.parameters())]


def relative(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float((g.double() - e.double()).norm() / e.double().norm().clamp_min(1e-3))
        for g, e in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize("way", ["autocast", "module"])
def test_gradients_flow_and_are_as_near_to_float32_as_stock_ones(dtype: torch.dtype, way: str) -> None:
    """Each of about ten roundings in a row moves a tensor by at most one unit in relative norm, errors of the same
    order come in by as many paths, so 30 units bound both the stock and the fast result; random errors stay far
    below. A gradient that is missing, doubled or of another operand is off by 1, not by 30 units (0.12)."""
    torch.manual_seed(0)
    network = Mixed()
    reference = gradients(network, None)
    if way == "module":
        network, arguments = network.to(dtype), (None, dtype)
    else:
        arguments = (dtype, None)
    stock = gradients(network, *arguments)
    with fast_cpu(force=True):
        got = gradients(network, *arguments)
    assert [g.dtype for g in got] == [s.dtype for s in stock]
    assert max(relative(got, reference)) <= 30 * UNIT[dtype]
    assert max(relative(got, stock)) <= 30 * UNIT[dtype]


def test_gradients_of_attention_are_the_float32_ones_rounded_once(served: FastCpu, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in (q, k, v)]
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*tensors)
    assert (out.dtype, logsumexp.dtype) == (dtype, torch.float32)
    grad = normal(*out.shape).to(dtype)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    got = backward(grad, *tensors, out, logsumexp, 0.0, False)
    expected = backward(*(t.float() for t in (grad, *tensors, out)), logsumexp, 0.0, False)
    assert all(torch.equal(g, e.to(dtype)) for g, e in zip(got, expected, strict=True))


def test_an_lstm_trains_under_autocast(served: FastCpu, dtype: torch.dtype) -> None:
    """Stock PyTorch cannot run one on a CPU without 16-bit hardware: oneDNN finds no primitive."""
    torch.manual_seed(0)
    network = nn.LSTM(8, 4, num_layers=2, bidirectional=True)

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = network

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    reference = gradients(Output(), None)
    assert max(relative(gradients(Output(), dtype), reference)) <= 30 * UNIT[dtype]


def test_a_decoding_step_stays_in_the_16_bit_kernel(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    weight, x = b.to(dtype).t().contiguous(), normal(4, 7).to(dtype)  # weight (6, 7), as nn.Linear stores it
    stock = F.linear(x, weight, bias.to(dtype))

    def refuse(*_: object) -> None:
        raise AssertionError("converted to float32")

    with fast_cpu(force=True):
        monkeypatch.setattr(module, "_widen", refuse)
        assert torch.equal(F.linear(x, weight, bias.to(dtype)), stock)
        with pytest.raises(AssertionError, match="converted"):
            F.linear(a.to(dtype), weight)  # nine rows


class Small(nn.Module):
    """A linear layer with and one without bias, and attention: few kernels for Inductor to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.head = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.query(x).unsqueeze(1)  # (B, 1, T, d)
        return self.head(F.scaled_dot_product_attention(heads, heads, heads).squeeze(1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Inductor's own imports
def test_torch_compile_reaches_the_replaced_kernels(monkeypatch: pytest.MonkeyPatch, served: FastCpu) -> None:
    """Inductor calls mm.out and its kin. Against the eager run, its own fused code may move a rounding: 30 units."""
    torch.manual_seed(0)
    network = Small()
    eager = gradients(network, torch.bfloat16)
    seen: list[object] = []
    widen = module._widen

    def watch(value: object, dtype: torch.dtype) -> object:
        seen.append(value)
        return widen(value, dtype)

    monkeypatch.setattr(module, "_widen", watch)
    got = gradients(torch.compile(network), torch.bfloat16)
    tensors = [value for value in seen if isinstance(value, Tensor)]
    assert len(tensors) >= 2 * 3 * 2 + 3 + 5  # operands of three products of two layers, and of attention's two kernels
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in tensors)  # ran, not only traced
    assert max(relative(got, eager)) <= 30 * UNIT[torch.bfloat16]


def test_a_second_call_changes_nothing_and_undo_gives_the_stock_kernels_back() -> None:
    kernel = torch.library.get_kernel("aten::mm", "CPU")
    first = fast_cpu(force=True)
    try:
        replaced = torch.library.get_kernel("aten::mm", "CPU")
        assert str(replaced) != str(kernel)
        assert fast_cpu() is first
        assert fast_cpu(force=True) is first
        assert str(torch.library.get_kernel("aten::mm", "CPU")) == str(replaced)
    finally:
        first.undo()
    assert not first.active
    assert "undone" in str(first)
    assert str(torch.library.get_kernel("aten::mm", "CPU")) == str(kernel)
    first.undo()


def test_an_inner_block_does_not_undo_what_an_outer_one_asked_for() -> None:
    with fast_cpu(force=True) as outer:
        with fast_cpu() as inner:
            assert inner is outer
        assert outer.active
    assert not outer.active


def test_it_does_nothing_where_the_hardware_is_fast_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_slowdown", lambda: {torch.bfloat16: 0.6, torch.float16: 1.1})
    kernel = str(torch.library.get_kernel("aten::mm", "CPU"))
    report = fast_cpu()
    assert not report.active
    assert (report.dtypes, report.ops) == ((), ())
    assert str(report) == (
        "fast_cpu: nothing to do, this CPU is fast at 16 bits "
        "(a product's time as a multiple of float32's: bfloat16 0.6, float16 1.1)"
    )
    assert str(torch.library.get_kernel("aten::mm", "CPU")) == kernel


def test_it_serves_only_the_dtype_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_slowdown", lambda: {torch.bfloat16: 0.6, torch.float16: 40.0})
    x, y = (a.to(torch.bfloat16), b.to(torch.bfloat16))
    with fast_cpu() as report:
        assert report.dtypes == (torch.float16,)
        assert "float16 products on the CPU run as float32 products, rounded once" in str(report)
        assert "addmm.out" in str(report)
        monkeypatch.setattr(module, "_widen", lambda *_: pytest.fail("bfloat16 was converted"))
        torch.mm(x, y)


def test_the_measured_slowdown_is_a_positive_ratio_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    measured = module._slowdown(size=16, seconds=0.001)
    assert set(measured) == set(SIXTEEN_BITS)
    assert all(ratio > 0 for ratio in measured.values())
    assert torch.get_num_threads() == threads


def test_a_torch_without_get_kernel_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(ConfigError, match=r"torch 2\.\d+.*does not have; install torch 2\.10 or newer"):
        fast_cpu()


def test_inductors_cpp_wrapper_is_refused_with_the_remedy() -> None:
    import torch._inductor.config as inductor

    # Not monkeypatch, whose undoing deletes the setting: Inductor then fails for the rest of the process.
    with inductor.patch(cpp_wrapper=True), pytest.raises(ConfigError, match=r"cpp_wrapper = True.*set it to False"):
        fast_cpu(force=True)


def test_no_warning_leaks_and_importing_probes_nothing() -> None:
    code = (
        "import importlib, torch; m = importlib.import_module('mezzo.torch.cpu16'); "
        "assert m._installed is None; print(m.fast_cpu(force=True).active)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
