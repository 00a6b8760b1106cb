import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzo.errors import ConfigError
from mezzo.formats import FORMATS, SCALED, get_format
from mezzo.formats.rounding import ROUNDINGS
from mezzo.policy import RECIPES, LossScaling, Policy, Rule, Site, Spec
from mezzo.policy.policy import find
from mezzo.policy.site import ROLES, SHORTHANDS

PATHS = st.text(string.ascii_letters + string.digits + "._*?[]-:", min_size=1, max_size=12)
CALLS = st.one_of(st.just(""), st.integers(0, 99).map("#{}".format))
ROLE = st.sampled_from([*ROLES, *SHORTHANDS, "*", "fprop.*", "?grad.out"])
OPERAND = st.sampled_from(["fprop.a", "wgrad.b"])
FORMAT = st.sampled_from([*FORMATS.values(), *SCALED.values()])
# What each kind of role may be given beside a format.
RULES = st.one_of(
    st.builds(lambda path, call, role, fmt: Rule(path + call, role, Spec(fmt)), PATHS, CALLS, ROLE, FORMAT),
    st.builds(
        lambda path, role, fmt, rounding, block: Rule(path, role, Spec(fmt, rounding, block)),
        PATHS, OPERAND, FORMAT, st.sampled_from(ROUNDINGS), st.sampled_from([0, 4, 16, 64]),
    ),
    st.builds(
        lambda path, role, n: Rule(path, role, Spec(get_format("e5m2@tensor"), delayed=n)),
        PATHS, OPERAND, st.integers(0, 99),
    ),
    st.builds(
        lambda path, keep: Rule(path, "master", Spec(get_format("bf16"), keep=keep)),
        PATHS, st.sampled_from(["kahan", "split"]),
    ),
)  # fmt: skip
POWERS = st.integers(-20, 20).map(lambda n: 2.0**n)
SCALINGS = st.one_of(
    st.none(),
    st.just(LossScaling()),
    POWERS.map(LossScaling.constant),
    st.floats(1e-30, 1e30).map(LossScaling.constant),
    st.builds(
        LossScaling,
        init=st.just(512.0),
        growth_factor=st.floats(1.001, 100),
        backoff_factor=st.floats(0.001, 0.999),
        growth_interval=st.integers(1, 10**6),
        floor=st.floats(1e-6, 512.0),
        ceiling=st.floats(512.0, 1e30),
        hysteresis=st.integers(1, 9),
        patience=st.integers(1, 99),
    ),
)
POLICIES = st.builds(
    Policy,
    st.sampled_from([*RECIPES]),
    st.lists(RULES, max_size=5, unique_by=lambda rule: rule.site).map(tuple),
    SCALINGS,
)


@given(POLICIES)
def test_a_policy_survives_its_own_text(policy):
    assert Policy.parse(str(policy)) == policy
    assert str(Policy.parse(str(policy))) == str(policy)


@given(POLICIES)
def test_a_policy_survives_toml(policy):
    assert Policy.from_toml(policy.to_toml()) == policy


@pytest.mark.parametrize(
    "text",
    ["bf16", "bf16; head:*=float32; blocks.0.*:input=float32", "fp16; loss_scale=1024", "fp16; loss_scale=none",
     "bf16; loss_scale=dynamic", "fp16; loss_scale=dynamic; loss_scale.hysteresis=3", "bf16; loss_scale:input=fp16",
     "fp32; blocks.1#2:fprop.a=float16"],
)  # fmt: skip
def test_the_canonical_spelling_is_kept(text):
    assert str(Policy.parse(text)) == text.replace("=fp16", "=float16")


def test_spaces_and_aliases_become_canonical():
    assert str(Policy.parse("  bf16 ;head:input = fp32;loss_scale = 8.0")) == "bf16; head:input=float32; loss_scale=8"


