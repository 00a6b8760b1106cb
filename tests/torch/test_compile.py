"""Under torch.compile the roundings really happen, without graph breaks. Minutes cold, seconds with a warm cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzo.torch import Precision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("slow_16_bits"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Inductor's own imports
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11)
        self.qkv = nn.Linear(8, 24)

    def forward(self, ids):
        x = self.tokens(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x)


@pytest.mark.parametrize("policy", ["bf16", "fp16", "tf32"])
def test_a_compiled_linear_rounds_in_forward_and_backward_as_the_eager_one(policy):
    def run(compiled):
        torch.manual_seed(0)
        model = nn.Linear(64, 32)
        Precision(model, None, policy)
        call = torch.compile(model, fullgraph=True) if compiled else model
        x = torch.randn(16, 64, requires_grad=True)
        out = call(x)
        out.backward(torch.randn(16, 32))
        return out, x.grad, model.weight.grad, model.bias.grad

    eager, compiled = run(False), run(True)
    for a, b in zip(eager, compiled, strict=True):
        # The same float32 products of the same rounded operands, summed in another order at most: 64 u of the largest
        # sum of absolute values, and one flip of a result that is rounded to 16 bits.
        step = {"bf16": 2.0**-7, "fp16": 2.0**-10, "tf32": 0.0}[policy]
        limit = 64 * 2.0**-24 * 64 + step * a.abs()
        assert bool(((a - b).abs() <= limit).all())
    # Had the compiler dropped the roundings of the operands, the weight's gradient, whose result is float32, would be
    # that of plain float32.
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 32), torch.randn(16, 64, requires_grad=True)
    plain(x).backward(torch.randn(16, 32))
    assert float((plain.weight.grad - compiled[2]).abs().max()) > 100 * float((eager[2] - compiled[2]).abs().max())


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_a_compiled_network_trains_like_the_eager_one_without_a_graph_break(policy):
    def run(compiled):
        torch.manual_seed(0)
        model = Net()
        precision = Precision(model, torch.optim.AdamW(model.parameters(), 1e-2, fused=True), policy)
        call = torch.compile(model, fullgraph=True) if compiled else model
        losses = []
        for i in range(3):
            torch.manual_seed(i)
            x, y = torch.randint(0, 11, (2, 4, 6))
            loss = F.cross_entropy(call(x).flatten(0, 1), y.flatten())
            precision.backward(loss)
            assert not precision.step().skipped_now()
            losses.append(float(loss.detach()))
        return losses

    # A float32 sum in another order can flip the rounding of single operands: a few of 2^-9 in a loss of 2.4.
    assert run(True) == pytest.approx(run(False), rel=2e-3 if policy != "fp32" else 1e-5)


def test_a_compiled_model_can_change_its_policy_and_be_evaluated():
    torch.manual_seed(0)
    model = Net()
    precision = Precision(model, None, "bf16")
    call, x = torch.compile(model), torch.randint(0, 11, (2, 6))
    with torch.no_grad():
        low = call(x)
        with precision.using("fp32"):
            high = call(x)
        precision.remove()
        want = model(x)
    assert torch.allclose(high, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(low, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own, after a graph break
def test_a_compiled_encoder_layer_and_a_convolution_round_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    for model, x in ((layer, torch.randn(2, 5, 8)), (image, torch.randn(4, 1, 5, 5))):
        torch._dynamo.reset()  # the encoder's attention breaks the graph, after which Dynamo leaves our frames alone
        Precision(model, None, "bf16")
        eager = model(x)
        compiled = torch.compile(model, fullgraph=model is image)(x)
        # Both round at the same sites; flips of single roundings may add up to a few steps of 2^-8 of values near 1.
        assert torch.allclose(eager, compiled, rtol=0.02, atol=0.02)


def test_a_part_of_the_model_that_is_compiled_by_itself_rounds_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    Precision(model, None, "bf16")
    x = torch.randn(4, 8)
    eager = model(x)
    model[0].compile(fullgraph=True)
    part = model(x)
    assert torch.allclose(eager, part, rtol=2**-7, atol=2**-8)  # one flip of a bfloat16
    assert torch.equal(part, part.bfloat16().float())


def test_mezzos_own_gpt_compiles_whole_under_a_policy():
    from mezzo.models.gpt_torch import GPT
    from mezzo.models.shapes import preset

    model = GPT(preset("gpt-tiny", vocab_size=64), generator=torch.Generator().manual_seed(0))
    Precision(model, None, "bf16")
    ids, targets = torch.randint(64, (2, 2, 32), generator=torch.Generator().manual_seed(1))
    # A float32 sum in another order can flip the rounding of single operands: a few of 2^-9 in a loss of 4.
    compiled, eager = torch.compile(model, fullgraph=True)(ids, targets), model(ids, targets)
    assert float(compiled.detach()) == pytest.approx(float(eager.detach()), rel=2e-3)
