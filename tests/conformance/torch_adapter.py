"""mezzo.torch: eager through the compiled helper, eager in torch's operations, as x @ w, and under torch.compile."""

import sys
from contextlib import nullcontext
from functools import partial
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from adapter import Adapter
from torch import nn

from mezzo import hardware
from mezzo.policy import LossScaling
from mezzo.torch import Precision, hadamard, helper, quantize
from mezzo.torch.philox import bits
from mezzo.torch.scaler import LossScaler

NO_CODES = "mezzo.torch keeps values, not codes"


def tensor(x):
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:  # torch.from_numpy knows no such dtype
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def array(x):
    x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


class Operation(nn.Module):
    """A bare operation of two tensors."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, a, b):
        return self.op(a, b)


class TorchAdapter(Adapter):
    """Without the helper."""

    name = "torch"
    lacks = {"codes": NO_CODES, "block codes": NO_CODES}  # noqa: RUF012

    def surroundings(self):
        return helper.off()

    def quantize(self, x, fmt, **options):
        with self.surroundings():
            return array(quantize(tensor(x), fmt, **options))

    def bits(self, seed, step, site, count):
        return array(bits(seed, step, site, count))

    def hadamard(self, x, **options):
        return array(hadamard(tensor(x), **options))

    def routes(self):
        return ["emulated", "native"]

    def product(self, a, b, g, formats, route):
        fast = 1000.0 if route == "native" else 1.0
        speeds = {"float32": 100.0, "bfloat16": fast, "float16": fast}
        machine = hardware.Hardware("cpu", "a test", speeds, 100.0, "test")
        model, rules = Operation(self.multiply), "; ".join(f"*:{role}={fmt}" for role, fmt in formats.items())
        a, b, g = (tensor(x) for x in (a, b, g))
        a.requires_grad_()
        b.requires_grad_()
        with self.surroundings(), mock.patch.object(hardware, "measure", return_value=machine):
            precision = Precision(model, policy=f"fp32; {rules}")
            y = model(a, b)
            y.backward(g)
            assert {row.route for row in precision.sites() if row.route} >= {route}
            precision.remove()
        return {"fprop": array(y), "dgrad": array(a.grad), "wgrad": array(b.grad)}

    def multiply(self, a, b):
        return F.linear(a, b)

    def loss_scales(self, scaling, overflows):
        scaler, states = LossScaler(LossScaling(**scaling), torch.device("cpu")), []
        for overflow in overflows:
            scaler.update(torch.tensor(overflow))
            s = scaler.state
            states.append((s.scale.item(), s.good.item(), s.bad.item(), s.at_floor.item()))
        return states


class HelperAdapter(TorchAdapter):
    """Through the helper, which else leaves tensors as small as the cases' to torch."""

    name = "torch with the helper"

    def surroundings(self):
        return mock.patch.object(sys.modules["mezzo.torch.quantize"], "HELPER_FROM", 0)


class MatmulAdapter(TorchAdapter):
    """The same products as x @ w of any tensors."""

    name = "torch's matmul"

    def multiply(self, a, b):
        return a @ b.t()


class CompiledAdapter(TorchAdapter):
    """Compiled: each format, rounding and shape is a graph of its own, so it is asked for few cases."""

    name = "torch.compile"

    def surroundings(self):
        return nullcontext()

    def quantize(self, x, fmt, **options):
        return array(torch.compile(partial(quantize, fmt=fmt, **options), fullgraph=True)(tensor(x)))

    def hadamard(self, x, **options):
        return array(torch.compile(partial(hadamard, **options), fullgraph=True)(tensor(x)))
