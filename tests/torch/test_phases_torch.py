"""Phases of a model's training: nothing is lost at a change, and what a calibration measures is what it says."""

import json
import math

import pytest
import torch
from torch import nn

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy
from mezzo.policy.trigger import Skipped, Underflow
from mezzo.torch import Phases, Precision
from mezzo.torch.calibrate import Calibration, compare

DELAYED = "fp8; *:fprop.a=e4m3@tensor delayed=4; *:wgrad.b=e4m3@tensor delayed=4; *:grad_output=e5m2@tensor delayed=4"
SCALED = f"{DELAYED}; loss_scale.init=1024; loss_scale.growth_interval=3"


class Net(nn.Module):
    def __init__(self, *more):
        super().__init__()
        self.a = nn.Linear(12, 24)
        self.more = nn.Sequential(*more)
        self.b = nn.Linear(24, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.b(self.more(torch.tanh(self.a(x))))))


def under(policy, *more, lr=0.05):
    torch.manual_seed(0)
    model = Net(*more)
    return model, Precision(model, torch.optim.Adam(model.parameters(), lr=lr), policy)


def data(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 12, generator=generator), torch.randint(5, (16,), generator=generator)


def loss_of(model, number, factor=1.0):
    x, y = data(number)
    return nn.functional.cross_entropy(model(x * factor), y)


def step(model, precision, number, phases=None, factor=1.0):
    """One step; returns its record."""
    loss = loss_of(model, number, factor)
    precision.backward(loss)
    done = precision.step()
    record = {"step": number, "loss": loss.item(), "skipped": done.skipped_now(), "loss_scale": float(done.loss_scale)}
    return record | (phases.after(record) if phases is not None else {})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def listed(*policies, ends=(), **more):
    """Phases of these policies that end after these steps."""
    return [Phase(Policy.parse(p), until=end, **more) for p, end in zip(policies, [*ends, None], strict=True)]


def bits(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one, other):
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differ, differ


# --- hand-over ---


@pytest.mark.parametrize("policy", ["fp8", DELAYED, SCALED, "fp16", "nvfp4", "bf16-pure"])
def test_a_phase_of_no_steps_in_between_changes_no_bit(policy):
    high = "fp32; *:master=bfloat16 stochastic; *:state=bfloat16 stochastic" if policy == "bf16-pure" else "fp32"

    def run(phased):
        model, precision = under(policy)
        phases = Phases(precision, listed(policy, high, policy, ends=(4, 4)), 8) if phased else None
        records = [step(model, precision, n, phases) for n in range(1, 9)]
        return [r["loss"] for r in records], weights(model), bits(precision.state_dict()), records

    alone, phased = run(False), run(True)
    assert alone[0] == phased[0]
    assert all(map(torch.equal, alone[1], phased[1]))
    assert [r.get("entered") for r in phased[3]] == [None] * 3 + [3] + [None] * 4
    same(alone[2], phased[2])


@pytest.mark.parametrize("policy", [DELAYED, SCALED, "fp16"])
def test_switching_there_and_back_between_two_steps_changes_no_bit(policy):
    def run(back_and_forth):
        model, precision = under(policy)
        losses = []
        for n in range(1, 9):
            losses.append(step(model, precision, n)["loss"])
            if back_and_forth:
                precision.switch("fp32")
                precision.switch(policy)
        return losses, weights(model)

    (one, first), (other, second) = run(False), run(True)
    assert one == other
    assert all(map(torch.equal, first, second))


def test_the_loss_scale_goes_on_where_it_stopped():
    fp16 = "fp16; loss_scale.init=4096; loss_scale.growth_interval=3"
    model, precision = under(fp16)
    phases = Phases(precision, listed(fp16, "fp32", fp16, ends=(4, 8)), 12)
    scales = [step(model, precision, n, phases)["loss_scale"] for n in range(1, 13)]
    # Three good steps double it; the fourth, alone in its count, and the next two double it again.
    assert scales == [4096] * 3 + [8192] + [1] * 4 + [8192] * 2 + [16384] * 2


