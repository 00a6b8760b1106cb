"""One table on the same GPT under PyTorch and under TensorFlow: the same sites, operands and gradients."""

import numpy as np
import pytest
import tensorflow as tf
import torch

import mezzo.keras
import mezzo.torch
from mezzo.models import gpt_keras, gpt_torch
from mezzo.models.shapes import GPTConfig

# Keras' own conversion of its variables to NumPy, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
RNG = np.random.RandomState(0)
LOW = "*:grad_output=e5m2@tensor stochastic; *:weight=e4m3@tensor stochastic; *:input=e4m3@tensor stochastic"


def sites(rows):
    """Of products and attention, with format and number of elements: Keras multiplies a batch's rows as one matrix."""
    return {
        row.site: (row.format, int(np.prod(row.shape)))
        for row in rows
        if not row.site.endswith(("compute", "master")) and ":op" not in row.site
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt_has_the_sites_and_the_gradients_that_it_has_under_torch(tied):
    # Results stay float32: under TensorFlow what lies between products is float32, under torch it has their 16 bits.
    policy = f"fp32; {LOW}; *:fprop.query=bfloat16; *:fprop.key=mxfp4; *:fprop.value=bfloat16; *:dgrad.dout=bfloat16"
    config = GPTConfig(vocab_size=50, layers=1, d_model=32, heads=4, kv_heads=2, seq_len=16, tied=tied)
    ids, targets = (RNG.randint(0, 50, (2, 16)) for _ in range(2))
    ours, theirs = gpt_keras.GPT(config), gpt_torch.GPT(config)
    with torch.no_grad():
        for name, value in gpt_keras.read_parameters(ours).items():
            theirs.get_parameter(name).copy_(torch.tensor(value))

    precision = mezzo.torch.Precision(theirs, torch.optim.SGD(theirs.parameters(), 0.1), policy, seed=5)
    reference = theirs(torch.tensor(ids), torch.tensor(targets))
    precision.backward(reference)

    other = mezzo.keras.Precision(ours, policy, seed=5)
    with tf.GradientTape() as tape:
        loss = ours.mean_loss(tf.constant(ids), tf.constant(targets))
    gradients = tape.gradient(loss, [v.value for v in ours.trainable_variables])
    assert float(loss) == pytest.approx(reference.item(), rel=1e-5)
    assert sites(other.sites(ids)) == sites(precision.sites())

    for variable, gradient in zip(ours.trainable_variables, gradients, strict=True):
        variable.assign(tf.convert_to_tensor(gradient))  # read_parameters then gives them torch's names and layouts
    for name, found in gpt_keras.read_parameters(ours).items():
        wanted = theirs.get_parameter(name).grad.numpy()
        # Sums of float32 in two orders; a wrong operand or random word shows at 1e-2.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)
