"""What is said before training: errors that the backward pass would meet, and advice about formats and shapes."""

import re

import pytest
import torch
from torch import nn

from mezzo.errors import ConfigError
from mezzo.torch import Precision

TURNED = "bf16; *:wgrad.a=mxfp4 stochastic hadamard=64; *:wgrad.b=mxfp4 hadamard=64"


def stack(d_in=64, hidden=64, d_out=64):
    return nn.Sequential(nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, d_out))


# --- Hadamard blocks ---


def test_rows_that_a_hadamard_block_does_not_divide_are_an_error_of_the_forward_pass():
    model = stack()
    precision = Precision(model, None, TURNED)
    model(torch.ones(2, 64, 64))
    with pytest.raises(ConfigError) as caught:
        model(torch.ones(2, 50, 64))
    assert str(caught.value) == (
        "0:wgrad.a=mxfp4 stochastic hadamard=64: blocks of 64 for the Hadamard transform do not divide the 100 rows "
        "(of a linear layer: batch × sequence) that this product sums over; make them a multiple of 64, or drop the "
        "transform with the rules 0:wgrad.a=mxfp4 stochastic; 0:wgrad.b=mxfp4"
    )
    precision.remove()
    remedy = str(caught.value).partition("with the rules ")[2].replace("0:", "*:")
    Precision(model, None, f"bf16; {remedy}")
    model(torch.ones(2, 50, 64)).sum().backward()


def test_what_is_not_trained_on_may_have_any_number_of_rows():
    model = stack()
    Precision(model, None, TURNED)
    with torch.no_grad():
        model(torch.ones(1, 7, 64))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(torch.ones(1, 7, 64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("product", "sizes", "what"),
    [("fprop", (72, 64, 64), "0:fprop.a=bfloat16 hadamard: blocks of 16 .* the 72 input features"),
     ("dgrad", (64, 64, 72), "2:dgrad.a=bfloat16 hadamard: blocks of 16 .* the 72 output features")],
)  # fmt: skip
def test_each_product_has_its_own_axis(product, sizes, what):
    model = stack(*sizes)
    Precision(model, None, f"bf16; *:{product}.?=bf16 hadamard")
    with pytest.raises(ConfigError, match=what):
        model(torch.ones(16, sizes[0]))


@pytest.mark.parametrize(
    ("product", "shape", "n", "length"),
    [("fprop", (2, 16, 8), 8, 8), ("dgrad", (2, 16, 16), 8, 8), ("wgrad", (2, 8, 16), 16, 8)],
)
def test_matrix_products_are_checked_too(product, shape, n, length):
    class Product(nn.Module):
        def forward(self, x, y):
            return x @ y

    model = Product()
    Precision(model, None, f"bf16; *:{product}.?=bf16 hadamard")
    x, y = torch.ones(shape, requires_grad=True), torch.ones(shape[-1], n, requires_grad=True)
    with pytest.raises(ConfigError, match=re.escape(f"(model):{product}.a=bfloat16 hadamard: ") + f".* the {length} "):
        model(x, y)
    x, y = torch.ones(2, 16, 16, requires_grad=True), torch.ones(16, 16, requires_grad=True)
    model(x, y).sum().backward()