def test_delayed_scales_wait_as_they_are_while_another_policy_trains():
    model, precision = under(DELAYED)
    for n in range(1, 7):
        step(model, precision, n)
    before = precision.scales.history.clone()
    assert before.any()
    precision.switch("fp32")
    for n in range(7, 17):
        step(model, precision, n)
    assert torch.equal(precision.scales.history, before)
    precision.switch(DELAYED)
    assert torch.equal(precision.scales.history, before)
    step(model, precision, 17)
    assert not torch.equal(precision.scales.history, before)


def test_what_is_remembered_of_gradients_is_in_units_of_the_loss_scale_as_it_is():
    model, precision = under(SCALED)
    for n in range(1, 6):
        step(model, precision, n)
    scales = precision.scales
    assert scales.loss.scale == 2048
    units = scales.history.clone()
    units[scales._gradients] /= 2048
    precision.switch("fp32")
    assert torch.equal(scales.history, units)
    precision.switch(SCALED, loss_scale=64.0)
    units[scales._gradients] *= 64
    assert torch.equal(scales.history, units)
    assert scales.loss.scale == 64


def test_a_measured_loss_scale_stays_between_floor_and_ceiling_and_is_not_for_constant_scaling():
    _, precision = under("fp32")
    precision.switch("fp16", loss_scale=2.0**40)
    assert precision.scales.loss.scale == 2**24
    precision.switch("fp16; loss_scale=512", loss_scale=64.0)
    assert precision.scales.loss.scale == 512
    precision.switch("bf16", loss_scale=64.0)
    assert precision.scales.loss.scale == 1


# --- calibration ---


def test_a_calibration_in_float32_measures_what_the_delayed_scales_of_the_next_phase_would_be():
    model, precision = under("fp32")
    with torch.no_grad():
        model.head.bias += 100.0  # larger than any weight: 8 bits leave biases as they are
    following = Policy.parse(
        "fp32; *:input=e4m3@tensor delayed=4; *:weight=e4m3@tensor delayed=4; *:grad_output=e5m2@tensor delayed=4"
    )
    phases = Phases(precision, [Phase(Policy("fp32"), until=3, calibrate=True), Phase(following)], 6)
    wanted, seen = {}, {}
    for name, layer in (("a", model.a), ("b", model.b), ("head", model.head)):

        def note(_, x, out, name=name):
            seen[f"{name}.in"] = x[0].detach()
            out.register_hook(lambda grad: seen.update({f"{name}.grad": grad}))

        layer.register_forward_hook(note)
    for n in range(1, 4):
        for name, layer in (("a", model.a), ("b", model.b), ("head", model.head)):
            wanted.setdefault(f"{name}:weight", []).insert(0, layer.weight.detach().abs().max())
        step(model, precision, n, phases)
        for name in ("a", "b", "head"):
            wanted.setdefault(f"{name}:input", []).insert(0, seen[f"{name}.in"].abs().max())
            wanted.setdefault(f"{name}:grad", []).insert(0, seen[f"{name}.grad"].abs().max())
    assert phases.number == 2
    kinds = {"fprop.a": "input", "wgrad.b": "input", "fprop.b": "weight", "dgrad.b": "weight", "dgrad.a": "grad",
             "wgrad.a": "grad"}  # fmt: skip
    rows = precision.table(following).delayed_rows()
    assert len(rows) >= 18
    for name in ("a", "b", "head"):
        for role, kind in kinds.items():
            row = next(row for site, row in rows.items() if (site.path, site.role) == (name, role))
            found = precision.scales.history[row]
            assert torch.equal(found[:3], torch.stack(wanted[f"{name}:{kind}"])), (name, role)
            top = 57344.0 if kind == "grad" else 448.0
            assert precision.scales.wanted[row] == found.max() / torch.tensor(top)


