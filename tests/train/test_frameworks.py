"""One run, several frameworks: what is on disk crosses to the bit, what a framework lacks is an error with a remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_runs import OVERFLOWING, Heard, Tiny, assert_same_state, logged, saved, train

from mezzo.errors import CheckpointError, ConfigError, MissingExtraError
from mezzo.models.shapes import parameter_shapes
from mezzo.policy import Policy
from mezzo.train import adamw_state, frameworks
from mezzo.train.arrays import Named, bytes_of
from mezzo.train.checkpoint import Checkpoint, newest
from mezzo.train.config import Config, parse
from mezzo.train.rundir import RunDir
from mezzo.train.scale_state import Scales
from mezzo.train.session import Session
from mezzo.train.stored import read_config

# Keras' own, where it reads a variable:
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(autouse=True, scope="module")
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sessions of one policy share what was compiled."""
    if find_spec("jax") is None:
        yield
        return
    import jax

    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def under(config: Config, framework: str, **changes: Any) -> Config:
    train = config.train.model_copy(update={"framework": framework, **changes})
    return config.model_copy(update={"train": train})


def checkpoint_of(path: Path) -> Checkpoint:
    found, problems = newest(path)
    assert found is not None, problems
    return found


def assert_same_arrays(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert np.array_equal(bytes_of(a), bytes_of(b)), name


# --- the layout on disk ---


@pytest.mark.parametrize("more", [(), ("model.tied=false", "model.bias=true", "model.norm=layernorm")])
def test_the_moments_of_torch_are_read_and_written_again_to_the_bit(
    tmp_path: Path, tiny: Tiny, more: tuple[str, ...]
) -> None:
    session = Session.start(tiny("train.steps=3", *more), tmp_path / "run", Heard())
    train(session)
    checkpoint = checkpoint_of(tmp_path / "run")
    arrays, meta = checkpoint.load_group("optimizer"), checkpoint.meta["optimizer"]
    shapes = parameter_shapes(session.shape)
    assert list(shapes) == [name for name, _ in session.model.named_parameters()] == list(session.model.state_dict())
    state, options = adamw_state.from_disk(shapes, arrays, meta)
    assert (state.count, options.betas, options.weight_decay) == (3, (0.9, 0.95), 0.1)
    again, meta_again = adamw_state.to_disk(shapes, state, options, meta["groups"][0]["options"]["values"]["lr"])
    assert meta_again == meta
    assert_same_arrays(again, arrays)
    for name, parameter in session.model.named_parameters():
        assert np.array_equal(state.first[name], session.optimizer.state[parameter]["exp_avg"].numpy()), name


def test_before_the_first_step_there_are_no_moments_on_disk(tiny: Tiny) -> None:
    shapes = parameter_shapes(tiny().model.resolve())
    zeros: Named = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    arrays, meta = adamw_state.to_disk(
        shapes, adamw_state.AdamW(0, zeros, zeros, begun=False), adamw_state.Options((0.9, 0.95), 0.1), 1e-3
    )
    assert arrays == {}
    state, _ = adamw_state.from_disk(shapes, {}, meta)
    assert state.count == 0
    assert_same_arrays(state.first, zeros)


def test_moments_that_do_not_fit_are_named(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=1"), tmp_path / "run", Heard())
    train(session)
    checkpoint, shapes = checkpoint_of(tmp_path / "run"), parameter_shapes(session.shape)
    arrays, meta = checkpoint.load_group("optimizer"), checkpoint.meta["optimizer"]
    with pytest.raises(CheckpointError, match=r"norm.weight was float32\[32\], is float32\[31\]"):
        adamw_state.from_disk(shapes | {"norm.weight": (31,)}, arrays, meta)
    with pytest.raises(CheckpointError, match="groups of 6 and 3 parameters in the checkpoint, of 6 and 2 in this"):
        adamw_state.from_disk({name: shape for name, shape in shapes.items() if name != "norm.weight"}, arrays, meta)
    with pytest.raises(CheckpointError, match="is of SGD, this optimizer is AdamW"):
        adamw_state.from_disk(shapes, arrays, meta | {"optimizer": "SGD"})
    without = {name: array for name, array in arrays.items() if name != "state.4.exp_avg"}
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: state\.4\.exp_avg\n"):
        adamw_state.from_disk(shapes, without, meta)
    with pytest.raises(CheckpointError, match=r"stepped a different number of times: \[1, 5\]"):
        adamw_state.from_disk(shapes, arrays | {"state.2.step": np.array(5, np.float32)}, meta)


def test_moments_in_low_precision_are_left_to_torch(tmp_path: Path, tiny: Tiny) -> None:
    session = Session.start(tiny("train.steps=1", policy="bf16; *:state=bfloat16"), tmp_path / "run", Heard())
    train(session)
    checkpoint = checkpoint_of(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"rest in less than 32 bits, which only torch reads; .* \*:state=float32"
    ):
        adamw_state.from_disk(
            parameter_shapes(session.shape), checkpoint.load_group("optimizer"), checkpoint.meta["optimizer"]
        )


PHASES = [{"until": 3}, {"policy": "fp32", "until": 5}, {"policy": "fp16; loss_scale=dynamic; loss_scale.init=64"}]


def test_the_scales_of_torch_are_read_and_written_again_also_those_that_wait(tmp_path: Path, tiny: Tiny) -> None:
    data = tiny("train.steps=6", policy=OVERFLOWING).model_dump(exclude_none=True)
    train(Session.start(parse(data | {"phase": PHASES}), tmp_path / "run", Heard()))
    checkpoint = checkpoint_of(tmp_path / "run")
    arrays, policy = checkpoint.load_group("precision"), checkpoint.meta["policy"]
    scales, messages = Scales.from_disk(arrays, policy, Policy.of(policy))
    assert (messages, scales.steps, scales.draws, len(scales.waiting)) == ([], 6, 12, 1)
    assert_same_arrays(scales.to_disk(), arrays)
    back = scales.switch(Policy.of(policy), Policy.of(OVERFLOWING))
    assert back.scale == scales.waiting[0][1].scale < 2**24, "it goes on where it stopped"
    other, messages = Scales.from_disk(arrays, policy, Policy.of("fp16"))
    assert messages == [f"the policy was {policy}, now fp16: a new loss scale begins"]
    assert (other.scale, other.steps, other.draws, other.waiting) == (2.0**16, 6, 12, ())
    with pytest.raises(CheckpointError, match="group precision has no scale, draws"):
        Scales.from_disk({k: v for k, v in arrays.items() if k not in ("scale", "draws")}, policy, Policy.of(policy))


# --- what a framework lacks ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.compile=true",),
            r"jax cannot carry out train.compile \(set it to false: .*\); or take --framework torch",
        ),
        (("observe.every=5",), r"observe.every \(set it to 0\)"),
        (("observe.whatif=['nvfp4']", "train.prune=2:4"), r"train.prune \(set it to 'none'\), observe.whatif \(set it"),
        (("train.clip_value=1", "train.clip_adaptive=1"), r"train.clip_value \(.*\), train.clip_adaptive \("),
        (("train.deterministic=true",), r"train.deterministic \(leave it out\)"),
        (("policy=fp64",), r"jax cannot carry out float64 sites \(take float32: its weights are float32"),
        (("policy=bf16; head:weight=float64",), "cannot carry out float64 sites"),
        (("policy=bf16-pure",), r"weights stored below 32 bits .* not there under jax; keep float32 masters"),
        (("policy=bf16; *:state=bfloat16",), r"moments stored below 32 bits .* not there under jax"),
    ],
)
def test_what_jax_lacks_is_an_error_with_the_remedy(tiny: Tiny, settings: tuple[str, ...], message: str) -> None:
    config = under(tiny(*settings), "jax")
    with pytest.raises(ConfigError, match=message):
        frameworks.check(config)
    frameworks.check(under(config, "torch"))


