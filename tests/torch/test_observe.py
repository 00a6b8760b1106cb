"""Observing: nothing of the training changes, what it says is right, and what would be lost is foretold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzo.errors import ConfigError
from mezzo.formats import get_format
from mezzo.formats.measure import measure
from mezzo.models.gpt_torch import GPT
from mezzo.models.shapes import preset
from mezzo.observe.whatif import answer
from mezzo.policy import Policy, Site
from mezzo.torch import Precision, observe, what_if
from mezzo.torch.attention import largest_logit

POLICIES = ("fp32", "fp64", "tf32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4", "bf16-pure", "bf16; *:saved=mxfp8",
            "fp8; *:input=e4m3@tensor delayed=4", "bf16; *:fprop.probs=bfloat16")  # fmt: skip


def gpt(policy: str, optimizer: bool = True, checkpoint_activations: bool = False, **more):
    shape = preset("gpt-tiny", vocab_size=256, **({"layers": 1, "d_model": 32, "heads": 2, "seq_len": 32} | more))
    generator = torch.Generator().manual_seed(0)
    model = GPT(shape, generator=generator, checkpoint_activations=checkpoint_activations)
    made = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True) if optimizer else None
    return model, Precision(model, made, policy)


def batch(number: int, tokens: int = 32):
    ids = torch.randint(0, 256, (4, tokens + 1), generator=torch.Generator().manual_seed(number))
    return ids[:, :-1], ids[:, 1:]


def train(policy: str, steps: int, every: int | None, whatif=(), **more):
    model, precision = gpt(policy, **more)
    observer = None if every is None else observe(model, every, whatif)
    losses = []
    for number in range(steps):
        loss = model(*batch(number))
        precision.backward(loss)
        precision.step()
        losses.append(loss.item())
    state = precision.state_dict()
    return losses, [*(p.detach() for p in model.parameters()), *(state[k] for k in sorted(state))], observer


@pytest.mark.parametrize("policy", POLICIES)
def test_observing_changes_no_bit(policy: str) -> None:
    losses, tensors, _ = train(policy, 4, None)
    for more in ({}, {"whatif": ("nvfp4", "fp16", "fp8; *:weight=e4m3@tensor delayed=2")}):
        same_losses, same, observer = train(policy, 4, 1, **more)
        assert losses == same_losses
        assert all(map(torch.equal, tensors, same))
        assert observer.last.step == 4
        observer.close()


def test_steps_are_sampled_by_their_number_alone_and_nothing_listens_between() -> None:
    model, precision = gpt("bf16")
    observer = observe(precision, 3)
    sampled = []
    for number in range(1, 8):
        assert observer.sampling == bool(precision.hooks.taps) == (number in (1, 3, 6))
        precision.backward(model(*batch(number)))
        precision.step()
        sampled += [number] if observer.of(number) else []
    assert sampled == [1, 3, 6]
    observer.close()
    observer.close()
    assert (precision.hooks.taps, precision.hooks.logits, precision.hooks.observers) == ([], [], [])
    assert precision.hooks.watching is False


def test_what_is_measured_is_what_the_tap_saw() -> None:
    model, precision = gpt("nvfp4")
    seen = {}
    observer = observe(model, 1)
    with precision.tap(lambda site, before, after: seen.setdefault(str(site), (before.clone(), after.clone()))):
        precision.backward(model(*batch(0)))
    precision.step()
    axes = {"fprop.a": -1, "fprop.b": -1, "dgrad.a": -1, "dgrad.b": 0, "wgrad.a": 0, "wgrad.b": 0}
    for role, axis in axes.items():
        site = f"blocks.0.mlp.up:{role}"
        one = observer.last.sites[Site(*site.split(":"))]
        expected = measure(*(t.double().numpy() for t in seen[site]), one.spec.fmt, axis=axis)
        for name in ("count", "zeros", "nonfinite", "underflowed"):
            assert getattr(one.measure, name) == getattr(expected, name), site
        assert one.measure.amax == expected.amax
        assert one.measure.sqnr == pytest.approx(expected.sqnr, abs=1e-6)
        assert np.array_equal(one.measure.histogram, expected.histogram)
        assert one.measure.blocks.count == expected.blocks.count
        assert one.measure.blocks.sqnr == pytest.approx(expected.blocks.sqnr, abs=1e-3)


def test_of_a_tensor_that_arrives_rounded_nothing_is_said() -> None:
    """The gradient of SwiGLU's product is computed in 16 bits: what that lost is not the next site's to tell."""
    _, _, observer = train("fp16", 1, 1)
    sites = {str(site): one for site, one in observer.last.sites.items()}
    arrives, rounds = sites["blocks.0.mlp.up:dgrad.a"], sites["blocks.0.mlp.up:fprop.a"]
    plain = arrives.to_dict()
    assert (plain["sqnr"], plain["underflow"], plain["overflow"]) == (None, None, None)
    assert str(arrives) == "float16: not known"
    assert rounds.to_dict()["underflow"] is not None
    assert " dB, " in str(rounds)


def test_what_cannot_be_given_to_them_is_an_error_that_says_so() -> None:
    model, precision = gpt("bf16", optimizer=False)
    assert what_if(model, "fp8", lambda: model(*batch(0))).whatif.keys() == {"fp8"}
    with pytest.raises(ConfigError, match="got float"):
        what_if(model, ["fp8"], lambda: 3.0)
    with pytest.raises(ConfigError, match="got str"):
        observe("model")
    sample = what_if(precision, [], lambda: model(*batch(0)))
    with pytest.raises(ConfigError, match="was not asked for; asked for: none"):
        sample.worst(3, "nvfp4")


def test_every_role_of_a_product_is_measured_once() -> None:
    for policy in ("bf16", "fp8", "nvfp4"):
        _, _, observer = train(policy, 1, 1)
        roles = {site.role for site in observer.last.sites if site.path == "blocks.0.mlp.up"}
        assert roles == {f"{p}.{r}" for p in ("fprop", "dgrad", "wgrad") for r in ("a", "b", "out")}
        count = observer.last.sites[Site("blocks.0.mlp.up", "fprop.a")].measure.count
        assert count == 4 * 32 * 32
        observer.close()


def test_a_bias_is_not_taken_for_its_weight() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    precision = Precision(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16")
    observer = observe(model, 1)
    precision.backward(model(torch.randn(4, 16)).square().mean())
    precision.step()
    counts = {site.role: one.measure.count for site, one in observer.last.sites.items()}
    assert (counts["fprop.b"], counts["wgrad.out"]) == (128, 128)
    observer.close()


def test_recomputed_blocks_are_measured_once() -> None:
    _, _, plain = train("bf16", 1, 1)
    _, _, again = train("bf16", 1, 1, checkpoint_activations=True)
    counts = [{str(site): one.measure.count for site, one in o.last.sites.items()} for o in (plain, again)]
    assert counts[0] == counts[1]


def test_updates_tell_what_is_lost() -> None:
    for policy, lost, unseen in (("bf16", 0.0, 1.0), ("bf16-pure; *:master=bfloat16", 1.0, None)):
        model = nn.Sequential(nn.Linear(32, 32, bias=False))
        model[0].weight.data.fill_(1.0)
        precision = Precision(model, torch.optim.SGD(model.parameters(), lr=1e-3), policy)
        observer = observe(model, 1)
        precision.backward((model(torch.ones(4, 32)) / 32).mean())  # updates of about 1e-6: far below 2**-9
        precision.step()
        update = observer.last.updates["0.weight"]
        assert (update.lost, update.unseen) == (lost, unseen), policy
        kinds = [finding.kind for finding in observer.last.findings]
        assert ("lost_updates" in kinds) == (lost > 0.5)
    assert update.ratio == 0.0


def test_what_kahan_keeps_is_not_lost() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    model[0].weight.data.fill_(1.0)
    precision = Precision(model, torch.optim.SGD(model.parameters(), lr=1e-3), "bf16; *:master=bfloat16 kahan")
    observer = observe(model, 1)
    precision.backward((model(torch.ones(4, 32)) / 32).mean())
    precision.step()
    assert observer.last.updates["0.weight"].lost == 0.0


def test_a_skipped_step_has_no_updates() -> None:
    model, precision = gpt("fp16")
    observer = observe(model, 1)
    precision.backward(model(*batch(0)) * torch.inf)
    assert precision.step().skipped_now()
    assert observer.last.updates == {}
    assert observer.last.findings[0].kind == "nonfinite"


@pytest.mark.parametrize("causal", [False, True])
def test_the_largest_logit_is_that_of_attention_in_pieces_too(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 17, 8, generator=g), torch.randn(2, 3, 17, 8, generator=g)
    q[1, 2, 3], k[1, 2, 9] = 40.0, 40.0  # the largest of all, hidden where it is causal
    allowed = torch.ones(17, 17, dtype=torch.bool).tril() if causal else torch.ones(17, 17, dtype=torch.bool)
    scores = (q @ k.mT * 0.5).masked_fill(~allowed, 0.0)
    for limit in (1 << 20, 17 * 17, 40, 1):
        monkeypatch.setattr("mezzo.torch.attention.LOGITS", limit)
        assert largest_logit(q, k, None, causal, 0.5) == pytest.approx(float(scores.abs().max()))
    masked = scores.masked_fill(torch.arange(17) >= 8, 0.0)
    mask = torch.arange(17).expand(17, 17) < 8
    assert largest_logit(q, k, mask, causal, 0.5) == pytest.approx(float(masked.abs().max()))
    added = torch.where(mask, 0.0, -math.inf)
    assert largest_logit(q, k, added, causal, 0.5) == pytest.approx(float(masked.abs().max()))


def test_logits_of_single_heads_and_masks_of_large_numbers() -> None:
    q, k = torch.randn(5, 8), torch.randn(7, 8)
    mask = torch.zeros(5, 7)
    mask[:, 3:] = torch.finfo(torch.float32).min
    expected = float((q @ k.T * 8**-0.5)[:, :3].abs().max())
    assert largest_logit(q, k, mask, False, None) == pytest.approx(expected)
    assert largest_logit(q, k, None, False, None) == pytest.approx(float((q @ k.T * 8**-0.5).abs().max()))


def test_a_forward_pass_without_gradients_in_between_hides_nothing() -> None:
    counts = []
    for between in (False, True):
        model, precision = gpt("bf16")
        observer = observe(model, 1)
        loss = model(*batch(0))
        if between:
            with torch.no_grad():
                model(*batch(1))
        precision.backward(loss)
        precision.step()
        counts.append({str(site): one.measure.count for site, one in observer.last.sites.items()})
        observer.close()
    assert counts[0] == counts[1]


def test_a_learning_rate_of_zero_loses_no_update() -> None:
    model, precision = gpt("bf16")
    precision.optimizers[0].param_groups[0]["lr"] = 0.0
    observer = observe(model, 1)
    precision.backward(model(*batch(0)))
    precision.step()
    assert observer.last.updates == {}
    observer.close()


def test_a_state_that_is_loaded_decides_anew_which_step_is_sampled() -> None:
    model, precision = gpt("bf16")
    observer = observe(model, 4)
    state = precision.state_dict() | {"steps": torch.tensor(6)}
    precision.load_state_dict(state)
    assert not observer.sampling
    precision.load_state_dict(state | {"steps": torch.tensor(7)})
    assert observer.sampling
    observer.close()


def test_a_model_without_attention_to_measure_has_no_logits_and_grouped_heads_have() -> None:
    class Grouped(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model = Grouped()
    precision = Precision(model, None, "bf16")
    q = torch.full((1, 4, 8, 16), 5.0, requires_grad=True)
    k = torch.full((1, 2, 8, 16), 5.0)
    for factor, found in ((1.0, []), (1.1, ["(model)"])):
        sample = what_if(precision, [], [lambda f=factor: model(q * f, k, k).sum()])
        assert sample.logits == {"(model)": pytest.approx(100 * factor)}
        assert [finding.site for finding in sample.findings if finding.kind == "logits"] == found


# --- what if ---


@pytest.mark.parametrize("policy", ["fp8", "mxfp8", "nvfp4", "fp16", "fp8; *:input=e4m3@tensor delayed=4"])
def test_what_if_foretells_the_sqnr_of_every_site(policy: str) -> None:
    """The same weights and batch; tensors differ by the noise of the layers before, and so does what is lost of them:
    within 0.5 dB, of weights that were trained a little (at first all values of a tensor are much alike). Results, that
    a few large values decide in so small a model, are left to benchmarks/whatif.py."""
    model, precision = gpt("fp32", d_model=64, layers=2, seq_len=64)
    for number in range(20):
        precision.backward(model(*batch(number % 4, 64)))
        precision.step()
    foretold = what_if(precision, [policy], [lambda: model(*batch(0, 64))]).whatif[str(Policy.of(policy))]
    precision.remove()
    true = what_if(Precision(model, None, policy), [], [lambda: model(*batch(0, 64))]).sites
    assert foretold.keys() == true.keys()
    compared = 0
    for site, one in true.items():
        assert foretold[site].spec.fmt == one.spec.fmt
        if math.isfinite(one.measure.sqnr) and site.role[-2:] in (".a", ".b"):
            compared += 1
            assert foretold[site].measure.sqnr == pytest.approx(one.measure.sqnr, abs=0.5), site
    assert compared > 20


def test_what_a_sixteen_bit_run_cannot_know_is_not_said() -> None:
    model, precision = gpt("bf16", optimizer=False)
    found = what_if(precision, ["fp16", "fp8"], [lambda: model(*batch(0))]).whatif
    query = Site("blocks.0.attn", "fprop.query")  # arrives in bfloat16
    assert math.isnan(found["fp16"][query].measure.sqnr)
    up = Site("blocks.0.mlp.up", "dgrad.a")
    assert 20 < found["fp8"][up].measure.sqnr < 40


def test_values_that_would_overflow_come_first_and_get_a_rule() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight.data.mul_(3e5)
    precision = Precision(model, None, "fp32")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    policy = Policy.of("fp16; loss_scale=none")
    sample = what_if(precision, [policy], [lambda: model(x).square().mean() * 1e-12])
    found = answer(sample, policy, spare=2)
    (first, one), (second, _) = found.sites[:2]
    assert (str(first), str(second)) == ("0:fprop.out", "1:fprop.a")
    assert one.overflows
    assert one.measure.sqnr > 60, "what became infinite is not in it"
    assert found.rules == ("0:fprop.out=bfloat16", "1:fprop.[ab]=bfloat16")
    spared = Policy.of(found.spared)
    assert not any(one.overflows for _, one in what_if(precision, [spared], [lambda: model(x).square().mean()])
                   .whatif[str(spared)].items() if _.path == "0" and _.role == "fprop.out")  # fmt: skip


def test_a_rule_for_one_call_is_refused_where_calls_are_not_told_apart() -> None:
    _, precision = gpt("bf16", optimizer=False)
    with pytest.raises(ConfigError, match="tells no calls apart"):
        what_if(precision, ["bf16; head#1:fprop.a=nvfp4"], [lambda: precision.model(*batch(0))])


def test_what_if_leaves_no_trace() -> None:
    model, precision = gpt("fp8; *:input=e4m3@tensor delayed=4; loss_scale=dynamic")
    precision.backward(model(*batch(0)))
    before = {k: v.clone() for k, v in precision.state_dict().items()} | {
        n: p.grad.clone() for n, p in model.named_parameters()
    }
    what_if(model, ["nvfp4"], [lambda: model(*batch(1))])
    after = precision.state_dict() | {n: p.grad for n, p in model.named_parameters()}
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_asked_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="under no Precision: make precision"):
        observe(nn.Linear(4, 4))
    model, precision = gpt("bf16")
    with pytest.raises(ConfigError, match="under no Precision"):
        observe(model.blocks[0])
    with pytest.raises(ConfigError, match="every is a number of steps from 1 on, got 0"):
        observe(model, 0)
    with pytest.raises(ConfigError):
        observe(model, whatif=["bf61"])
    assert precision.hooks.observers == []
    with pytest.raises(ConfigError, match="met no site"):
        what_if(model, ["fp8"], [lambda: torch.ones((), requires_grad=True) * 2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_measured_in_the_first_step_however_it_is_given_and_beside_another_one() -> None:
    (one, first), (other, second) = gpt("bf16"), gpt("bf16")
    compiled = torch.compile(one)
    observers = [observe(first, 1), observe(other, 2)]
    first.backward(compiled(*batch(0)))
    first.step()
    second.backward(other(*batch(0)))
    second.step()
    assert [len(observer.last.sites) > 50 for observer in observers] == [True, True]
    first.remove()  # closes its observer
    assert first.hooks.taps == []
    observers[1].close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sampled_step_of_compiled_code_is_measured_and_the_next_one_is_compiled_again() -> None:
    ran = []

    def backend(graph, example):
        def run(*inputs):
            ran.append(number)
            return graph.forward(*inputs)

        return run

    model, precision = gpt("bf16")
    compiled = torch.compile(model, backend=backend)
    observer = observe(compiled, 3)
    for number in range(1, 5):
        precision.backward(compiled(*batch(number)))
        assert (number in ran) == (number in (2, 4))
        precision.step()
    assert [number for number in range(1, 5) if observer.of(number)] == [1, 3]
    assert len(observer.last.sites) > 50
    observer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_must_be_one_graph_says_why_it_cannot_be_measured() -> None:
    torch._dynamo.reset()  # other tests' shapes would make this graph's dynamic
    model, precision = gpt("bf16")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with observe(compiled, 3), pytest.raises(Exception, match=r"compile it without fullgraph=True, or close"):
        compiled(*batch(0))
    precision.backward(compiled(*batch(0)))
    assert not precision.step().skipped_now()


def test_a_format_can_be_asked_for_that_no_site_could_store() -> None:
    model, precision = gpt("bf16", optimizer=False)
    (sites,) = what_if(precision, ["fp32; *:input=e2m1@tensor"], [lambda: model(*batch(0))]).whatif.values()
    one = sites[Site("blocks.0.mlp.up", "fprop.a")]
    assert one.spec.fmt == get_format("e2m1@tensor")
    assert 5 < one.measure.sqnr < 20