@pytest.mark.parametrize("within", ["fp32", "bf16"])
def test_scales_calibrated_under_one_policy_are_near_those_that_training_under_the_other_gives(within):
    first = [Phase(Policy.parse(within), until=4, calibrate=True), Phase(Policy.parse(DELAYED))]
    model, precision = under(within)
    phases = Phases(precision, first, 8)
    for n in range(1, 5):
        step(model, precision, n, phases)
    other, low = under(DELAYED)
    for n in range(1, 5):
        step(other, low, n)
    assert precision.scales.rows == low.scales.rows
    used = low.scales.wanted > 0
    assert torch.equal(precision.scales.wanted > 0, used)
    assert precision.scales.wanted[used].tolist() == pytest.approx(low.scales.wanted[used].tolist(), rel=0.5)


def test_the_measured_loss_scale_is_the_largest_power_of_two_with_room_for_the_largest_gradient():
    model, precision = under("fp32")
    phases = Phases(precision, [Phase(Policy("fp32"), until=3, calibrate=True), Phase(Policy("fp16"))], 6)
    largest = 0.0

    def note(site, before, after):
        nonlocal largest
        if site.role in ("dgrad.a", "wgrad.a"):
            largest = max(largest, float(before.abs().max()))

    with precision.tap(note):
        records = [step(model, precision, n, phases) for n in range(1, 4)]
    found = records[-1]["calibration"]["loss_scale"]
    assert found * largest <= 65504 / 16 < 2 * found * largest
    assert precision.scales.loss.scale == found
    assert step(model, precision, 4, phases)["loss_scale"] == found
    assert "calibration" not in records[0]


def test_a_step_that_is_not_finite_leaves_no_trace_in_a_calibration():
    def run(factors):
        model, precision = under("fp32", lr=0.0)
        target = Policy.parse("fp16; *:input=e4m3@tensor delayed=4; *:fprop.b=e4m3@tensor delayed=4")
        phases = Phases(precision, [Phase(Policy("fp32"), until=len(factors), calibrate=True), Phase(target)], 9)
        records = [step(model, precision, n, phases, factor) for n, factor in enumerate(factors, 1)]
        return records, precision.scales

    (good, clean), (bad, scales) = run([1.0, 1.0]), run([1.0, math.nan])
    assert [r["skipped"] for r in bad] == [False, True]
    assert torch.isfinite(scales.wanted).all()
    assert torch.equal(scales.history[:, 0], clean.history[:, 1]), "the first step's only"
    assert bad[-1]["calibration"]["loss_scale"] == pytest.approx(good[-1]["calibration"]["loss_scale"], rel=1.0)


def test_two_calibrating_phases_each_measure_for_the_next():
    plan = [Phase(Policy("fp32"), until=2, calibrate=True), Phase(Policy.parse(DELAYED), until=4, calibrate=True),
            Phase(Policy("fp16"))]  # fmt: skip
    model, precision = under("fp32")
    phases = Phases(precision, plan, 8)
    first = phases._calibration
    records = [step(model, precision, n, phases) for n in range(1, 5)]
    assert "loss_scale" not in records[1]["calibration"], "fp8 scales no loss"
    assert records[3]["calibration"]["loss_scale"] > 1
    assert first not in precision.hooks.taps
    assert precision.hooks.taps == []


def test_nothing_listens_where_nothing_is_measured():
    model, precision = under("fp32")
    phases = Phases(precision, listed("fp16", "fp32", ends=(2,)), 4)
    for n in range(1, 5):
        assert precision.hooks.taps == []
        step(model, precision, n, phases)


# --- compare ---


def test_comparing_two_policies_changes_nothing_not_even_gradients_that_are_there():
    model, precision = under(SCALED, nn.BatchNorm1d(24), nn.Dropout(0.1))
    for n in range(1, 6):
        step(model, precision, n)
    precision.backward(loss_of(model, 6))

    def everything():
        gradients = {name: p.grad for name, p in model.named_parameters()}
        more = {"seen": precision.scales.seen, "drawn": torch.get_rng_state(), "scaled": torch.tensor(precision.scaled)}
        return bits(
            {**precision.state_dict(), **model.state_dict(), **more} | {f"{k} grad": v for k, v in gradients.items()}
        )

    before, taps = everything(), [*precision.hooks.taps]
    seen = []
    with precision.tap(lambda site, *_: seen.append(site)):
        for _ in range(2):
            found = compare(
                precision,
                Policy.parse(SCALED),
                Policy("fp32"),
                lambda: loss_of(model, 99),
                lambda: loss_of(model, 8).item(),
            )
    assert len(found) == 4
    same(before, everything())
    assert (seen, precision.hooks.taps) == ([], taps)
    assert not precision.step().skipped_now()


