"""What the report reads out of a run directory, and how it thins it."""

from __future__ import annotations

import fcntl
import json
import shlex
from pathlib import Path

import pytest
from made_runs import add_incident, dump, make_run

from mezzo.errors import RunError
from mezzo.report import read_runs
from mezzo.report.data import Reader, is_running
from mezzo.report.incidents import SHOWN
from mezzo.report.sites import HISTOGRAMS, group, read_sites, value_range
from mezzo.report.thin import POINTS, SAMPLES, extremes, number, smooth, spread
from mezzo.train.rundir import RunDir

SITE = "blocks.1.mlp.down:fprop.a"


def test_a_thinned_curve_keeps_its_ends_and_every_peak() -> None:
    values = [0.1 * (i % 7) for i in range(100_000)]
    values[31_337], values[77_777] = 99.0, -99.0
    kept = extremes(values)
    assert len(kept) <= POINTS
    assert {0, 31_337, 77_777, 99_999} <= set(kept)
    assert kept == sorted(kept)


def test_a_short_curve_is_not_thinned_and_gaps_are_left_out() -> None:
    assert extremes([1.0, None, 3.0]) == [0, 2]


def test_spread_keeps_the_ends_and_the_limit() -> None:
    for count in (0, 1, 2, 59, 60, 61, 1000):
        kept = spread(count, 60)
        assert len(kept) == min(count, 60)
        assert kept[:1] + kept[-1:] == ([0, count - 1] if count else [])


def test_the_smooth_curve_does_not_lag_and_keeps_gaps() -> None:
    line = [float(i) for i in range(1000)]
    assert smooth(line)[:990] == line[:990]  # a mean around each point of a line is the point
    assert smooth([1.0, None, 3.0]) == [1.0, None, 3.0]


def test_numbers_that_json_cannot_hold_become_texts() -> None:
    assert [number(x) for x in (float("inf"), float("nan"), 1 / 3, True, "1", None, 2.0)] == [
        "Infinity", "NaN", 0.33333, None, None, None, 2
    ]  # fmt: skip


def test_a_run_is_read_whole(run: Path) -> None:
    (found,) = read_runs([run])
    assert (found["name"], found["status"], found["last"], found["planned"]) == ("first", "finished", 200, 200)
    assert [one[0] for one in found["skipped"]] == [30, 31, 90]
    assert found["skipped"][0][2] == "blocks.1.mlp.down:fprop.a"
    assert found["nonfinite"] == [90]
    assert found["evaluated"]["val_loss"]["x"] == [50, 100, 150, 200]
    assert [(p["phase"], p["begin"], p["end"], p["ended_by"]) for p in found["phases"]] == [
        (1, 1, 160, "until 0.8"), (2, 161, 200, None)
    ]  # fmt: skip
    assert [one["step"] for one in found["samples"]] == [100, 200]
    assert [one["step"] for one in found["incidents"]["shown"]] == [30, 90, 120]
    worst = [one["site"] for one in found["incidents"]["shown"][1]["worst"]]
    assert worst[0] == SITE  # the first with nonfinite values, not the one with most
    assert found["keys"]["train.steps"] == "200"
    assert found["summary"]["policy"] == "fp16"
    json.dumps(found, allow_nan=False)


def test_sites_are_matrices_of_sites_and_sampled_steps(run: Path) -> None:
    sites = read_sites(run / "sites.jsonl")
    assert sites is not None
    assert sites["steps"] == list(range(20, 201, 20))
    assert sites["of"] == 10
    shape = (len(sites["names"]), len(sites["steps"]))
    for key in ("sqnr", "underflow", "overflow", "amax", "count", "zeros", "nonfinite", "format"):
        assert (len(sites[key]), len(sites[key][0])) == shape
    assert sites["sqnr"][sites["names"].index("head:fprop.a")][0] == "Infinity"
    assert sites["findings"] == [
        {"step": 100, "kind": "all_zero", "site": "blocks.1.mlp.down:fprop.a", "text": "every value is zero"}
    ]
    row = sites["names"].index("blocks.0.attn.qkv:wgrad.a")
    assert sites["blocks"][row][0]["sqnr"] == [12.1, 18.9, 24]
    assert sites["blocks"][0][0] is None
    assert sites["whatif"]["nvfp4"]["format"][0] == "nvfp4"
    assert len(sites["whatif"]["nvfp4"]["sqnr"]) == len(sites["names"])


def test_a_long_run_is_thinned_but_every_skipped_step_evaluation_and_finding_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", steps=3000, every=10, layers=12)
    (found,) = read_runs([run])
    assert found["thinned"]
    assert all(len(curve["x"]) <= POINTS for curve in found["curves"].values())
    assert len(found["skipped"]) == 3
    assert len(found["evaluated"]["val_loss"]["x"]) == 60
    sites = found["sites"]
    assert (sites["of"], len(sites["steps"])) == (300, SAMPLES)
    assert (sites["steps"][0], sites["steps"][-1]) == (10, 3000)
    assert 100 not in sites["steps"]
    assert [one["step"] for one in sites["findings"]] == [100]
    assert len(sites["names"]) * len(sites["histogram_at"]) <= HISTOGRAMS
    assert len(json.dumps(found)) < 4_000_000


def test_what_is_missing_is_none_or_empty(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "config.toml").write_text("policy = 3\n[train\n")
    (found,) = read_runs([run])
    assert (found["status"], found["last"], found["sites"], found["planned"]) == ("empty", None, None, None)
    assert found["incidents"] == {"count": 0, "shown": [], "broken": []}
    assert len(found["problems"]) == 2  # no policy.toml, and a config that is not TOML
    assert found["reproduce"]["sha256"] is None


