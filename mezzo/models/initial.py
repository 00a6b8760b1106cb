"""Initial weights without a framework: JAX and Keras models start from these. (torch has a generator of its own.)"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mezzo.formats.philox import bits
from mezzo.models.shapes import GPTConfig, parameter_shapes

_PIECE = 1 << 20  # normals made at one time: the words and their doubles take some 100 MB; must be even


def initial_parameters(config: GPTConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights as GPT-2 draws them, by torch's names and in torch's layouts.

    Matrices and embeddings from N(0, 0.02²); what adds to the residual stream (attn.out, mlp.down) a factor
    1/sqrt(2 · layers) smaller; norms 1, biases 0: the distribution of mezzo.models.gpt_torch.GPT.initialize, not its
    numbers. Each parameter has random words of its own, so its values depend on seed, name, shape and std alone.

    seed      int in 0 … 2**64 - 1
    returns   new arrays in the order of mezzo.models.shapes.parameter_shapes
    raises    ValueError if seed is out of range
    source    Radford et al. 2019, section 2.3
    """
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("bias"):
            parameters[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            parameters[name] = np.ones(shape, np.float32)
        else:
            residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
            flat = np.empty(math.prod(shape), np.float32)
            for start in range(0, flat.size, _PIECE):
                flat[start : start + _PIECE] = std * _normals(
                    seed, f"{name}/initial", start, len(flat[start:][:_PIECE])
                )
            parameters[name] = flat.reshape(shape)
    return parameters


def _normals(seed: int, site: str, start: int, count: int) -> NDArray[np.float64]:
    """Elements start … start + count - 1 of a site's sequence of standard normals; start is even.

    Box-Muller in float64: the words 2i and 2i + 1 give u and v = (word + 1/2) / 2^32, and these the elements 2i and
    2i + 1: sqrt(-2 ln u) times cos 2πv and sin 2πv, at most 6.8 in magnitude. The words are the same on every machine;
    log, sin and cos are those of NumPy and libm, which differ by units in the last place of a double: about one float32
    weight in 10^8 may be rounded the other way.

    source   Box and Muller 1958, A Note on the Generation of Random Normal Deviates
    """
    words = bits(seed, 0, site, count + count % 2, start=start).reshape(-1, 2)
    u, v = ((words + 0.5) * 2.0**-32).T
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:count]
