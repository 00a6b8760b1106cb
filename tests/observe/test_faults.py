"""A fault that is planted is called by its name in the first record after it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from faults import FAULTS, GOOD_STEPS, Fault, config, found, try_fault

import mezzo.torch
from mezzo.observe.incidents import read
from mezzo.observe.listener import RunObserver
from mezzo.policy import Policy
from mezzo.train.session import Session

NAMES = [fault.name for fault in FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_each_fault_is_named_in_eager_mode(fault: Fault, folder: Path, tmp_path: Path) -> None:
    for policy in {"fp16", *fault.policies[-1:]}:
        named, right = try_fault(folder, tmp_path / policy, fault, policy, "eager", block=1)
        assert named == right, policy


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_each_fault_is_named_inside_of_activation_checkpointing(fault: Fault, folder: Path, tmp_path: Path) -> None:
    policy = fault.policies[min(1, len(fault.policies) - 1)]
    named, right = try_fault(folder, tmp_path / "run", fault, policy, "checkpointed", block=0)
    assert named == right


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["Inf in one weight", "an exploding attention logit"])
def test_a_fault_is_named_inside_of_a_compiled_model(name: str, folder: Path, tmp_path: Path) -> None:
    named, right = try_fault(folder, tmp_path / "run", FAULTS[NAMES.index(name)], "bf16", "compiled", block=1)
    assert named == right


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_that_is_not_sampled_is_run_again_to_name_the_site(folder: Path, tmp_path: Path) -> None:
    settings = ("train.compile=true",)
    session = Session.start(config(folder, "bf16", *settings), tmp_path / "run", RunObserver(every=50))
    fault = FAULTS[NAMES.index("Inf in one weight")]
    named, record = found(session, fault, block=0)
    assert (named, record["incident"]) == ("blocks.0.mlp.up:fprop.b", "nonfinite")


def test_a_step_that_is_run_again_changes_nothing_of_the_training(folder: Path, tmp_path: Path) -> None:
    """One NaN in one step's gradients: the run goes on to the same bits as one that nobody observes."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, spoiled):
            ctx.spoiled = spoiled
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return (grads[0] * torch.nan if ctx.spoiled else grads[0]), None

    def train(name: str, listener: object) -> tuple[list[float], list[torch.Tensor]]:
        policy = "fp8; *:grad_output=e5m2@tensor stochastic; *:input=e4m3@tensor delayed=4; loss_scale=dynamic"
        session = Session.start(config(folder, policy, "train.steps=7"), tmp_path / name, listener)
        precision = session.precision
        session.model.blocks[0].mlp.down.register_forward_hook(
            lambda module, args, out: Once.apply(out, int(precision.scales.draws) // 2 == GOOD_STEPS)
        )
        losses = [record["loss"] for record in session.train()]
        state = precision.state_dict()
        return losses, [p.detach() for p in session.model.parameters()] + [state[key] for key in sorted(state)]

    from mezzo.train.listeners import Listener

    losses, tensors = train("plain", Listener())
    same_losses, same = train("observed", RunObserver(every=1))
    assert losses == same_losses
    assert all(map(torch.equal, tensors, same))
    ((incident,), _) = read(tmp_path / "observed")
    assert incident["site"] == "blocks.0.mlp.down:dgrad.a"


def test_a_step_that_is_run_again_draws_what_it_drew(folder: Path, tmp_path: Path) -> None:
    session = Session.start(config(folder, "bf16"), tmp_path / "run", RunObserver())
    drawn: list[float] = []

    def drop(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        drawn.append(float(torch.rand(())))
        return out * torch.nan

    session.model.blocks[0].register_forward_hook(drop)
    next(session.train())
    assert len(drawn) == 4, "two micro-batches, twice"
    assert drawn[:2] == drawn[2:]


def test_an_incident_has_what_is_needed_to_look_at_the_step_again(folder: Path, tmp_path: Path) -> None:
    session = Session.start(config(folder, "fp16"), tmp_path / "run", RunObserver(every=50))
    found(session, FAULTS[NAMES.index("NaN in one batch row")], block=1)
    ((incident,), _) = read(session.run.path)
    site = "blocks.1.attn.qkv:fprop.a"
    assert (incident["step"], incident["kind"], incident["site"]) == (GOOD_STEPS + 1, "nonfinite", site)
    Policy.of(f"fp16; {incident['rule']}").check_paths(["blocks.1.attn.qkv"])
    assert incident["sites"][site]["nonfinite"] == 2 * 32 * 32  # two micro-batches, one row of T × d each
    assert incident["rng"] == {"seed": 0, "draws": 2 * GOOD_STEPS}
    assert incident["batch"] == {"step": GOOD_STEPS + 1, "accumulate": 2}
    assert incident["scales"]["loss_scale"] == incident["loss_scale"] > 1
    assert math.isnan(incident["loss"])
    assert (session.run.path / "incidents" / "step-000003" / "rng.safetensors").is_file()


def test_in_a_users_own_loop_the_step_names_the_site_and_the_sample_the_rest() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    precision = mezzo.torch.Precision(model, torch.optim.SGD(model.parameters(), lr=0.1), "bf16")
    observer = mezzo.torch.observe(model, every=2)

    def step() -> mezzo.torch.Step:
        precision.backward(model(torch.randn(8, 16)).square().mean())
        return precision.step()

    assert step().site is None
    assert observer.last is not None
    assert (observer.last.step, observer.last.findings) == (1, [])
    model[0].bias.data.fill_(-100.0)  # no unit is on any more
    step()
    assert observer.last.step == 2
    assert observer.last.findings[0].to_dict() | {"text": ""} == {"kind": "all_zero", "site": "2:fprop.a", "text": ""}
    model[2].weight.data[0, 0] = torch.inf
    assert step().site == "2:fprop.out"  # not sampled, but watched
    observer.close()
