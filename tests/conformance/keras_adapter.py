"""mezzo.keras on tf.Tensor: eager, in a tf.function and compiled by XLA."""

from functools import partial

import keras
import ml_dtypes
import tensorflow as tf
from adapter import Adapter

from mezzo.keras import Precision
from mezzo.keras.quantize import bits, hadamard, quantize
from mezzo.policy import LossScaling
from mezzo.policy.scale import ScaleState, initial, update

NO_CODES = "mezzo.keras keeps values, not codes"


def array(y):
    """In ml_dtypes' own bfloat16, whichever TensorFlow was built with."""
    y = y.numpy()
    return y.view(ml_dtypes.bfloat16) if y.dtype.name == "bfloat16" else y


class KerasAdapter(Adapter):
    name = "keras"
    lacks = {  # noqa: RUF012
        "codes": NO_CODES,
        "block codes": NO_CODES,
    }

    def quantize(self, x, fmt, **options):
        return array(quantize(tf.constant(x), fmt, **options))

    def bits(self, seed, step, site, count):
        return array(bits(seed, step, site, count))

    def hadamard(self, x, **options):
        return array(hadamard(tf.constant(x), **options))

    def product(self, a, b, g, formats, route):
        layer = keras.layers.Lambda(lambda x: tf.matmul(*x, transpose_b=True))
        rules = "; ".join(f"*:{role}={fmt}" for role, fmt in formats.items())
        precision = Precision(layer, policy=f"fp32; {rules}")
        a, b = tf.constant(a), tf.constant(b)
        with tf.GradientTape() as tape:
            tape.watch([a, b])
            y = layer([a, b])
        da, db = tape.gradient(y, [a, b], output_gradients=tf.constant(g))
        precision.remove()
        return {"fprop": array(y), "dgrad": array(da), "wgrad": array(db)}

    def loss_scales(self, scaling, overflows):
        scaling, states = LossScaling(**scaling), []

        @tf.function
        def step(fields, overflow):
            return vars(update(scaling, ScaleState(**fields), overflow, tf.where))

        fields = {
            name: tf.constant(value, tf.float32 if name == "scale" else tf.int32)
            for name, value in vars(initial(scaling)).items()
        }
        for overflow in overflows:
            fields = step(fields, tf.constant(overflow))
            states.append(tuple(fields[name].numpy().item() for name in ("scale", "good", "bad", "at_floor")))
        return states


class FunctionAdapter(KerasAdapter):
    """In a tf.function, where sizes are unknown as it is traced; each case is a graph of its own, so few are asked for.

    unknown    how many of the first sizes
    """

    def __init__(self, *, jit_compile=None, unknown=0):
        self.jit_compile, self.unknown = jit_compile, unknown
        self.name = f"tf.function, jit_compile={jit_compile}, {unknown} sizes unknown"

    def call(self, function, x):
        shape = [None if i < self.unknown else n for i, n in enumerate(x.shape)]
        signature = [tf.TensorSpec(shape, x.dtype)]
        return array(tf.function(function, input_signature=signature, jit_compile=self.jit_compile)(tf.constant(x)))

    def quantize(self, x, fmt, **options):
        return self.call(partial(quantize, fmt=fmt, **options), x)

    def hadamard(self, x, **options):
        return self.call(partial(hadamard, **options), x)
