"""A config: every field survives its TOML, nothing is taken that means nothing, and errors name key and remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mezzo.errors import ConfigError
from mezzo.policy import Phase, Policy
from mezzo.policy.phases import named
from mezzo.policy.trigger import Skipped
from mezzo.train.config import Config, DataSection, ModelSection, PhaseSection, TrainSection, load, parse
from mezzo.train.stored import anchored

# Every field with a value that is not its default.
EVERY: dict[str, Any] = {
    "policy": {"recipe": "fp16", "rule": [{"site": "head:*", "format": "float32"}], "loss_scale": {"init": 1024.0}},
    "model": {
        "preset": "gpt-tiny", "vocab_size": 512, "layers": 3, "d_model": 48, "heads": 4, "kv_heads": 2, "seq_len": 16,
        "mlp": "gelu", "mlp_ratio": 2.5, "hidden": 80, "norm": "layernorm", "norm_eps": 1e-6, "positions": "learned",
        "rope_theta": 500.0, "qk_norm": True, "bias": True, "tied": False,
    },
    "data": {
        "corpus": "some folder/*.txt", "text_key": "body", "vocab_size": 300, "tokenizer": "tokenizer.json",
        "valid_fraction": 0.25, "cache": "/tmp/cache",
    },
    "train": {
        "steps": 7, "seed": 3, "batch": 2, "accumulate": 4, "lr": 0.1, "min_lr": 0.0, "warmup": 1, "schedule": "wsd",
        "decay": 0.5, "weight_decay": 0.0, "betas": [0.8, 0.99], "clip": 0.0, "clip_value": 0.5, "clip_adaptive": 0.01,
        "prune": "magnitude", "prune_sparsity": 0.75, "prune_begin": 0.0, "prune_end": 1.0, "prune_every": 2,
        "checkpoint_every": 2, "keep": 5,
        "eval_every": 3, "eval_batches": 4, "sample_every": 6, "sample_prompt": "\"ein\"\nmal 春", "device": "cpu",
        "checkpoint_activations": True, "compile": True, "tensorboard": True, "deterministic": False,
        "framework": "jax",
    },
}  # fmt: skip


def test_every_field_survives_a_round_trip_through_toml(tmp_path: Path) -> None:
    config = parse(EVERY)
    for section, given in (("model", config.model), ("data", config.data), ("train", config.train)):
        assert set(EVERY[section]) == set(type(given).model_fields), "a field is missing in EVERY above"
        for name, field in type(given).model_fields.items():
            assert getattr(given, name) != field.default, f"{section}.{name} is its default: the test would miss it"
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert load(path) == config
    assert load(path).to_toml() == config.to_toml()


def test_the_defaults_survive_it_too(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(Config().to_toml())
    assert load(path) == load() == Config()
    path.write_text("")
    assert load(path) == Config()


def test_a_config_with_only_defaults_is_the_proof_model_in_bf16_on_the_standard_library() -> None:
    config = load()
    assert (config.policy, config.model.preset, config.train.batch, config.data.corpus) == (
        "bf16", "gpt-proof", 8, "stdlib",
    )  # fmt: skip


@pytest.mark.parametrize("section", [ModelSection, DataSection, TrainSection, PhaseSection, Config])
def test_a_config_cannot_be_changed_in_place(section: type[BaseModel]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(section(), next(iter(section.model_fields)), None)


def test_settings_win_over_the_file_and_leave_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("policy = 'fp16'\n[train]\nsteps = 5\nbatch = 3\n")
    config = load(path, ["train.steps=6", "model.preset=gpt-tiny", "train.sample_prompt=The cat"])
    assert (config.train.steps, config.train.batch, config.policy) == (6, 3, "fp16")
    assert (config.model.preset, config.train.sample_prompt) == ("gpt-tiny", "The cat")
    base = {"train": {"steps": 5}}
    assert load(None, ["train.steps=6"], base).train.steps == 6
    assert base == {"train": {"steps": 5}}


def test_whole_numbers_are_taken_where_a_fraction_is_meant() -> None:
    assert load(None, ["train.lr=1", "train.betas=[0, 0]"]).train.lr == 1.0


def test_a_policy_may_be_a_string_or_a_table(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[policy]\nrecipe = "bf16"\n[[policy.rule]]\nsite = "head:*"\nformat = "float32"\n')
    assert load(path).resolved_policy() == Policy.parse("bf16; head:*=float32")
    assert load(None, ['policy="bf16; head:*=float32"']).resolved_policy() == load(path).resolved_policy()


WRONG = {
    "train.step=5": "unknown key 'train.step'; did you mean train.steps?",
    "steps=5": "unknown key 'steps'; did you mean train.steps?",
    "trian.steps=5": "unknown key 'trian'; did you mean train?",
    "model.dropout=0.1": "unknown key 'model.dropout'; known: preset, vocab_size, layers,",
    "data.str=1": "unknown key 'data.str'; known: corpus,",
    "train.steps=many": "train.steps: Input should be a valid integer, got 'many'",
    "train.steps=0": "train.steps: Input should be greater than or equal to 1, got 0",
    "train.steps=2.0": "train.steps: Input should be a valid integer, got 2.0",
    "train.steps=true": "train.steps: Input should be a valid integer, got True",
    "train.lr=fast": "train.lr: Input should be a valid number, got 'fast'",
    "train.lr=inf": "train.lr: Input should be a finite number, got inf",
    "train.lr=nan": "train.lr: Input should be a finite number, got nan",
    "train.lr=-1": "train.lr: Input should be greater than 0, got -1",
    "train.betas=[0.9]": "train.betas.1: Field required",
    "train.schedule=linear": "train.schedule: Input should be 'cosine', 'wsd' or 'constant', got 'linear'",
    "train.compile=1": "train.compile: Input should be a valid boolean, got 1",
    "train.device=gpu": "train.device: Input should be 'auto', 'cpu' or 'cuda', got 'gpu'",
    "train.clip_value=-1": "train.clip_value: Input should be greater than or equal to 0, got -1",
    "train.clip_adaptive=inf": "train.clip_adaptive: Input should be a finite number, got inf",
    "train.prune=2:8": "train.prune: Input should be 'none', 'magnitude' or '2:4', got '2:8'",
    "train.prune_sparsity=1": "train.prune_sparsity: Input should be less than 1, got 1",
    "train.prune_sparsity=0": "train.prune_sparsity: Input should be greater than 0, got 0",
    "train.prune_end=1.5": "train.prune_end: Input should be less than or equal to 1, got 1.5",
    "train.prune_every=0": "train.prune_every: Input should be greater than or equal to 1, got 0",
    "model=tiny": "model is a group of keys, such as model.preset; got 'tiny'",
    "model.heads=5": "heads = 5 does not divide d_model = 128; choose heads from 1, 2, 4, 8",
    "model.kv_heads=3": "kv_heads = 3 does not divide heads = 4; choose kv_heads from 1, 2, 4",
    "model.preset=gpt-huge": "no preset is called 'gpt-huge'; presets: gpt-tiny, gpt-proof",
    "model.norm=batchnorm": "model.norm: Input should be 'rmsnorm' or 'layernorm', got 'batchnorm'",
    "data.vocab_size=100": "data.vocab_size: Input should be greater than or equal to 258, got 100",
    "data.corpus=2024": "data.corpus: Input should be a valid string, got 2024",
    "policy=fp8x": "unknown recipe 'fp8x'; known: fp64, fp32, tf32, bf16, fp16",
    "policy=3": "policy: a string such as bf16, or a table with recipe, rule, loss_scale; got 3",
    'policy="bf16; head:wieght=float32"': "unknown role 'wieght' in the rule for 'head'; known: input, weight",
    'policy="bf16; head:*=float31"': "unknown number format 'float31'; known: float64, float32",
    'policy="bf16; head:*=float32; head:*=float32"': "two rules for 'head:*'; keep one",
    "phase=3": "phase: the name of a schedule such as dmp, or a list of [[phase]]; got 3",
    "phase=dpm": "unknown schedule of phases 'dpm'; known: dmp, bf16-finish, or a list of [[phase]]",
    "phase=[]": "a schedule needs at least one phase",
    "phase=[{untl=5}, {}]": "unknown key 'untl' in phase 1; did you mean until?",
    "phase=[{until=5}, {speed=2}]": "unknown key 'speed' in phase 2; known: policy, rules, lr, until, when, calibrate",
    'phase=[{until="x"}, {}]': "phase 1.until: a step, or a share of the run with a point, got 'x'",
    "phase=[{until=true}, {}]": "phase 1.until: a step, or a share of the run with a point, got True",
    "phase=[{until=nan}, {}]": "phase 1.until: a step, or a share of the run with a point, got nan",
    "phase=[{until=5, lr=-1}, {}]": "phase 1.lr: Input should be greater than 0, got -1",
    "phase=[{until=5, calibrate=1}, {}]": "phase 1.calibrate: Input should be a valid boolean, got 1",
    "phase=[{until=5, when=3}, {}]": "phase 1.when: a table such as {trigger = 'stall'}, got 3",
    "phase=[{until=5, policy=3}, {}]": "phase 1.policy: a string such as bf16, or a table with recipe, rule, loss",
    "phase=[{until=5}, 3]": "phase 2: a table of keys such as until, got 3",
    "phase=[{}, {}]": "phase 1 never ends; give it until = STEP or SHARE, or a trigger with when",
    "phase=[{until=2000}, {}]": "phase 1 ends at step 2000, but the run has 1000 steps",
    "phase=[{until=1.5}, {}]": "phase 1: until = 1.5 is no share from 0.0 to 1.0; write a step without a point",
    "phase=[{until=5}, {until=4}, {}]": "phase 2 ends at step 4, before the one ahead of it does (5)",
    "phase=[{until=5}, {calibrate=true}]": "phase 2 is the last one: its calibration would be for a phase that does",
    'phase=[{until=5, policy="fp8x"}, {}]': "phase 1: unknown recipe 'fp8x'",
    'phase=[{until=5}, {rules="head"}]': "phase 2: expected SITE=FORMAT or loss_scale=…, got 'head'",
    'phase=[{when={trigger="stal"}}, {}]': "phase 1: a phase's when needs trigger = one of underflow, skipped, loss_s",
    'phase=[{when={trigger="skipped", abov=1}}, {}]': "phase 1: unknown key 'abov' of the trigger skipped; known: a",
    "train": "--set takes key=value, such as train.steps=200; got 'train'",
    "=5": "--set takes key=value, such as train.steps=200; got '=5'",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_setting_that_means_nothing_is_an_error_that_says_what_is_possible(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [setting])
    assert WRONG[setting] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_errors_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"train.steps: .*, got 0; train.batch: .*, got 0"):
        load(None, ["train.steps=0", "train.batch=0"])


def test_a_schedule_of_pruning_that_cannot_be_is_an_error_if_it_would_be_used() -> None:
    late = "train.prune_begin=0.8"
    assert load(None, [late]).train.prune_begin == load(None, [late, "train.prune=2:4"]).train.prune_begin == 0.8
    with pytest.raises(ConfigError, match=r"train.prune_begin = 0.8 comes after train.prune_end = 0.6; give a smaller"):
        load(None, [late, "train.prune=magnitude"])
    with pytest.raises(
        ConfigError, match=r"train.prune_sparsity = 0.9, but train.prune = '2:4' makes it 0.5; leave it"
    ):
        load(None, ["train.prune=2:4", "train.prune_sparsity=0.9"])


def test_a_key_set_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--set train.steps is given twice"):
        load(None, ["train.steps=5", " train.steps = 6"])


def test_a_key_below_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--set train.steps.max: steps is a value, not a group of keys"):
        load(None, ["train.steps=5", "train.steps.max=6"])


def test_a_missing_or_unreadable_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*none.toml; without one `mezzo train` chooses a model"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\nsteps=5")
    with pytest.raises(ConfigError, match=r"bad.toml is not a config: .*line 1"):
        load(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"policy = '\xe9'")
    with pytest.raises(ConfigError, match=r"latin.toml is not a config: .*utf-8"):
        load(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match=r"is not a config: .*directory"):
        load(tmp_path)


def test_a_policy_from_a_file_is_read_once_and_spelled_out(tmp_path: Path) -> None:
    mine = tmp_path / "my.toml"
    mine.write_text('recipe = "fp16"\n[[rule]]\nsite = "head:*"\nformat = "fp32"\n')
    config = load(None, [f'policy="{mine}; head:input=bf16"'])
    table = load(None, base={"policy": {"recipe": str(mine)}})
    mine.unlink()
    assert config.policy == "fp16; head:*=float32; head:input=bfloat16"
    assert table.policy == {"recipe": "fp16", "rule": [{"site": "head:*", "format": "float32"}]}
    assert parse(tomllib.loads(config.to_toml())) == config


def test_a_config_that_was_made_by_hand_is_spelled_out_for_the_run(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('recipe = "fp16"')
    assert anchored(Config(policy=str(tmp_path / "my.toml"))).policy == "fp16"


PHASES = """
policy = "fp16; head:*=float32"
[[phase]]
until = 400
when = {trigger = "skipped", above = 3}
[[phase]]
policy = {recipe = "fp32"}
until = 0.5
calibrate = true
[[phase]]
rules = "*:fprop.a=bf16; head:*=bf16"
lr = 0.1
"""


def test_phases_take_the_policy_of_the_config_or_their_own_and_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(PHASES)
    config = load(path)
    schedule = config.schedule()
    assert schedule is not None
    assert schedule.phases == (
        Phase(Policy.parse("fp16; head:*=float32"), until=400, when=Skipped(3)),
        Phase(Policy("fp32"), until=0.5, calibrate=True),
        Phase(Policy.parse("fp16; *:fprop.a=bfloat16; head:*=bfloat16"), lr=0.1),
    )
    assert schedule.ends == (400, 500, None)
    path.write_text(config.to_toml())
    assert load(path) == config
    assert load(path).to_toml() == config.to_toml()


def test_a_schedule_may_be_named() -> None:
    config = load(None, ["phase=dmp", "policy=nvfp4", "train.steps=100"])
    schedule = config.schedule()
    assert schedule is not None
    assert (schedule.phases, schedule.ends) == (named("dmp", Policy("nvfp4")), (75, 80, None))
    assert parse(tomllib.loads(config.to_toml())) == config
    assert load().schedule() is None


def test_phases_that_name_files_are_spelled_out_and_their_references_anchored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.toml").write_text('recipe = "fp16"\n[[rule]]\nsite = "head:*"\nformat = "fp32"\n')
    monkeypatch.chdir(tmp_path)
    when = {"trigger": "parts", "run": "runs/first", "above": 0.01}
    config = anchored(parse({"phase": [{"policy": "my.toml", "when": when}, {"policy": {"recipe": "my.toml"}}]}))
    assert isinstance(config.phase, tuple)
    assert config.phase[0].policy == "fp16; head:*=float32"
    assert config.phase[1].policy == {"recipe": "fp16", "rule": [{"site": "head:*", "format": "float32"}]}
    assert config.phase[0].when == when | {"run": str(tmp_path / "runs/first")}
    assert when["run"] == "runs/first"
