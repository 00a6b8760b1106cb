"""What a Pruner refuses, and what it says then."""

import re

import pytest
from pruned import Net
from torch import nn

from mezzo.errors import ConfigError
from mezzo.torch import Precision, Pruner
from mezzo.torch.prune import EXCLUDE

pytestmark = pytest.mark.usefixtures("slow_16_bits")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "4:8"}, "kind is one of 'magnitude', '2:4', got '4:8'"),
        ({"scope": "model"}, "scope is one of 'layer', 'global', got 'model'"),
        ({"sparsity": 0.0}, "sparsity is a share between 0 and 1, both left out; got 0.0"),
        ({"sparsity": 1.0}, "sparsity is a share between 0 and 1, both left out; got 1.0"),
        ({"sparsity": float("nan")}, "sparsity is a share between 0 and 1, both left out; got nan"),
        ({"kind": "2:4", "sparsity": 0.75}, "2:4 keeps two of every four weights: its sparsity is 0.5, not 0.75"),
        ({"begin": 9, "end": 8}, "pruning begins at step 9 and ends before it, at step 8; give begin ≤ end"),
        ({"begin": -1}, "begin is a step from 0 on and every at least 1, got begin=-1, every=1"),
        ({"every": 0}, "begin is a step from 0 on and every at least 1, got begin=0, every=0"),
        (
            {"include": "upp.*"},
            "nothing to prune: include='upp.*' without '*head.*', '*classifier.*' matches no weight; weights of two "
            "axes or more, embeddings and norms left out: up.weight, down.weight, head.weight",
        ),
        ({"include": "tokens.*"}, "nothing to prune: include='tokens.*'"),
        ({"exclude": "haed.*"}, "exclude: 'haed.*' matches nothing that could be pruned; weights of two axes or more"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(how, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Pruner(Net(), **how)


def test_2_to_4_names_the_layer_whose_input_size_is_no_multiple_of_4():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    message = (
        "2:4 takes weights whose input size is a multiple of 4; 1.weight (8, 6) has 6 inputs: change the layer's input "
        "size, or leave it out with Pruner(exclude=(*EXCLUDE, '1.weight'))"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        Pruner(model, "2:4")
    assert Pruner(model, "2:4", exclude=(*EXCLUDE, "1.weight")).names == ["0.weight"]


def test_a_pruner_of_another_model_is_refused():
    model = Net()
    with pytest.raises(ConfigError, match="the pruner is of another model; make it with Pruner"):
        Precision(model, None, "fp32", pruner=Pruner(Net()))
    assert "forward" not in model.head.__dict__
