"""mezzo.formats, the NumPy reference. It has no products; these are made of its `quantize`, as the contract says."""

import numpy as np
from adapter import Adapter

from mezzo.formats import decode, encode, encode_scaled, hadamard, philox, quantize
from mezzo.policy import LossScaling
from mezzo.policy.scale import initial, update

WIDE = ("float32", "tf32", "bfloat16", "float16")  # infinite beyond their range; the others saturate


class NumpyAdapter(Adapter):
    name = "numpy"

    def quantize(self, x, fmt, **options):
        return quantize(x, fmt, **options)

    def decode(self, codes, fmt):
        return decode(codes, fmt)

    def encode(self, x, fmt):
        return encode(x, fmt)

    def encode_scaled(self, x, fmt, *, axis=-1):
        found = encode_scaled(x, fmt, axis=axis)
        return found.codes, found.scales, found.tensor_scale

    def bits(self, seed, step, site, count):
        return philox.bits(seed, step, site, count)

    def hadamard(self, x, **options):
        return hadamard(x, **options)

    def operand(self, x, fmt, axis):
        """As a product sees it that sums over `axis`."""
        overflow = "cast" if fmt in WIDE else "saturate"
        return self.quantize(x, fmt, axis=axis, overflow=overflow).astype(np.float32)

    def result(self, y, fmt):
        return self.quantize(y, fmt, overflow="cast").astype(np.float32)

    def product(self, a, b, g, formats, route):
        y = self.operand(a, formats["fprop.a"], 1) @ self.operand(b, formats["fprop.b"], 1).T
        if formats["fprop.out"] in WIDE[2:]:
            g = self.operand(g, formats["fprop.out"], 1)
        da = self.operand(g, formats["dgrad.a"], 1) @ self.operand(b, formats["dgrad.b"], 0)
        db = self.operand(g, formats["wgrad.a"], 0).T @ self.operand(a, formats["wgrad.b"], 0)
        found = {"fprop": y, "dgrad": da, "wgrad": db}
        return {product: self.result(x, formats[f"{product}.out"]) for product, x in found.items()}

    def loss_scales(self, scaling, overflows):
        scaling, states = LossScaling(**scaling), []
        state = initial(scaling)
        for overflow in overflows:
            state = update(scaling, state, overflow, lambda c, a, b: a if c else b)
            states.append((state.scale, state.good, state.bad, state.at_floor))
        return states
