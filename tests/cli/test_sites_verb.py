"""`mezzo sites`: what every tensor is rounded to, for a run or a config, without weights or text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from in_process import Mezzo

from mezzo.train.checkpoint import newest
from mezzo.train.rundir import RunDir
from mezzo.train.saver import save

COLUMNS = ["site", "shape", "format", "route", "bytes"]


def test_a_table_of_a_run_names_each_site_its_shape_format_route_and_bytes(mezzo: Mezzo, trained: Path) -> None:
    done = mezzo("sites", str(trained))
    assert (done.code, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split() == [*COLUMNS, "in", "format"]
    row = next(line.split() for line in lines if line.startswith("blocks.0.mlp.up:fprop.b "))
    assert row[:3] == ["blocks.0.mlp.up:fprop.b", "128×32", "bfloat16"]
    assert row[3] in ("native", "emulated")
    assert row[4:] == ["8", "KiB"], "128 × 32 × 2 bytes"
    assert any(line.startswith("norm.weight:master") for line in lines)


def test_a_config_gives_the_table_too_and_json_parses(mezzo: Mezzo, config: str) -> None:
    done = mezzo("sites", config, "--json")
    assert (done.code, done.err) == (0, "")
    rows = {row["site"]: row for row in json.loads(done.out)}
    assert list(rows["head:fprop.a"]) == [*COLUMNS, "calls"]
    size = {"bfloat16": 2, "float32": 4}
    for row in rows.values():
        if row["bytes"]:
            count = 1
            for n in row["shape"]:
                count *= n
            assert row["bytes"] == count * size[row["format"]], row
    assert rows["blocks.0.attn.qkv:fprop.a"]["shape"] == [2, 32, 32], "the config's batch and sequence"
    assert rows["blocks.0.attn.qkv:fprop.a"]["format"] == "bfloat16"
    assert rows["blocks.0.attn.qkv:wgrad.out"]["format"] == "float32"


def test_another_policy_shows_its_own_table(mezzo: Mezzo, config: str) -> None:
    done = mezzo("sites", config, "--json", "--policy", "fp16; *.q[kv]*:*=float32")
    rows = {row["site"]: row["format"] for row in json.loads(done.out)}
    assert rows["blocks.0.attn.qkv:fprop.b"] == "float32"
    assert rows["blocks.0.mlp.up:fprop.b"] == "float16"


def test_the_largest_preset_fits_because_no_weight_is_made(mezzo: Mezzo, tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "big.toml").write_text('model = {preset = "gpt2-1.5b"}')
    done = mezzo("sites", "big.toml", "--json")
    assert (done.code, done.err) == (0, "")
    rows = {row["site"]: row for row in json.loads(done.out)}
    assert rows["blocks.47.mlp.up.weight:master"]["bytes"] == 4 * 6400 * 1600
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, "KiB: its weights alone are 6 GB"


def test_what_cannot_be_shown_is_one_clear_error(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    done = mezzo("sites", "none.toml")
    assert done.code == 2
    assert "Path 'none.toml' does not exist" in done.err
    done = mezzo("sites", config, "--policy", "bf16; nowhere:*=float32")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("mezzo: error: the rule 'nowhere:*=float32' matches nothing in this model")
    (tmp_path / "folder").mkdir()
    assert mezzo("sites", "folder").err.startswith("mezzo: error: folder is not a run")


def test_advice_stands_below_the_table_and_not_in_the_json(mezzo: Mezzo, config: str) -> None:
    policy = "fp32; head:input=mxfp8; blocks.*.up:grad_output=int8; *.qkv:fprop.b=e4m3@1x24"
    done = mezzo("sites", config, "--policy", policy)
    assert (done.code, done.err) == (0, "")
    table, *advice = done.out.split("\n\n")
    assert table.startswith("site ")
    assert [text.partition(": ")[0] for text in advice] == [
        "blocks.0.attn.qkv:fprop.b", "blocks.0.mlp.up:dgrad.a, blocks.0.mlp.up:wgrad.a", "emulated on this CPU",
    ]  # fmt: skip
    assert isinstance(json.loads(mezzo("sites", config, "--policy", policy, "--json").out), list)
    assert "\n\n" not in mezzo("sites", config, "--policy", "fp32").out


def test_a_config_with_phases_has_a_table_for_each_with_what_changes(mezzo: Mezzo, config: str, tmp_path: Path) -> None:
    phases = '\n[[phase]]\nuntil = 2\n[[phase]]\nrules = "head:input=float32"\n'
    (tmp_path / "phased.toml").write_text((tmp_path / config).read_text() + phases)
    done = mezzo("sites", "phased.toml")
    assert (done.code, done.err) == (0, "")
    first, _, second = done.out.partition("phase 2 of 2: bf16; head:input=float32")
    assert first.startswith("phase 1 of 2: bf16")
    assert "blocks.0.mlp.up:fprop.b" in first
    rows = [line.split()[0] for line in second.splitlines() if "×" in line]
    assert rows == ["head:fprop.a", "head:wgrad.b"]
    assert "all other sites are as in the phase before" in second
    found = json.loads(mezzo("sites", "phased.toml", "--json").out)
    assert [one["phase"] for one in found] == [*range(1, len(found) + 1)]
    tables = [one["sites"] for one in found]
    formats = [{row["site"]: row["format"] for row in table}["head:fprop.a"] for table in tables]
    assert formats == ["bfloat16", "float32"]
    assert len(json.loads(mezzo("sites", "phased.toml", "--json", "--policy", "fp32").out)) == len(tables[0])


def test_a_run_of_another_framework_says_that_it_is_shown_as_torch_would_run_it(
    mezzo: Mezzo, config: str, trained: Path
) -> None:
    shutil.copytree(trained, "run")
    said = "shown as PyTorch would run it; this run was last trained under tensorflow\n"
    Path("run/config.toml").write_text(Path("run/config.toml").read_text().replace('"torch"', '"jax"'))
    assert mezzo("sites", "run").out.startswith("site "), "the checkpoint says torch, whatever the config"
    _now_under("run", "tensorflow")
    done = mezzo("sites", "run")
    assert done.out.startswith(f"{said}site "), done
    done = mezzo("sites", "run", "--json")
    assert (done.err, json.loads(done.out)[0]["route"] != "") == (said, True), "what is parsed stays JSON"
    shutil.rmtree("run/checkpoints")
    said = "shown as PyTorch would run it; this run is to train under jax\n"
    assert mezzo("sites", "run").out.startswith(said)
    text = Path(config).read_text().replace("train = {", 'train = {framework = "jax", ')
    Path("jax.toml").write_text(text)
    assert mezzo("sites", "jax.toml").out.startswith("shown as PyTorch would run it; this config trains under jax\n")


def _now_under(run: str, framework: str) -> None:
    """Save the newest checkpoint again as another framework's."""
    found, _ = newest(run)
    assert found is not None
    meta = {**found.meta, "environment": {**found.meta["environment"], "framework": framework}}
    with RunDir.open(run, lock=True) as locked:
        save(locked, found.step, {name: found.load_group(name) for name in found.groups}, meta, keep=1)
