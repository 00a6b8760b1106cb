"""Every recipe trains: in eager mode, compiled, with accumulation and checkpointing; and keeps what it promises."""

import pytest
import torch
from torch import nn

from mezzo.errors import ConfigError
from mezzo.policy import RECIPES
from mezzo.policy.recipe import ORDER
from mezzo.torch import Precision

LOW = ("fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp4", "nvfp4")


class Net(nn.Module):
    """Two residual blocks and a head, with attention; every size a multiple of 64."""

    def __init__(self, blocks=2, d=64):
        super().__init__()
        self.embed = nn.Embedding(64, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(d), "qkv": nn.Linear(d, 3 * d), "up": nn.Linear(d, 2 * d),
                           "down": nn.Linear(2 * d, d)}) for _ in range(blocks)
        )  # fmt: skip
        self.head = nn.Linear(d, 64, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            q, k, v = (t.view(*x.shape[:2], 2, -1).transpose(1, 2) for t in block["qkv"](block["norm"](x)).chunk(3, -1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
            x = x + block["down"](nn.functional.gelu(block["up"](x)))
        return self.head(x)


def make(policy, seed=0, lr=3e-3, **more):
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    return model, Precision(model, optimizer, policy, **more)


def batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randint(0, 64, (4, 32), generator=g)
    return x, (x * 7 + 3) % 64


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, precision, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(model, *batch(step))
        precision.backward(loss)
        precision.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns(name):
    model, precision = make(name)
    losses = train(model, precision, 40)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.parametrize("name", LOW)
def test_the_low_formats_are_really_in_the_products(name):
    """Each of the six operands of a block's layer is rounded to what the recipe says; attention and head are not."""
    model, precision = make(name)
    heard = {}
    with precision.tap(lambda site, before, after: heard.setdefault(str(site), (before, after))):
        precision.backward(loss_of(model, *batch(0)))
    for role in ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b"):
        before, after = heard[f"blocks.0.up:{role}"]
        assert after.dtype is torch.float32
        assert (before.float() != after).float().mean() > 0, role
        assert heard[f"head:{role}"][1].dtype is torch.bfloat16
    assert all(after.dtype is torch.bfloat16 for site, (_, after) in heard.items() if "query" in site or "dout" in site)
    assert heard["blocks.0.up:wgrad.out"][1].dtype is torch.float32


def test_nvfp4_follows_its_paper():
    rows = {row.site: row.format for row in make("nvfp4")[1].sites(batch(0)[0])}
    assert {role: rows[f"blocks.1.down:{role}"] for role in ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a",
                                                             "wgrad.b", "wgrad.out")} == {
        "fprop.a": "nvfp4", "fprop.b": "nvfp4_16x16", "dgrad.a": "nvfp4 stochastic", "dgrad.b": "nvfp4_16x16",
        "wgrad.a": "nvfp4 stochastic hadamard", "wgrad.b": "nvfp4 hadamard", "wgrad.out": "float32",
    }  # fmt: skip


def test_weight_blocks_of_16x16_are_the_same_values_in_both_products():
    model, precision = make("nvfp4")
    heard = {}
    with precision.tap(lambda site, before, after: heard.setdefault(str(site), after)):
        precision.backward(loss_of(model, *batch(0)))
    assert torch.equal(heard["blocks.0.up:fprop.b"], heard["blocks.0.up:dgrad.b"])


def gradients(name, **more):
    model, precision = make(name, **more)
    precision.backward(loss_of(model, *batch(0)))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", LOW)
def test_gradients_point_where_those_of_float32_point(name):
    exact, low = gradients("fp32"), gradients(name)
    cosine = torch.nn.functional.cosine_similarity(exact, low, dim=0)
    # Rounding to M fraction bits errs by at most 2**-(M+1) of each operand; errors of many operands are nearly
    # independent. 4 bits: M = 1, 8 bits: M = 3 or 2.
    assert cosine > (0.85 if "4" in name else 0.99)
    assert cosine < 1 - 1e-6


def test_stochastic_rounding_is_drawn_anew_at_each_step_and_is_the_same_for_a_seed():
    assert torch.equal(gradients("nvfp4"), gradients("nvfp4"))
    torch.manual_seed(0)
    model = Net()
    Precision(model, None, "nvfp4", seed=1).backward(loss_of(model, *batch(0)))
    assert not torch.equal(gradients("nvfp4"), torch.cat([p.grad.flatten() for p in model.parameters()]))
    model, precision = make("nvfp4", lr=0.0)
    first = []
    for _ in range(2):
        precision.backward(loss_of(model, *batch(0)))
        first.append(model.blocks[0]["up"].weight.grad.clone())
        model.zero_grad()
    assert not torch.equal(*first)


def test_stochastic_gradients_are_right_on_average():
    """Of 64 draws the mean of each gradient element is within five standard errors of the truth, which is the gradient
    with the same operands whose gradients alone are left unrounded."""
    rules = "bf16; *:out=float32; *:grad_output=float32; *:input=float32; *:weight=float32"
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    x, g = torch.randn(128, 64), torch.randn(128, 32)
    exact = g.T @ x
    precision = Precision(layer, None, f"{rules}; *:wgrad.a=mxfp4 stochastic")
    draws = []
    for _ in range(64):
        layer.weight.grad = None
        precision.backward((layer(x) * g).sum())
        draws.append(layer.weight.grad.clone())
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / 8 + 1e-6)
    assert error.abs().max() < 5
    nearest = Precision(nn.Linear(64, 32, bias=False), None, f"{rules}; *:wgrad.a=mxfp4")
    nearest.model.weight.grad = None
    nearest.backward((nearest.model(x) * g).sum())
    assert (nearest.model.weight.grad - exact).abs().mean() > 4 * (draws.mean(0) - exact).abs().mean()


@pytest.mark.parametrize("name", LOW)
def test_kept_activations_have_the_formats_bytes(name):
    """What a block's layer keeps of its input for the weight gradient: a byte or half a byte an element, and scales."""
    kept = []

    def note(t):
        kept.append(t)
        return t

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 128, bias=False))
    Precision(layer, None, name)
    x = torch.randn(512, 256)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(x)
    size = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != layer[0].weight.data_ptr())
    assert size / x.numel() <= (0.57 if "4" in name else 1.04)


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4"])
def test_accumulated_microbatches_are_a_sum(name):
    model, precision = make(name)
    precision.backward(loss_of(model, *batch(0)))
    one = model.blocks[0]["up"].weight.grad.clone()
    precision.backward(loss_of(model, *batch(1)))
    two = model.blocks[0]["up"].weight.grad - one
    assert two.abs().max() > 0
    assert not torch.equal(one, two)
    assert precision.step().skipped_now() is False


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "fp8; *:fprop.a=e4m3@tensor delayed"])
def test_activation_checkpointing_changes_no_bit(name):
    def run(checkpointed):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = block

            def forward(self, x):
                if checkpointed:
                    return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
                return self.inner(x)

        model = Outer()
        precision = Precision(model, torch.optim.SGD(model.parameters(), lr=0.1), name)
        for step in range(3):
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            precision.backward(model(x).square().mean())
            precision.step()
        return [p.detach().clone() for p in model.parameters()]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports
@pytest.mark.parametrize(
    "name", ["nvfp4", "mxfp8", "fp8; *:fprop.a=e4m3@tensor delayed; *:wgrad.b=e4m3@tensor delayed"]
)
def test_compiled_is_eager_up_to_the_order_of_sums(name):
    """The operands of the first layer are the same to the bit; where sums then differ by float32's roundoff, a few
    operands of the next layers round to the neighbour, a relative 2**-2 (4 bits) or 2**-4 each."""
    results = []
    for compiled in (False, True):
        model, precision = make(name)
        run = torch.compile(model, fullgraph=True) if compiled else model
        for step in range(2):
            precision.backward(loss_of(run, *batch(step)))
            precision.step()
        precision.backward(loss_of(run, *batch(2)))
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    cosine = nn.functional.cosine_similarity(*results, dim=0)
    plain = nn.functional.cosine_similarity(results[0], gradients("fp32"), dim=0)
    assert cosine > 0.99
    assert cosine > plain


@pytest.mark.parametrize("name", [*LOW, "fp8; *:wgrad.b=e4m3@tensor delayed"])
def test_a_resume_is_bitwise(name):
    model, precision = make(name)
    straight = train(model, precision, 8)
    model, precision = make(name)
    assert train(model, precision, 4) == straight[:4]
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    own, moments = precision.state_dict(), precision.optimizers[0].state_dict()
    model, precision = make(name, seed=9)
    model.load_state_dict(saved)
    precision.optimizers[0].load_state_dict(moments)
    precision.load_state_dict(own)
    assert train(model, precision, 4, first=4) == straight[4:]


def test_delayed_scales_follow_the_steps_before_and_survive_a_nan():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    precision = Precision(layer, optimizer, "fp32; *:fprop.a=e4m3@tensor delayed=2")
    scales = precision.scales

    def step(x):
        precision.backward(layer(x).sum())
        return precision.step()

    x = torch.randn(32, 64)
    for factor, history in ((1.0, [1.0, 0.0]), (4.0, [4.0, 1.0]), (2.0, [2.0, 4.0]), (2.0, [2.0, 2.0])):
        step(x * factor)
        top = x.abs().max()
        assert torch.equal(scales.history[0, :2], top * torch.tensor(history))
    wanted = scales.wanted.clone()
    assert wanted.item() == pytest.approx(2 * x.abs().max().item() / 448)
    bad = x.clone()
    bad[0, 0] = float("nan")
    assert step(bad).skipped_now()
    assert torch.equal(scales.wanted, wanted)
    step(x)
    assert torch.isfinite(scales.wanted).all()


def test_evaluation_leaves_delayed_scales_alone():
    model, precision = make("fp8; *:fprop.a=e4m3@tensor delayed")
    train(model, precision, 2)
    before = precision.scales.seen.clone()
    with torch.no_grad():
        model(batch(5)[0] * 0)
    assert torch.equal(precision.scales.seen, before)


def test_half_a_hadamard_transform_is_refused():
    with pytest.raises(ConfigError, match=r"wgrad: a Hadamard transform of one operand .* wgrad\.b has none"):
        make("bf16; *:wgrad.a=nvfp4 hadamard")


def test_the_recipes_are_all_there():
    assert [*RECIPES] == [*ORDER]