def test_entering_a_calibration_with_a_comparison_trains_to_the_same_bits_as_without():
    def run(**more):
        model, precision = under("fp8; *:grad_output=e5m2@tensor stochastic", nn.BatchNorm1d(24), nn.Dropout(0.1))
        plan = [Phase(precision.policy, until=2), Phase(Policy("fp32"), until=4, calibrate=True),
                Phase(precision.policy)]  # fmt: skip
        if more:
            more = {"loss": lambda: loss_of(model, 50), "evaluate": lambda: loss_of(model, 60).item()}
        phases = Phases(precision, plan, 8, **more)
        torch.manual_seed(7)
        records = [step(model, precision, n, phases) for n in range(1, 9)]
        return records, weights(model), bits(dict(model.named_buffers())), bits(precision.state_dict())

    without, with_both = run(), run(loss=True)
    assert [r["loss"] for r in without[0]] == [r["loss"] for r in with_both[0]]
    assert all(map(torch.equal, without[1], with_both[1]))
    same(without[2], with_both[2])
    same(without[3], with_both[3])
    assert set(with_both[0][1]["calibration"]) == {
        "gradient_cosine", "gradient_ratio", "val_loss_low", "val_loss_high"
    }  # fmt: skip


def test_the_figures_of_a_comparison_are_those_computed_by_hand():
    model, precision = under("fp16")
    found = compare(
        precision, Policy("fp8"), Policy("fp32"), lambda: loss_of(model, 1), lambda: loss_of(model, 2).item()
    )

    def gradient(policy):
        torch.manual_seed(0)
        other = Net()
        Precision(other, None, policy)
        loss_of(other, 1).backward()
        return torch.cat([p.grad.double().flatten() for p in other.parameters()]), loss_of(other, 2).item()

    (low, low_loss), (high, high_loss) = gradient("fp8"), gradient("fp32")
    assert found["gradient_cosine"] == pytest.approx(float(torch.cosine_similarity(low, high, 0)), abs=1e-6)
    assert found["gradient_ratio"] == pytest.approx(float(low.norm() / high.norm()), rel=1e-4)
    assert (found["val_loss_low"], found["val_loss_high"]) == (low_loss, high_loss)
    assert 0.9 < found["gradient_cosine"] < 1 - 1e-5


def test_both_gradients_of_a_comparison_see_the_same_dropout():
    model, precision = under("fp32", nn.Dropout(0.5))
    found = compare(precision, Policy("fp32"), Policy("fp32"), lambda: loss_of(model, 1), None)
    assert found == {"gradient_cosine": pytest.approx(1, abs=1e-12), "gradient_ratio": 1.0}


# --- state ---

PLAN = [
    Phase(Policy.parse(SCALED), until=3),
    Phase(Policy("fp32"), until=6, calibrate=True),
    Phase(Policy("fp16"), until=9, when=Skipped(above=3)),
    Phase(Policy.parse(SCALED)),
]


@pytest.mark.parametrize("at", range(1, 12))
def test_a_restart_anywhere_in_the_phases_goes_on_to_the_bit(at):
    def fresh():
        model, precision = under(SCALED)
        return model, precision, Phases(precision, PLAN, 12)

    model, precision, phases = fresh()
    records = []
    for n in range(1, 13):
        records.append(step(model, precision, n, phases))
        if n == at:
            saved = json.loads(json.dumps(phases.state_dict()))
            kept = bits(model.state_dict()), bits(precision.state_dict())
            moments = json_free(precision.optimizers[0].state_dict())
    again, other, others = fresh()
    again.load_state_dict(kept[0])
    other.optimizers[0].load_state_dict(moments)
    others.load_state_dict(saved)
    other.load_state_dict(kept[1])
    assert others.state_dict() == saved
    assert (others.number, others.policy) == (records[at]["phase"], PLAN[records[at]["phase"] - 1].policy)
    assert [step(again, other, n, others) for n in range(at + 1, 13)] == records[at:]
    assert all(map(torch.equal, weights(model), weights(again)))
    same(bits(precision.state_dict()), bits(other.state_dict()))