@pytest.mark.parametrize("framework", ["jax", "tensorflow"])
def test_float64_in_one_phase_is_refused_too(tiny: Tiny, framework: str) -> None:
    data = tiny("train.steps=6").model_dump(exclude_none=True)
    config = parse(data | {"phase": [{"until": 3}, {"policy": "fp64"}]})
    with pytest.raises(ConfigError, match=rf"{framework} cannot carry out float64 sites"):
        frameworks.check(under(config, framework))
    frameworks.check(under(config, "torch"))


def test_jax_says_native_of_16_bits_where_its_device_multiplies_them_itself(tiny: Tiny) -> None:
    pytest.importorskip("optax")
    from mezzo.train.jax_engine import JaxEngine

    policies = [Policy("mxfp8"), Policy("bf16"), Policy("fp16")]
    config = tiny()
    for platform, route in (("cpu", "emulated"), ("gpu", "native")):
        engine = object.__new__(JaxEngine)  # nothing is placed on the device, which is none
        engine.device = SimpleNamespace(platform=platform)
        engine.config, engine.shape = config, config.model.resolve()
        engine.options, engine._compiled = adamw_state.Options((0.9, 0.95), 0.1), {}
        assert engine._at(Policy("bf16")).precision.native is (platform == "gpu")
        routes = engine.routes(policies)
        assert (routes.pop("bfloat16"), routes.pop("float16"), routes.pop("float32")) == (route, route, "native")
        assert set(routes.values()) == {"emulated"}


def test_a_framework_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frameworks, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'jax' needs the package 'jax', .* run: pip install 'mezzo\[jax\]'"):
        Session.start(under(tiny(), "jax"), tmp_path / "run", Heard())
    assert not (tmp_path / "run/config.toml").exists()