def test_torn_lines_and_wrong_types_are_left_out(run: Path) -> None:
    with open(run / "steps.jsonl", "a") as file:
        file.write(
            '{"step": 201, "loss": "x", "sample": 3, "skipped": "no", "phase": [], "lr": true}\n{"step": 202, "lo'
        )
    with open(run / "sites.jsonl", "a") as file:
        wrong = {"step": 220, "sites": {"a:fprop.a": 3, "b:fprop.a": {"histogram": 1, "blocks": []}}, "updates": 4}
        file.write(dump(wrong | {"logits": [], "whatif": {"x": 1}, "findings": {}}) + '\n{"step": 240, "si')
    add_incident(run, 150, steps=None, sites=[1], batch=None)
    for name, text in (("step-000160", "{"), ("step-000170", "[]"), ("step-000180", '{"step": "x"}')):
        (run / "incidents" / name).mkdir()
        (run / "incidents" / name / "incident.json").write_text(text)
    (found,) = read_runs([run])
    assert found["last"] == 201
    assert found["sites"]["steps"][-1] == 220
    assert found["sites"]["sqnr"][found["sites"]["names"].index("b:fprop.a")][-1] is None
    assert found["incidents"]["count"] == 4
    assert found["incidents"]["broken"] == ["step-000160", "step-000170", "step-000180"]


def test_of_very_many_incidents_the_first_are_shown(run: Path) -> None:
    for step in range(1000, 1000 + SHOWN):
        add_incident(run, step, sites={})
    (found,) = read_runs([run])
    assert (found["incidents"]["count"], len(found["incidents"]["shown"])) == (SHOWN + 3, SHOWN)


def test_runs_that_share_a_folder_name_are_called_by_their_paths(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "x", steps=20)
    make_run(tmp_path / "b" / "x", steps=20)
    assert [run["name"] for run in read_runs([Path("a/x"), Path("b/x")])] == ["a/x", "b/x"]


def test_a_run_given_twice_or_none_is_an_error(run: Path) -> None:
    with pytest.raises(RunError, match="first is given more than once; give each run once"):
        read_runs([run, run.parent / "." / "first"])
    with pytest.raises(RunError, match="is not a run"):
        read_runs([run.parent])


def test_a_run_whose_lock_is_held_is_running_until_it_is_let_go(tmp_path: Path) -> None:
    path = make_run(tmp_path / "half", steps=40, done=20)
    assert read_runs([path])[0]["status"] == "stopped"
    with RunDir.open(path, lock=True):
        assert is_running(path)
        assert (read_runs([path])[0]["status"], read_runs([path])[0]["live"]) == ("running", True)
        assert is_running(path)  # looking did not take the lock away
    with open(path / ".lock", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # another report that looks at the same time is not a trainer
        assert is_running(path) is False
    assert read_runs([path])[0]["status"] == "stopped"


def test_the_version_changes_with_every_file_that_the_page_shows(run: Path) -> None:
    reader = Reader(RunDir.open(run), "first")
    seen = [reader.version()]
    assert reader.version() == seen[0]
    for name in ("steps.jsonl", "sites.jsonl", "config.toml", "policy.toml"):
        with open(run / name, "a") as file:
            file.write("\n")
        seen.append(reader.version())
    add_incident(run, 170)
    seen.append(reader.version())
    with RunDir.open(run, lock=True):
        seen.append(reader.version())
    assert len(set(seen)) == len(seen)


def test_a_reader_reads_again_only_what_changed(run: Path) -> None:
    reader = Reader(RunDir.open(run), "first")
    before = reader.read()
    with open(run / "steps.jsonl", "a") as file:
        file.write(dump({"step": 201, "loss": 2.0}) + "\n")
    after = reader.read()
    assert after["last"] == 201
    assert after["sites"] is before["sites"]


@pytest.mark.parametrize(
    ("spec", "scaled", "whole", "largest"),
    [("float16", False, True, 65504), ("bfloat16 stochastic", False, True, (2 - 2**-7) * 2.0**127),
     ("float8_e4m3fn@tensor delayed", True, True, 1), ("nvfp4 stochastic hadamard", True, False, 1)],
)  # fmt: skip
def test_the_range_of_a_format(spec: str, scaled: bool, whole: bool, largest: float) -> None:
    found = value_range(spec)
    assert found is not None
    assert (found["scaled"], found["whole"], found["values"][2]) == (scaled, whole, largest)


def test_a_format_that_is_not_known_has_no_range() -> None:
    assert value_range("posit16") is None
    assert value_range("") is None


def test_sites_are_grouped_by_their_roles() -> None:
    roles = ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "fprop.query", "master", "compute")
    assert [group(f"x:{role}") for role in roles] == [
        "forward", "weights", "backward", "weights", "backward", "forward", "weights", "forward"
    ]  # fmt: skip


def test_the_commands_survive_a_shell(tmp_path: Path) -> None:
    run = make_run(tmp_path / "it's; rm -rf $HOME", steps=5)
    (found,) = read_runs([run])
    again, resume, _ = (shlex.split(command) for command in found["reproduce"]["commands"])
    assert again == ["mezzo", "train", f"{run}/config.toml", "--out", f"{run}-again"]
    assert resume == ["mezzo", "train", "--resume", str(run)]
