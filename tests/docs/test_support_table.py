"""The table of what each framework has, in docs/frameworks.md, is the one that the errors come from.

Written anew by `python tests/docs/test_support_table.py`.
"""

from pathlib import Path

import pytest

from mezzo.errors import ConfigError
from mezzo.policy import RECIPES, Phase, Policy
from mezzo.policy.support import FEATURES, FRAMEWORKS, carried_out, refuse, refuse_phases
from mezzo.train.frameworks import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
BEGIN = "<!-- support table: written by tests/docs/test_support_table.py -->"
END = "<!-- end of the support table -->"


def table():
    lines = ["| | PyTorch | JAX | TensorFlow | where it is not |", "|---|---|---|---|---|"]

    def row(name, lacks):
        remedies = dict.fromkeys(lacks.values())
        cells = ["no" if framework in lacks else "yes" for framework in FRAMEWORKS]
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(remedies)} |")

    for feature in FEATURES:
        row(feature.name, feature.lacks)
    left = [name for name in RECIPES if not all(carried_out(name, framework) for framework in FRAMEWORKS)]
    row(f"recipes {', '.join(f'`{name}`' for name in RECIPES if name not in left)}", {})
    for name in left:
        lacks = {f: "its weights or moments are below 32 bits" for f in FRAMEWORKS if not carried_out(name, f)}
        row(f"recipe `{name}`", lacks)
    for option in OPTIONS:
        row(f"`mezzo train`: `{option.key}`", option.lacks)
    return "\n".join(lines)


def page_with_table():
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def test_the_page_shows_the_table_that_the_errors_come_from():
    assert PAGE.read_text(encoding="utf-8") == page_with_table(), "run python tests/docs/test_support_table.py"


ASKING = {
    "delayed tensor scales (`delayed`)": "fp8; *:fprop.a=e4m3@tensor delayed",
    "norms, softmax and losses in another format than float32 (`compute`)": "bf16; *:compute=bfloat16",
    "weights stored below 32 bits (`master` in bfloat16, kahan, split)": "bf16; *:master=bfloat16 kahan",
    "moments stored below 32 bits (`state`)": "bf16; *:state=bfloat16",
    "what other operations keep for the backward pass (`saved`)": "bf16; *:saved=mxfp8",
}


@pytest.mark.parametrize("framework", ["jax", "tensorflow"])
def test_each_row_that_a_rule_can_ask_for_is_an_error_where_it_says_no(framework):
    asked = {feature.name for feature in FEATURES if feature.used is not None}
    assert asked == set(ASKING)
    for name, policy in ASKING.items():
        (feature,) = (feature for feature in FEATURES if feature.name == name)
        with pytest.raises(ConfigError) as error:
            refuse(Policy.parse(policy), framework)
        assert feature.lacks[framework] in str(error.value)
        refuse(Policy.parse(policy), "torch")
    for recipe in RECIPES:
        if carried_out(recipe, framework):
            refuse_phases([Phase(Policy(recipe), until=1), Phase(Policy("fp32"))], framework)


if __name__ == "__main__":
    PAGE.write_text(page_with_table(), encoding="utf-8")
