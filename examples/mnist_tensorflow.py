"""The classic network on MNIST, in Keras on TensorFlow: 784-128-10, ReLU, softmax cross-entropy, Adam, any policy.

    python examples/mnist_tensorflow.py                               # scikit-learn's digits: a network 64-128-10
    python examples/mnist_tensorflow.py --data mnist/ --policy fp8    # a folder with MNIST's IDX files, or mnist.npz

mnist_torch.py and mnist_jax.py begin with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else TensorFlow tells of the instructions it was built for

import keras
import tensorflow as tf

import mezzo.keras
from mezzo.data.images import initial_weights, load, order
from mezzo.errors import MezzoError

HIDDEN, CLASSES, BATCH, LEARNING_RATE = 128, 10, 32, 1e-3


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="fp32", help="fp32, bf16, fp16, fp8 or any other policy of mezzo")
    parser.add_argument("--data", help="folder with IDX files, or mnist.npz; left out: scikit-learn's digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)

    data = load(options.data)
    model = keras.Sequential(
        [
            keras.Input((data.pixels,)),
            keras.layers.Dense(HIDDEN, activation="relu"),
            keras.layers.Dense(CLASSES),  # logits: the softmax is in the loss, in float32
        ]
    )
    initial = initial_weights((data.pixels, HIDDEN, CLASSES), options.seed)
    model.set_weights([array for layer in initial for array in layer])
    precision = mezzo.keras.Precision(model, policy=options.policy, seed=options.seed)
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8),  # Keras' own epsilon is 1e-7
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    print(f"{data.source}; network {data.pixels}-{HIDDEN}-{CLASSES}; TensorFlow {tf.__version__}; {precision.policy}")

    accuracy = 0.0
    for epoch in range(options.epochs):
        shuffled = order(len(data.train_x), seed=options.seed, epoch=epoch)
        # One epoch a call, in the order that the other two frameworks take.
        history = model.fit(data.train_x[shuffled], data.train_y[shuffled], batch_size=BATCH, shuffle=False, verbose=0)
        accuracy = float(model.evaluate(data.test_x, data.test_y, verbose=0, return_dict=True)["accuracy"])
        print(f"epoch {epoch + 1}  loss {history.history['loss'][-1]:.4f}  test accuracy {accuracy:.2%}")
    print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except MezzoError as error:
        sys.exit(f"error: {error}")
