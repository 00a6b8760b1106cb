"""Who listens to a run, and what TensorBoard then reads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_runs import Heard, Tiny, logged, train

from mezzo.errors import MissingExtraError
from mezzo.train.listeners import Listener, Listeners, TensorBoard
from mezzo.train.rundir import RunDir
from mezzo.train.session import Session
from mezzo.train.stored import read_config


def test_several_listeners_hear_everything_in_order() -> None:
    both = Heard(), Heard()
    listeners = Listeners(both)
    listeners.started({"steps": 1})
    listeners.record({"step": 1})
    listeners.message("saved")
    listeners.ended("finished")
    for heard in both:
        assert (heard.info, heard.records, heard.messages, heard.outcome) == (
            {"steps": 1}, [{"step": 1}], ["saved"], "finished",
        )  # fmt: skip


def test_a_listener_need_not_listen_to_anything() -> None:
    listener = Listener()
    listener.started({})
    listener.record({})
    listener.message("")
    listener.ended("finished")


def events(folder: Path) -> dict[str, dict[int, float | str]]:
    """tag → step → value, read from TensorBoard's files as TensorBoard does: records framed by length and checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float | str]] = {}
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == event.session_log.START:
                for steps in found.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                shown = value.simple_value if kind == "simple_value" else value.tensor.string_val[0].decode()
                found.setdefault(value.tag, {})[event.step] = shown
    return found


def test_tensorboard_reads_what_steps_jsonl_says(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.tensorboard=true", "train.eval_every=3", "train.sample_every=6", policy="fp16")
    train(Session.start(config, tmp_path / "run", Heard()))
    found, records = events(tmp_path / "run/tensorboard"), logged(tmp_path / "run")
    for key in ("loss", "lr", "grad_norm", "loss_scale", "skipped", "tokens"):
        expected = {record["step"]: pytest.approx(float(record[key]), rel=2**-23) for record in records}
        assert found[key] == expected, key
    assert list(found["val_loss"]) == list(found["val_loss_fp32"]) == list(found["val_bits_per_byte"]) == [3, 6]
    assert {"tokens_per_s", "mfu", "memory"} <= found.keys()
    assert found["sample/text_summary"] == {6: records[-1]["sample"]}


def test_a_resumed_run_takes_back_what_tensorboard_had_after_the_checkpoint(tmp_path: Path, tiny: Tiny) -> None:
    config = tiny("train.steps=8", "train.tensorboard=true", "train.checkpoint_every=3")
    train(Session.start(config, tmp_path / "run", Heard()), stop_after=5)
    assert list(events(tmp_path / "run/tensorboard")["loss"]) == [1, 2, 3, 4, 5]
    session = Session.resume(tmp_path / "run", read_config(RunDir.open(tmp_path / "run")), Heard())
    train(session, stop_after=4)
    assert list(events(tmp_path / "run/tensorboard")["loss"]) == [1, 2, 3, 4], "step 5 of the first try is gone"


def test_without_tensorboardx_the_option_says_how_to_install_it(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr("importlib.import_module", _missing)
    message = r"train.tensorboard needs the package 'tensorboardX', .* pip install tensorboardX"
    with pytest.raises(MissingExtraError, match=message):
        TensorBoard(tmp_path)
    with pytest.raises(MissingExtraError, match=message):
        Session.start(tiny("train.tensorboard=true"), tmp_path / "run", Heard())
    monkeypatch.undo()


def _missing(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
