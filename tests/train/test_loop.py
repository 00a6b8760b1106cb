"""The loop and the evaluation on their own, with a model small enough to follow by hand."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Heard
from torch import Tensor, nn

from mezzo.torch import Precision
from mezzo.train.loop import Loop
from mezzo.train.torch_steps import TorchSteps, evaluate

CPU = torch.device("cpu")


class Bigram(nn.Module):
    """A row of logits for each token."""

    def __init__(self, vocab: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
        nn.init.zeros_(self.table.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.table(x).flatten(0, 1), y.flatten())


def batch_at(step: int, micro: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng([step, micro])
    return rng.integers(7, size=(2, 5)), rng.integers(7, size=(2, 5))


def make(steps_seen: list[int] | None = None, **changes: Any) -> tuple[Loop, Heard, Bigram]:
    model, heard = Bigram(), Heard()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    steps = TorchSteps(model, Precision(model, optimizer, "fp32"), optimizer, CPU, changes.get("accumulate", 1))
    options: dict[str, Any] = {
        "engine": steps, "batch_at": batch_at, "rate_at": lambda step: 0.5, "listener": heard,
    } | changes  # fmt: skip
    return Loop(**options), heard, model


def test_a_record_has_the_keys_that_the_run_directory_promises() -> None:
    loop, heard, _ = make(flops_per_token=100.0, peak_flops=1e6)
    records = list(loop.run(0, 3))
    assert records == heard.records
    assert [list(record) for record in records] == [
        ["step", "loss", "lr", "grad_norm", "loss_scale", "skipped", "tokens", "tokens_per_s", "mfu", "memory"]
    ] * 3
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record["tokens"] for record in records] == [10, 20, 30]
    assert records[0]["loss"] == pytest.approx(np.log(7), rel=1e-6)
    assert all(record["lr"] == 0.5 and not record["skipped"] for record in records)


def test_mfu_is_useful_operations_over_what_the_machine_could_do() -> None:
    loop, _, _ = make(flops_per_token=123.0, peak_flops=4.5e6)
    for record in loop.run(0, 2):
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * 123.0 / 4.5e6, rel=1e-12)
    loop, _, _ = make(flops_per_token=123.0, peak_flops=0.0)
    assert next(loop.run(0, 1))["mfu"] is None, "no peak, no share of it"


def test_accumulation_gives_the_gradient_of_all_micro_batches_together() -> None:
    """float32: each gradient is a mean of 20 softmax terms below 1, added in another order; 32 eps covers it."""
    loop, _, model = make(accumulate=2)
    losses = [record["loss"] for record in loop.run(0, 4)]

    def joined(step: int, micro: int) -> Any:
        (x, y), (x2, y2) = batch_at(step, 0), batch_at(step, 1)
        return np.concatenate([x, x2]), np.concatenate([y, y2])

    whole, _, reference = make(batch_at=joined)
    assert losses == pytest.approx([record["loss"] for record in whole.run(0, 4)], rel=32 * 2**-23)
    torch.testing.assert_close(model.table.weight, reference.table.weight, rtol=0, atol=32 * 2**-23)


def test_a_loop_that_begins_later_takes_the_later_batches_and_rates() -> None:
    asked: list[tuple[int, int]] = []

    def ask(step: int, micro: int) -> Any:
        asked.append((step, micro))
        return batch_at(step, micro)

    loop, heard, _ = make(batch_at=ask, accumulate=2, rate_at=lambda step: step / 10)
    list(loop.run(3, 5))
    assert asked == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert [(r["step"], r["lr"], r["tokens"]) for r in heard.records] == [(4, 0.3, 80), (5, 0.4, 100)]


def test_what_is_done_at_a_step_is_in_its_record_before_listeners_get_it() -> None:
    loop, heard, _ = make(each_step=lambda step, record: record.update(mark=step))
    list(loop.run(0, 2))
    assert [record["mark"] for record in heard.records] == [1, 2]


def test_a_loop_that_is_asked_to_stop_ends_after_the_step_at_hand() -> None:
    asked = iter([False, True])
    loop, heard, _ = make(stop=lambda: next(asked))
    list(loop.run(0, 100))
    assert [record["step"] for record in heard.records] == [1, 2]


class Late(Loop):
    """Reads records one step late, as on a GPU."""

    late = True


def as_on_a_gpu(**changes: Any) -> tuple[Loop, Heard, Bigram]:
    loop, heard, model = make(**changes)
    return Late(**{name: getattr(loop, name) for name in Loop.__dataclass_fields__}), heard, model


def test_records_read_one_step_late_are_the_same_records_in_the_same_order() -> None:
    loop, _, model = make(accumulate=2)
    expected = [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in loop.run(0, 6)]
    loop, _, late_model = as_on_a_gpu(accumulate=2)
    assert [(r["step"], r["loss"], r["grad_norm"], r["tokens"]) for r in loop.run(0, 6)] == expected
    assert torch.equal(model.table.weight, late_model.table.weight)


def test_one_step_late_the_next_step_is_queued_before_a_record_is_read() -> None:
    events: list[str] = []

    def ask(step: int, micro: int) -> Any:
        events.append(f"queue {step + 1}")
        return batch_at(step, micro)

    loop, _, _ = as_on_a_gpu(batch_at=ask, each_step=lambda step, record: events.append(f"read {step}"))
    list(loop.run(0, 3))
    assert events == ["queue 1", "queue 2", "read 1", "queue 3", "read 2", "read 3"]


def test_a_step_at_which_something_is_due_is_read_before_the_next_is_queued() -> None:
    """An evaluation or a checkpoint must see the weights of its own step."""
    weights: dict[int, Tensor] = {}
    loop, _, model = make()
    reference = {r["step"]: model.table.weight.detach().clone() for r in loop.run(0, 5)}
    loop, _, model = as_on_a_gpu(
        due=lambda step: step in (2, 3),
        each_step=lambda step, record: weights.update({step: model.table.weight.detach().clone()}),
    )
    list(loop.run(0, 5))
    assert all(torch.equal(weights[step], reference[step]) for step in (2, 3, 5))


@pytest.mark.parametrize("maker", [make, as_on_a_gpu])
def test_speed_counts_the_step_and_not_what_listeners_do_after_it(maker: Any) -> None:
    """Each step takes 20 ms, each due listener 100 ms: 10 tokens / 20 ms = 500 tokens/s at most, 83 with the listener.

    Half of 500 is allowed for a busy machine.
    """

    def slow(step: int, micro: int) -> Any:
        time.sleep(0.02)
        return batch_at(step, micro)

    def listen(step: int, record: dict[str, Any]) -> None:
        if step % 2 == 0:
            time.sleep(0.1)

    loop, _, _ = maker(batch_at=slow, each_step=listen, due=lambda step: step % 2 == 0)
    speeds = [record["tokens_per_s"] for record in loop.run(0, 6)]
    assert max(speeds) <= 500
    assert np.median(speeds) >= 200


def test_evaluation_weighs_batches_by_their_targets() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y.float().mean()

    full, rest = np.full((3, 4), 1.0), np.full((1, 4), 5.0)
    loss, count = evaluate(Given(), iter([(full, full), (rest, rest)]), CPU)
    assert (loss, count) == ((12 * 1.0 + 4 * 5.0) / 16, 16)


def test_evaluation_leaves_the_model_in_the_mode_it_found_it_in_also_when_it_fails() -> None:
    model = Bigram()
    x = np.zeros((1, 2), dtype=np.int64)
    evaluate(model, iter([(x, x)]), CPU)
    assert model.training
    model.eval()
    evaluate(model, iter([(x, x)]), CPU)
    assert not model.training
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, iter([(x + 99, x)]), CPU)
    assert model.training