def json_free(state):
    return {**state, "state": {k: bits(v) for k, v in state["state"].items()}}


def test_loading_into_a_calibrating_phase_leaves_one_calibration_listening():
    model, precision = under("fp32")
    phases = Phases(precision, PLAN[1:], 12)
    step(model, precision, 1, phases)
    phases.load_state_dict(phases.state_dict())
    assert sum(isinstance(tap, Calibration) for tap in precision.hooks.taps) == 1


def test_a_state_of_a_longer_schedule_is_refused():
    _, precision = under(SCALED)
    phases = Phases(precision, PLAN, 12)
    with pytest.raises(ConfigError, match=r"the saved run is in phase 5, the schedule has 4"):
        phases.load_state_dict({"index": 4, "begin": 9, "memory": [], "step": 9})


# --- triggers that are measured ---


def test_the_share_that_underflows_is_counted_on_the_steps_that_it_is_due_on():
    when = Underflow("*:grad_output", above=0.99, window=2, every=3)
    model, precision = under("fp16; loss_scale=0.000001")
    phases = Phases(precision, [Phase(precision.policy, until=8, when=when), Phase(Policy("fp32"))], 9)
    found, counted, taps = [], [], []

    def count(site, before, after):
        if site.role in ("dgrad.a", "wgrad.a"):
            counted[-1][0] += int(((before != 0) & (after == 0)).sum())
            counted[-1][1] += int((before != 0).sum())

    for n in range(1, 8):
        counted.append([0, 0])
        taps.append(len(precision.hooks.taps))
        with precision.tap(count):
            found.append(step(model, precision, n, phases).get("underflow"))
    assert taps == [1, 0, 0, 1, 0, 0, 1]
    shares = [zero / there for zero, there in counted]
    assert found == [{"*:grad_output": shares[0]}, None, None, {"*:grad_output": shares[3]}, None, None,
                     {"*:grad_output": shares[6]}]  # fmt: skip
    assert 0 < shares[0] < 1


def test_a_phase_ends_when_too_much_underflows():
    when = Underflow("head:grad_output", above=0.01, window=2, every=1)
    model, precision = under("fp16; loss_scale=0.000001")
    phases = Phases(precision, [Phase(precision.policy, when=when), Phase(Policy("fp32"))], 9)
    assert [step(model, precision, n, phases)["phase"] for n in range(1, 5)] == [1, 1, 2, 2]


def test_sites_that_the_model_does_not_have_or_that_no_rounding_shows_are_errors():
    model, precision = under("bf16")
    for sites, message in (
        ("nowhere:input", r"^phase 1: the trigger underflow: nowhere:input matches nothing in this model"),
        ("*:fprop.query", r"phase 1: no rounding at \*:fprop.query was seen in its step. Compiled code tells of none"),
    ):
        plan = [Phase(Policy("bf16"), when=Underflow(sites, above=0.1)), Phase(Policy("fp32"))]
        with pytest.raises(ConfigError, match=message):
            step(model, precision, 1, Phases(precision, plan, 4))


# --- refused ---


