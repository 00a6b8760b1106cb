"""Rounding, random words and the Hadamard transform over a namespace of arrays, written once for JAX and TensorFlow.

    arrays.py     the namespace: what a framework has to offer
    elements.py   element formats, and the arithmetic on the bits of numbers that everything here is made of
    groups.py     scaled formats
    philox.py     random words
    hadamard.py   the random Hadamard transform
    quantize.py   `quantize` of the above

The bits are those of `mezzo.formats.quantize`. Compilers do not keep float arithmetic as it is written: XLA and
TensorFlow take subnormal numbers for zero, divide by a constant with its reciprocal and join a product and a sum into
one rounding. So numbers are taken apart into integers, which no mode changes, and floats meet only where neither can
matter: a product or a quotient of two significands, whose result is an ordinary number and the divisor no constant.
"""