def test_a_policy_string_without_loss_scale_has_its_recipes_own():
    assert Policy.parse("fp16").loss_scaling == LossScaling()
    assert Policy.parse("bf16").loss_scaling is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf61", f"unknown recipe 'bf61'; known: {', '.join(RECIPES)}; did you mean bf16?"),
        ("", "unknown recipe ''; known: fp64, fp32, tf32, bf16, fp16"),
        ("bf16; head:input=fp17", "unknown number format 'fp17'; known: float64, float32, tf32, bfloat16, float16"),
        ("bf16; head:inputs=fp16", "unknown role 'inputs' in the rule for 'head'; known: input, weight, grad_output"),
        ("bf16; head", "expected SITE=FORMAT or loss_scale=…, got 'head' in policy 'bf16; head'"),
        ("bf16;", "expected SITE=FORMAT or loss_scale=…, got ''"),
        ("bf16; head=fp16", "unknown key 'head' in policy 'bf16; head=fp16'; known: loss_scale, loss_scale.FIELD, P"),
        ("bf16; a:input=fp16; a:input=fp32", "the policy has two rules for 'a:input'; keep one"),
        ("fp16; loss_scale=2; loss_scale=4", "loss_scale is given twice in policy 'fp16; loss_scale=2; loss_scale=4'"),
        ("fp16; loss_scale.init=2; loss_scale.init=2", "loss_scale.init is given twice"),
        ("fp16; loss_scale.start=2", "unknown key 'start' in policy.loss_scale; known: init, growth_factor"),
        ("fp16; loss_scale=8; loss_scale.floor=2", "loss_scale=8 leaves nothing for loss_scale.floor to say"),
        ("fp16; loss_scale=auto", "loss_scale is dynamic, none, a number or a table of fields; got 'auto'"),
        ("fp16; loss_scale=0", "loss_scale needs 0 < floor <= init <= ceiling, got floor 0"),
        ("fp16; loss_scale=nan", "loss_scale needs 0 < floor <= init <= ceiling"),
        ("fp16; loss_scale.growth_factor=0.5", "loss_scale needs growth_factor > 1 > backoff_factor > 0, got 0.5"),
        ("fp16; loss_scale.hysteresis=0", "loss_scale.hysteresis is at least 1, got 0"),
        ("fp16; loss_scale.patience=2.5", "loss_scale.patience is a whole number, got 2.5"),
        ("fp16; loss_scale.init=big", "loss_scale.init is a number, got 'big'"),
        ("bf16; :input=fp16", "the rule for 'input' has an empty path; `*` means every path"),
        ("bf16; a#x:input=fp16", "a call index is a whole number, got 'a#x'; write path#1 for the second call"),
    ],
)
def test_a_bad_policy_string_is_refused_with_the_reason(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Policy.parse(text)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("recipes = 'bf16'", "unknown key 'recipes' in policy; known: recipe, rule, loss_scale"),
        ("recipe = 16", "policy.recipe is a string, got 16"),
        ("recipe = 'bf16'\nrecipe = 'fp16'", "the policy is not valid TOML: "),
        ("recipe = 'bf16'\nrule = 'head:*'", "policy.rule is a list of tables: write [[rule]] with site and format"),
        ("[[rule]]\nsite = 'a:input'", "a policy rule needs the strings site and format, got {'site': 'a:input'}"),
        ("[[rule]]\nsite = 'a:input'\nformat = 16", "a policy rule needs the strings site and format"),
        ("[[rule]]\nsite = 'a:input'\nformat = 'fp16'\nwhen = 3", "unknown key 'when' in policy.rule; known: site, f"),
        ("[[rule]]\nsite = 'a'\nformat = 'fp16'", "a rule's site is PATH:ROLE, such as head:*"),
        ("loss_scale = true", "loss_scale is dynamic, none, a number or a table of fields; got True"),
        ("[loss_scale]\nfloor = 4.0\ninit = 2.0", "loss_scale needs 0 < floor <= init <= ceiling, got floor 4, init 2"),
    ],
)
def test_a_bad_policy_table_is_refused_with_the_reason(toml, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Policy.from_toml(toml)


def test_the_last_rule_that_matches_wins():
    policy = Policy.parse("bf16; blocks.*:input=float16; blocks.1.*:fprop.a=float32; *:wgrad.*=float64")
    assert policy.format(Site("blocks.1.up", "fprop.a")) == get_format("float32")
    assert policy.format(Site("blocks.2.up", "fprop.a")) == get_format("float16")
    assert policy.format(Site("head", "fprop.a")) == get_format("bfloat16")
    assert policy.format(Site("blocks.1.up", "wgrad.b")) == get_format("float64")
    assert policy.format(Site("head", "fprop.probs")) is None


@pytest.mark.parametrize("name", SHORTHANDS)
def test_a_shorthand_speaks_of_its_tensor_in_every_product_and_of_nothing_else(name):
    rule = Rule.parse(f"a:{name}", "fp16")
    assert {role for role in ROLES if rule.matches(Site("a", role))} == set(SHORTHANDS[name])


def test_every_recipe_speaks_of_every_role_but_the_probabilities_and_what_is_saved():
    for name in RECIPES:
        assert {role for role in ROLES if Policy.parse(name).format(Site("x", role)) is None} == {
            "fprop.probs",
            "saved",
        }


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("nvfp4", Spec(SCALED["nvfp4"])),
        ("nvfp4 stochastic hadamard", Spec(SCALED["nvfp4"], "stochastic", 16)),
        ("bf16 toward_zero", Spec(get_format("bf16"), "toward_zero")),
        ("e4m3@tensor delayed=3", Spec(get_format("e4m3@tensor"), delayed=3)),
        ("bf16 kahan", Spec(get_format("bf16"), keep="kahan")),
    ],
)
def test_words_after_a_format_say_how_tensors_get_into_it(text, spec):
    assert Spec.parse(text) == spec == Spec.parse(str(spec))
    assert spec.plain == (text == "nvfp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nvfp4 stohastic", "unknown word 'stohastic' after the format 'nvfp4'; known: stochastic, toward_zero"),
        ("nvfp4 stochastic toward_zero", "says its rounding twice"),
        ("nvfp4 hadamard=8", "power of four"),
        ("nvfp4 hadamard=x", "unknown word 'hadamard=x'"),
        ("nvfp4 delayed", "one float32 scale, e4m3@tensor; not for nvfp4"),
        ("e4m3@row delayed", "not for float8_e4m3fn@row"),
        ("fp16 kahan", "weights in bfloat16, not in float16"),
        ("bf16 split stochastic", "to nearest, not stochastic"),
        ("", "unknown number format ''"),
    ],
)
def test_words_that_make_no_sense_are_errors(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Spec.parse(text)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("*:compute=bf16 stochastic", "another rounding is for"),
        ("*:fprop.out=bf16 stochastic", "also speaks of fprop.out"),
        ("*:input=nvfp4 hadamard", "also speaks of fprop.query"),
        ("*:fprop.a=bf16 kahan", "kahan and split are for master"),
        ("*:state=e4m3@tensor delayed", "delayed is for"),
    ],
)
def test_words_are_refused_where_they_mean_nothing(rule, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Policy.parse(f"bf16; {rule}")


def paths_of(blocks):
    return ["(model)", "blocks", "head", *(f"blocks.{i}" for i in range(blocks)),
            *(f"blocks.{i}.up.{j}" for i in range(blocks) for j in range(4))]  # fmt: skip


@pytest.mark.parametrize(("blocks", "meant"), [(1, []), (4, [3]), (12, [10, 11]), (62, [0, 1, *range(54, 62)])])
def test_rules_by_depth_count_the_models_blocks(blocks, meant):
    """NVFP4's recipe keeps 2 and 8 of the paper's 62 blocks."""
    for name, more in (("blocks", ""), ("model.blocks", ".up"), ("encoder.layers", ".fc1"), ("transformer.h", "")):
        paths = [f"{name}.{i}{below}" for i in range(blocks) for below in ("", ".up", ".fc1")]
        rules = Policy.parse("nvfp4").rules_for(paths)
        found = [find(rules, Site(f"{name}.{i}{more}", "fprop.a")) for i in range(blocks)]
        assert [i for i, spec in enumerate(found) if spec == Spec(get_format("bf16"))] == meant, name


@pytest.mark.parametrize("path", ["head", "lm_head", "model.head", "model.lm_head"])
def test_an_output_head_stays_in_16_bits_whatever_it_is_part_of(path):
    for name in ("fp8", "fp8-row", "fp8-block", "mxfp8", "mxfp4", "nvfp4"):
        policy = Policy.parse(name)
        for role in ("fprop.a", "fprop.b", "dgrad.a", "dgrad.b", "wgrad.a", "wgrad.b"):
            assert policy.spec(Site(path, role)) == Spec(get_format("bf16"))
        assert policy.format(Site(path, "fprop.out")) == get_format("fp32")


def test_a_glob_over_roles_leaves_out_what_is_stored():
    rule = Rule.parse("head:*", "bf16")
    assert rule.matches(Site("head", "fprop.a"))
    assert rule.matches(Site("head", "compute"))
    assert not any(rule.matches(Site("head", role)) for role in ("master", "state.exp_avg"))


def test_a_rule_by_depth_is_a_rule_like_any_other():
    policy = Policy.parse("bf16; *.up.first-50%:input=float32; blocks.last-50%.up.*#1:weight=float32")
    assert Policy.from_toml(policy.to_toml()) == policy == Policy.parse(str(policy))
    rules = policy.rules_for(paths_of(3))
    assert [str(rule) for rule in rules[-4:]] == [
        "*.up.0:input=float32", "*.up.1:input=float32",
        "blocks.1.up.*#1:weight=float32", "blocks.2.up.*#1:weight=float32",
    ]  # fmt: skip
    policy.check_paths(paths_of(3))
    with pytest.raises(ConfigError, match="matches nothing"):
        Policy.parse("bf16; layers.last-10%.*:input=float32").check_paths(paths_of(3))


def test_a_call_index_narrows_a_rule_to_one_call():
    rule = Rule.parse("block#1:input", "fp16")
    assert rule.by_call
    assert [rule.matches(Site("block", "fprop.a", call)) for call in range(3)] == [False, True, False]
    assert rule.matches_path("block")
    assert not Rule.parse("block:input", "fp16").by_call
    assert str(Site("block", "fprop.a", 1)) == "block#1:fprop.a"


def test_a_rule_that_matches_no_path_is_refused_and_close_names_are_offered():
    paths = ["", "blocks.0.attn", "blocks.1.attn", "head"]
    Policy.parse("bf16; head:*=fp32; blocks.*:input=fp32; blocks.1.attn#3:input=fp16").check_paths(paths)
    with pytest.raises(
        ConfigError, match=re.escape("'heat:*=float32' matches nothing in this model; did you mean hea")
    ):
        Policy.parse("bf16; heat:*=fp32").check_paths(paths)


def test_a_rule_cannot_hold_the_separators_of_the_text_form():
    for path in ("a;b", "a=b"):
        with pytest.raises(ConfigError, match="cannot hold ; or ="):
            Rule.parse(f"{path}:input", "fp16")


def test_a_policy_made_by_hand_scales_the_loss_as_its_recipe_does():
    assert Policy("fp16") == Policy.parse("fp16")
    assert Policy("fp16").loss_scaling == LossScaling()
    assert Policy("fp16", loss_scaling=None).loss_scaling is None