def test_a_phase_that_stores_weights_or_moments_otherwise_is_an_error_that_names_it_and_the_rule():
    for low, high, message in (
        ("bf16-pure", "bf16", r"phase 2: .* a:master is bfloat16 stochastic under bf16-pure and float32 under bf16; "
                              r"give the latter the rule \*:master=bfloat16 stochastic"),
        ("bf16; *:state=bfloat16", "bf16", r"phase 2: .* a:state.exp_avg is bfloat16 .* the rule \*:state=bfloat16"),
    ):  # fmt: skip
        _, precision = under(low)
        with pytest.raises(ConfigError, match=message):
            Phases(precision, listed(low, high, ends=(2,)), 4)
        with pytest.raises(ConfigError, match=r"a phase cannot change how weights and moments are stored"):
            precision.switch(high)
        assert str(precision.policy) == str(Policy.parse(low))


def test_a_phase_that_cannot_be_carried_out_is_an_error_that_names_it():
    _, precision = under("bf16")
    with pytest.raises(ConfigError, match=r"^phase 2: the rule 'haed:\*=float32' matches nothing in this model"):
        Phases(precision, listed("bf16", "bf16; haed:*=float32", ends=(2,)), 4)


def test_a_policy_is_switched_between_steps_only():
    model, precision = under("fp16")
    with precision.using("fp32"), pytest.raises(ConfigError, match=r"switch\(\) inside of using\(\): leave that first"):
        precision.switch("bf16")
    precision.backward(loss_of(model, 1))
    with pytest.raises(ConfigError, match=r"switch\(\) with gradients of a scaled loss: call it after step\(\)"):
        precision.switch("bf16")
    precision.step()
    precision.switch("bf16")
    assert str(precision.policy) == "bf16"


def test_warming_needs_the_loss_of_a_batch():
    _, precision = under("fp16")
    with pytest.raises(ConfigError, match=r"warm\(\) needs the loss of a batch: Phases\(…, loss="):
        Phases(precision, "dmp", 10).warm()


# --- compiled ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calibrating_in_compiled_code_is_a_clear_error():
    torch._dynamo.reset()
    model, precision = under("fp32")
    phases = Phases(precision, [Phase(Policy("fp32"), until=2, calibrate=True), Phase(Policy("fp16"))], 4)
    call = torch.compile(model)
    x, y = data(1)
    precision.backward(nn.functional.cross_entropy(call(x), y))
    precision.step()
    with pytest.raises(ConfigError, match=r"phase 1 calibrates, but no rounding of its step was seen: compiled code"):
        phases.after({"step": 1, "skipped": False, "loss_scale": 1.0})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("low", ["fp16", DELAYED])
def test_a_schedule_that_was_warmed_compiles_nothing_at_a_change(low):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, precision = under(low)
    call = torch.compile(model, backend=count)

    def loss(n=1):
        x, y = data(n)
        return nn.functional.cross_entropy(call(x), y)

    phases = Phases(precision, listed(low, "fp32", low, "bf16", ends=(2, 4, 6)), 8, loss=loss)
    state, before = bits(precision.state_dict()), weights(model)
    phases.warm()
    same(state, bits(precision.state_dict()))
    assert all(map(torch.equal, before, weights(model)))
    assert all(p.grad is None for p in model.parameters())
    warmed = len(graphs)
    assert warmed >= 3
    numbers = []
    for n in range(1, 9):
        precision.backward(loss(n))
        done = precision.step()
        numbers.append(phases.number)
        phases.after({"step": n, "skipped": done.skipped_now(), "loss_scale": float(done.loss_scale)})
    assert numbers == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(graphs) == warmed


def test_an_evaluation_between_a_step_and_its_record_is_not_counted_as_underflow():
    shares = []
    for evaluates in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        precision = Precision(model, torch.optim.SGD(model.parameters(), lr=0.1), "mxfp4")
        when = Underflow("*:input", above=0.99, window=5, every=1)
        phases = Phases(precision, [Phase(Policy("mxfp4"), when=when), Phase(Policy("bf16"))], 9)
        precision.backward(model(torch.randn(32, 64)).square().mean())
        precision.step()
        if evaluates:
            with torch.no_grad(), precision.using("fp32"):
                model(torch.randn(32, 64))
        shares.append(phases.after({"step": 1, "skipped": False, "loss_scale": 1.0})["underflow"]["*:input"])
    assert 0 < shares[0] == shares[1]