# --- training ---

PACKAGES = {"jax": ("jax", "optax"), "tensorflow": ("keras", "tensorflow")}


@pytest.fixture(params=list(PACKAGES))
def framework(request: pytest.FixtureRequest) -> str:
    if missing := [name for name in PACKAGES[request.param] if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed")
    return str(request.param)


def test_a_run_of_torch_goes_on_under_another_framework_and_back(tmp_path: Path, tiny: Tiny, framework: str) -> None:
    """The two sum in other orders, and where operands are rounded to float16 a rounding may flip: 2^-11 of one operand,
    which in four steps moves the loss, a mean of 128 targets, by less than that."""
    config = tiny("train.steps=10", "train.checkpoint_every=6", "train.schedule=constant", policy=OVERFLOWING)
    train(Session.start(config, tmp_path / "torch", Heard()))
    shutil.copytree(tmp_path / "torch", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed/checkpoints/step-000010")
    there, heard = tmp_path / "mixed", Heard()
    before = checkpoint_of(there)

    session = Session.resume(there, under(read_config(RunDir.open(there)), framework), heard)
    groups, meta = session.engine.state()
    assert meta["optimizer"] == before.meta["optimizer"]
    for group in ("model", "optimizer", "precision"):
        assert_same_arrays(groups[group], before.load_group(group))
    train(session)
    assert heard.messages[0] == f"this resume is not bitwise: framework: torch when saved, {framework} now"
    assert len([message for message in heard.messages if "bitwise" in message]) == 1
    one, other = logged(tmp_path / "torch"), logged(there)
    assert [r["loss"] for r in other] == pytest.approx([r["loss"] for r in one], rel=2**-11)
    for key in ("step", "lr", "tokens", "loss_scale", "skipped"):
        assert [record[key] for record in other] == [record[key] for record in one], key
    assert any(record["skipped"] for record in other[6:])
    assert all(record["site"] for record in other[6:] if record["skipped"])
    assert other[-1]["val_loss_fp32"] == pytest.approx(one[-1]["val_loss_fp32"], rel=2**-11)
    assert read_config(RunDir.open(there)).train.framework == framework
    assert checkpoint_of(there).meta["environment"]["framework"] == framework

    step, arrays = saved(there)
    counts, same = (checkpoint_of(path).load_group("precision") for path in (there, tmp_path / "torch"))
    assert_same_arrays(counts, same)
    heard = Heard()
    session = Session.resume(there, under(read_config(RunDir.open(there)), "torch", steps=11), heard)
    assert heard.messages == [f"this resume is not bitwise: framework: {framework} when saved, torch now"]
    groups, _ = session.engine.state()
    assert session.first == step == 10
    for group in ("model", "optimizer", "precision"):
        for name, array in groups[group].items():
            assert np.array_equal(bytes_of(np.asarray(array)), arrays[f"{group}.{name}"]), f"{group}.{name}"
    train(session)
    assert logged(there)[-1]["loss"] < one[0]["loss"]


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, tiny: Tiny, framework: str) -> None:
    data = tiny("train.steps=8", "train.sample_every=8", "train.eval_every=4", policy=OVERFLOWING).model_dump(
        exclude_none=True
    )
    phases = [{"until": 3}, {"policy": "bf16", "until": 6, "lr": 0.5}, {}]
    config = under(parse(data | {"phase": phases}), framework)
    heard = Heard()
    train(Session.start(config, tmp_path / "whole", heard))
    stopping = under(config, framework, checkpoint_every=4)
    train(Session.start(stopping, tmp_path / "parts", Heard()), stop_after=5)
    second = Session.resume(tmp_path / "parts", read_config(RunDir.open(tmp_path / "parts")), Heard())
    assert second.first == 4
    train(second)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    records = logged(tmp_path / "whole")
    assert [record["phase"] for record in records] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert records[6]["loss_scale"] == records[2]["loss_scale"] / (2 if records[2]["skipped"] else 1)
    assert heard.info["routes"] == {"bfloat16": "emulated", "float16": "emulated", "float32": "native"}
    assert records[-1]["sample"].startswith("def ")


BLOCKED = """
import sys


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


sys.meta_path.insert(0, NoTorch())
from mezzo.cli.main import main
sys.argv = ["mezzo", *sys.argv[1:]]
main()
"""


def test_it_trains_where_there_is_no_torch(tmp_path: Path, tiny: Tiny, framework: str) -> None:
    (tmp_path / "config.toml").write_text(tiny("train.steps=2", "train.accumulate=1", policy="bf16").to_toml())
    words = ("train", str(tmp_path / "config.toml"), "--framework", framework, "--out", str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in logged(tmp_path / "run")] == [1, 2]
    assert saved(tmp_path / "run")[0] == 2
