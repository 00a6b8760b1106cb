import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mezzo.errors import ConfigError
from mezzo.torch import Precision

pytestmark = pytest.mark.usefixtures("slow_16_bits")


class Net(nn.Module):
    """A little of everything, small."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.checkpointed = checkpointed

    def forward(self, ids):
        x = self.tokens(ids)
        up = checkpoint(self.up, self.norm(x), use_reentrant=False) if self.checkpointed else self.up(self.norm(x))
        x = x + self.down(F.gelu(up))
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]
        return self.head(x)


def make(policy=None, seed=0, checkpointed=False, lr=1e-2, fused=True, **how):
    torch.manual_seed(seed)
    model = Net(checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, fused=fused)
    return model, optimizer, Precision(model, optimizer, policy, **how) if policy else None


def batch(i, rows=4):
    g = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (rows, 6), generator=g), torch.randint(0, 11, (rows, 6), generator=g)


def loss_of(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model, precision, steps=3, start=0):
    losses = []
    for i in range(start, start + steps):
        loss = loss_of(model, *batch(i))
        precision.backward(loss)
        precision.step()
        losses.append(float(loss.detach()))
    return losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_fp32_is_plain_pytorch_to_the_bit():
    plain, optimizer, _ = make(fused=False)
    losses = []
    for i in range(4):
        loss = loss_of(plain, *batch(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model, _, precision = make("fp32", fused=False)
    assert train(model, precision, 4) == losses
    assert same(model, plain)


@pytest.mark.parametrize("policy", ["fp64", "tf32", "bf16", "fp16"])
def test_every_recipe_learns_and_stays_close_to_fp32(policy):
    model, _, precision = make("fp32")
    plain = train(model, precision, 6)
    model, _, precision = make(policy)
    losses = train(model, precision, 6)
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.02)  # a bfloat16 operand is off by 2^-9 at most: some 5 deep, 1%
    again = loss_of(model, *batch(0)).item()
    assert again < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float64 if policy == "fp64" else torch.float32}
    assert model(batch(0)[0]).dtype is (torch.float64 if policy == "fp64" else torch.float32)


def test_two_half_batches_accumulate_to_the_whole():
    whole, _, precision = make("fp64")
    precision.backward(loss_of(whole, *batch(0)))
    precision.step()
    halves, _, precision = make("fp64")
    x, y = batch(0)
    for rows in (slice(0, 2), slice(2, 4)):
        precision.backward(loss_of(halves, x[rows], y[rows]) / 2)
    precision.step()
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        # AdamW's first step is lr * g / (|g| + 1e-8): float64 sums in another order move g by some 1e-16
        assert torch.allclose(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_several_optimizers_fused_or_not_update_as_one_does(policy):
    one, _, precision = make(policy)
    train(one, precision)
    several, _, _ = make()
    halves = (
        [p for n, p in several.named_parameters() if "up" in n],
        [p for n, p in several.named_parameters() if "up" not in n],
    )
    optimizers = [torch.optim.AdamW(half, 1e-2, fused=fused) for half, fused in zip(halves, (True, False), strict=True)]
    train(several, Precision(several, optimizers, policy))
    for a, b in zip(one.parameters(), several.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # fused and plain AdamW differ in the order of operations


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_max_norm_clips_as_clip_grad_norm_does(policy, fused):
    model, _, _ = make(policy)
    loss_of(model, *batch(0)).backward()  # the gradients under this policy, unscaled
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    want = {n: p - 0.1 * p.grad for n, p in model.named_parameters()}
    torch.manual_seed(0)
    clipped = Net()
    precision = Precision(
        clipped, torch.optim.SGD(clipped.parameters(), 0.1, fused=fused), f"{policy}; loss_scale=4", max_norm=0.05
    )
    precision.backward(loss_of(clipped, *batch(0)))
    step = precision.step()
    # 4 is a power of two, so scaling changes no gradient but subnormal ones; clip_grad_norm_ adds 1e-6 to the norm
    assert float(step.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 0.1, "nothing was clipped"
    for name, p in clipped.named_parameters():
        assert torch.allclose(p, want[name], rtol=0, atol=0.1 * 0.05 * 1e-4), name


def test_max_norm_leaves_smaller_gradients_alone():
    plain, _, precision = make("fp32")
    train(plain, precision, 2)
    clipped, _, precision = make("fp32", max_norm=1e6)
    train(clipped, precision, 2)
    assert same(plain, clipped)


def test_a_function_that_is_checkpointed_instead_of_a_module_fails_loudly():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.own = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return checkpoint(lambda y: self.layer(y) @ self.own, x, use_reentrant=False)

    model = Own()
    Precision(model, None, "bf16")
    out = model(torch.randn(2, 4))  # recomputed, the product by hand would be outside of every module's forward
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        out.sum().backward()


def test_the_scheduler_moves_with_every_step():
    model, optimizer, _ = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, Precision(model, optimizer, "bf16", scheduler=scheduler), 3)
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 8


def test_masters_are_made_of_whatever_dtype_the_model_had():
    model = Net().half()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    precision = Precision(model, optimizer, "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(model, precision, 2)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).bfloat16()
    Precision(model, None, "bf16; *:master=float64")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model[1].running_var.dtype is torch.float32
    assert model(torch.randn(2, 1, 5, 5)).dtype is torch.float32


def test_float64_masters_keep_what_float32_would_lose():
    model, optimizer, _ = make()
    precision = Precision(model, optimizer, "bf16; *:master=float64")
    train(model, precision, 2)
    weights = [*model.parameters()]
    assert {w.dtype for w in weights} == {torch.float64}
    assert {m.dtype for s in optimizer.state.values() for k, m in s.items() if k != "step"} == {torch.float64}
    assert any(not torch.equal(w, w.float().double()) for w in weights)


def test_a_refused_precision_leaves_the_model_as_it_was():
    model, optimizer, precision = make("bf16")
    with pytest.raises(ConfigError, match="this model is already under a Precision; call its remove"):
        Precision(model, optimizer, "fp64")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    precision.remove()
    train(model, Precision(model, optimizer, "bf16"), 1)
    model, optimizer, _ = make()
    for policy, message in {
        "fp64; hat:input=fp16": "the rule 'hat:input=float16' matches nothing in this model; did you mean head?",
        "fp64; head:master=fp16": "head:master=float16: masters are float32, float64 or bfloat16",
        "fp64; head:compute=tf32": "head:compute=tf32: tf32 is a format for operands of products; use float32",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            Precision(model, optimizer, policy)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert "forward" not in model.head.__dict__
    precision = Precision(model, optimizer, "fp32")
    train(model, precision, 1)
    precision.remove()
    with pytest.raises(
        ConfigError, match=r"the policy stores tokens\.weight in another dtype, but the optimizer already"
    ):
        Precision(model, optimizer, "fp64")
    assert model.tokens.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda m, o: Precision(m, o, "bf16", max_norm=0.0), "max_norm is a positive number or None, got 0.0"),
        (lambda m, o: Precision(m, None, "bf16").step(), "step() needs an optimizer; this Precision was made without"),
        (lambda m, o: Precision(m, o, "bf16").step(), "step() found no gradient; call precision.backward(loss) first"),
        (
            lambda m, o: Precision(m, o, "bf16").backward(m(batch(0)[0])),
            "backward takes a loss of one number, got shape",
        ),
        (lambda m, o: Precision(m, o, "bf16").sites(), "no forward pass seen yet: run the model once, or give example"),
        (
            lambda m, o: Precision(m, torch.optim.LBFGS(m.parameters()), "bf16"),
            "LBFGS evaluates the loss several times",
        ),
        (lambda m, o: Precision(m.to("meta"), o, "bf16"), "mezzo runs on cpu and cuda, the model is on meta"),
    ],
)
def test_misuse_is_refused_with_what_to_do(what, message):
    model, optimizer, _ = make()
    with pytest.raises(ConfigError, match=re.escape(message)):
        what(model, optimizer)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(4, 4, sparse=True)
    precision = Precision(model, torch.optim.SGD(model.parameters(), 0.1), "bf16")
    precision.backward(model(torch.tensor([1])).sum())
    with pytest.raises(ConfigError, match="cannot unscale sparse gradients; make the embeddings with sparse=False"):
        precision.step()


def test_autocast_around_the_model_is_refused():
    model, _, _ = make("bf16")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast is on around a model that"):
        model(batch(0)[0])
    model(batch(0)[0])


def test_a_model_under_one_precision_inside_another_is_refused():
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.layer, self.hidden = nn.Linear(3, 3), [inner]

        def forward(self, x):
            return self.hidden[0](self.layer(x))

    inner = nn.Linear(3, 3)
    outer = Outer(inner)
    Precision(inner, None, "bf16")
    Precision(outer, None, "bf16")
    with pytest.raises(ConfigError, match="a model under one Precision calls a model under another"):
        outer(torch.randn(2, 3))


def test_remove_gives_the_model_back():
    model, optimizer, _ = make()
    before = model(batch(0)[0])
    model.up.forward = model.up.forward  # an instance's own forward comes back too
    own = model.up.forward
    precision = Precision(model, optimizer, "bf16")
    assert not torch.equal(model(batch(0)[0]), before)
    precision.remove()
    assert torch.equal(model(batch(0)[0]), before)
    assert model.up.forward is own
    assert "forward" not in model.head.__dict__
    assert not any("_mezzo_scope" in m.__dict__ for m in model.modules())


def test_using_another_policy_for_a_while_changes_the_products_and_nothing_else():
    model, _, precision = make("bf16")
    low = model(batch(0)[0])
    with precision.using("fp32"):
        high = model(batch(0)[0])
        with pytest.raises(ConfigError, match="matches nothing"), precision.using("fp32; hat:input=fp16"):
            pass
    assert torch.equal(model(batch(0)[0]), low)
    precision.remove()
    assert torch.equal(model(batch(0)[0]), high)
    assert not torch.equal(low, high)


def test_a_deep_copy_computes_with_its_own_weights_under_the_same_rules():
    class WithAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    model, x = WithAttention(), torch.randn(2, 3, 8)
    Precision(model, None, "fp32; attn.out_proj:fprop.*=bfloat16")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert not torch.equal(twin(x), model(x))
    out = twin(x)
    assert torch.equal(out, out.bfloat16().float()), "the copy's out_proj has lost its rule"


def test_activation_checkpointing_changes_no_bit():
    for policy in ("bf16", "fp16"):
        plain, _, precision = make(policy)
        losses = train(plain, precision)
        kept, _, precision = make(policy, checkpointed=True)
        assert train(kept, precision) == losses
        assert same(plain, kept)


def test_activation_checkpointing_with_rules_for_single_calls_is_refused():
    model, _, precision = make("bf16; up#0:fprop.a=float32", checkpointed=True)
    with pytest.raises(ConfigError, match=r"rules for single calls \(path#1\) cannot be followed"):
        precision.backward(loss_of(model, *batch(0)))


def test_an_exception_inside_the_model_leaves_nothing_behind():
    model, _, precision = make("bf16")
    want = model(batch(0)[0])
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    assert (precision.mode.path, precision.mode.depth) == ("(model)", 0)
    assert torch.randn(2, 2).matmul(torch.eye(2)).dtype is torch.float32
    assert torch.equal(model(batch(0)[0]), want)


def test_what_leaves_the_model_is_float32_in_any_container():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            assert y.dtype is torch.bfloat16
            return {"y": y, "more": [y, (y, 7)]}

    model = Many()
    Precision(model, None, "bf16")
    out = model(torch.randn(2, 3))
    assert out["y"].dtype is out["more"][0].dtype is out["more"][1][0].dtype is torch.float32


def test_a_child_called_by_itself_is_under_the_policy_too():
    model, _, _ = make("bf16")
    x = torch.randn(2, 8)
    y = model.up(x)
    assert y.dtype is torch.float32
    assert torch.equal(y, y.bfloat16().float())


def test_recurrent_and_bilinear_layers_run_in_their_weights_dtype_and_are_listed():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm, self.cell = nn.Linear(4, 4), nn.LSTM(4, 5, batch_first=True), nn.GRUCell(5, 5)
            self.both = nn.Bilinear(5, 5, 2)

        def forward(self, x):
            h = self.cell(self.lstm(self.first(x))[0][:, -1])
            return self.both(h, h)

    for policy, dtype in {"bf16": "float32", "bf16; *:master=float64": "float64"}.items():
        model = Recurrent()
        precision = Precision(model, torch.optim.AdamW(model.parameters(), 1e-2), policy)
        precision.backward(model(torch.randn(2, 3, 4)).square().mean())
        rows = {row.site: row for row in precision.sites()}
        for site in ("lstm:op lstm", "cell:op gru_cell", "both:op bilinear"):
            assert (rows[site].route, rows[site].format) == ("not covered", dtype)
        assert not bool(precision.step().skipped)


def test_a_network_for_images_with_batch_norm_learns_to_tell_bars_from_columns():
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 2, (64,), generator=generator)
    x = 0.3 * torch.randn(64, 1, 8, 8, generator=generator)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 3, :] += 1 - label
        x[i, 0, :, 3] += label
    for policy in ("fp32", "bf16", "fp16"):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 2)
        )
        precision = Precision(model, torch.optim.AdamW(model.parameters(), 0.03, fused=True), policy)
        for _ in range(25):
            precision.backward(F.cross_entropy(model(x), y))
            precision.step()
        model.eval()
        assert float((model(x).argmax(-1) == y).float().mean()) > 0.95, policy
        assert model[1].running_mean.dtype is torch.float32
        assert int(model[1].num_batches_tracked) == 25 - precision.skipped


def test_norms_may_compute_in_16_bits_if_a_rule_says_so():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
    precision = Precision(model, None, "bf16; 1:compute=bfloat16; 2:compute=bfloat16")
    before = model[1].running_mean.clone()
    model(torch.randn(4, 1, 6, 6)).sum().backward()
    assert not torch.equal(model[1].running_mean, before)
    assert {row.site: row.format for row in precision.sites()}["2:compute"] == "bfloat16"


def test_running_statistics_are_written_however_batch_norm_is_called():
    class Calls(nn.Module):
        def forward(self, x, mean, var):
            torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)
            return F.batch_norm(x, running_mean=mean, running_var=var, training=True)

    model = Calls()
    Precision(model, None, "fp64")
    mean, var = torch.zeros(2), torch.ones(2)
    with pytest.raises(RuntimeError):  # float32 statistics cannot hold what float64 computes: torch says so
        model(torch.randn(8, 2), mean, var)
    mean, var = mean.double(), var.double()
    model(torch.randn(8, 2), mean, var)
    assert mean.abs().min() > 0


def test_the_site_table_has_shapes_formats_routes_and_bytes():
    _, _, precision = make("bf16; head:*=float32")
    precision.sites(batch(0)[0])
    rows = {row.site: row for row in precision.sites()}
    n = 4 * 6  # rows of 6 tokens
    assert rows["up:fprop.a"] == type(rows["up:fprop.a"])("up:fprop.a", (4, 6, 8), "bfloat16", "emulated", n * 8 * 2, 1)
    assert rows["up:wgrad.out"].shape == (16, 8)
    assert (rows["up:wgrad.out"].format, rows["up:wgrad.out"].bytes) == ("float32", 16 * 8 * 4)
    assert (rows["head:fprop.out"].format, rows["head:fprop.out"].route) == ("float32", "native")
    assert rows["(model):fprop.query"].route == "flash"
    assert (rows["(model):fprop.probs"].shape, rows["(model):fprop.probs"].route) == ((4, 1, 6, 6), "kernel")
    assert (rows["tokens:compute"].shape, rows["tokens:compute"].format) == ((4, 6, 8), "float32")
    assert rows["head.weight:master"].bytes == 11 * 8 * 4
    assert rows["(model):op gelu"].route == "not covered"
    assert {row.route for row in rows.values()} == {"emulated", "native", "flash", "kernel", "not covered"}


def test_calls_counts_one_forward_pass_however_many_ran():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    precision = Precision(model, None, "bf16")
    for _ in range(3):
        model(torch.randn(2, 3))
    assert {row.calls for row in precision.sites() if row.site.startswith("layer:")} == {2}


def test_a_tap_hears_every_rounding_while_it_is_open():
    model, _, precision = make("bf16; *:fprop.probs=bfloat16")
    heard = []
    with precision.tap(lambda site, before, after: heard.append((str(site), before, after))):
        loss_of(model, *batch(0)).backward()
    sites = {site for site, _, _ in heard}
    for name in ("up", "down", "head"):
        assert {f"{name}:{p}.{r}" for p in ("fprop", "dgrad", "wgrad") for r in ("a", "b", "out")} <= sites
    attention = {site for site in sites if site.startswith("(model):")}
    assert attention == {f"(model):fprop.{r}" for r in ("query", "key", "value", "probs", "out")} | {
        f"(model):dgrad.{r}" for r in ("dout", "query", "key", "value")
    }
    assert all(before.shape == after.shape for _, before, after in heard)
    _, before, after = next(x for x in heard if x[0] == "up:fprop.a")
    assert torch.equal(after, before.to(torch.bfloat16))
    count = len(heard)
    loss_of(model, *batch(0)).backward()
    assert len(heard) == count


def test_state_survives_a_restart_to_the_bit():
    for policy in ("fp32", "bf16", "fp16; loss_scale.growth_interval=2"):
        model, optimizer, precision = make(policy)
        train(model, precision, 3)
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), precision.state_dict()))
        losses = train(model, precision, 3, start=3)
        again, optimizer, precision = make(policy, seed=7)
        again.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        precision.load_state_dict(kept[2])
        assert train(again, precision, 3, start=3) == losses
        assert same(model, again)
        assert precision.steps == 6


def test_the_loss_scales_controller_is_restored_whole():
    _, _, precision = make("fp16; loss_scale.init=2; loss_scale.hysteresis=3; loss_scale.growth_interval=9")
    for overflow in (False, False, True, True, True, True, True):
        precision.scales.loss.update(torch.tensor(overflow))
    state = precision.state_dict()
    assert [int(state[key]) for key in ("scale", "good", "bad", "at_floor")] == [1, 0, 2, 2]
    precision.scales.loss.update(torch.tensor(False))
    _, _, again = make("fp16; loss_scale.init=2; loss_scale.hysteresis=3; loss_scale.growth_interval=9")
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())


def test_routes_name_every_format_of_the_policy():
    _, _, precision = make("bf16; head:*=float32; up:input=float16")
    assert precision.routes == {"bfloat16": "emulated", "float16": "emulated", "float32": "native"}


def test_gradients_that_were_not_scaled_are_refused_under_loss_scaling():
    """They would be divided by 65,536 without a word."""
    model, _, precision = make("fp16")
    loss_of(model, *batch(0)).backward()
    with pytest.raises(ConfigError, match=r"do not come from precision\.backward\(loss\); call that instead"):
        precision.step()
    precision.backward(loss_of(model, *batch(0)))
    precision.step()
    precision.backward(loss_of(model, *batch(0)))
    precision.step()


def test_the_table_of_sites_has_the_moments_that_are_kept_low():
    model, _, precision = make("bf16; up:state=bfloat16 stochastic; down:state.exp_avg=e4m3@1x128")
    rows = {row.site: row for row in precision.sites(batch(0)[0]) if ":state" in row.site}
    weight = dict(model.named_parameters())["up.weight"]
    assert rows["up.weight:state"].format == "bfloat16 stochastic"
    assert (rows["up.weight:state"].route, rows["up.weight:state"].bytes) == ("stored", 2 * weight.numel())
    assert rows["down.weight:state.exp_avg"].format == "float8_e4m3fn@1x128"
    assert not any(site.startswith("head") for site in rows)
    assert {site.rpartition(":")[2] for site in rows} == {"state", "state.exp_avg"}, "AdamW has no momentum_buffer"


def test_a_convolution_under_blocks_is_refused_with_rules_that_work():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    x = torch.ones(1, 3, 8, 8)
    precision = Precision(model, None, "nvfp4")
    with pytest.raises(ConfigError, match="blocks would lie across them; take a format without blocks") as caught:
        model(x)
    precision.remove()
    Precision(model, None, "nvfp4; " + str(caught.value).partition("with the rules ")[2])
    model(x).sum().backward()
