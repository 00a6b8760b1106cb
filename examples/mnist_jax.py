"""The classic network on MNIST, in JAX: 784-128-10, ReLU, softmax cross-entropy, Adam, under any policy of mezzo.

    python examples/mnist_jax.py                               # scikit-learn's digits: the network is then 64-128-10
    python examples/mnist_jax.py --data mnist/ --policy fp8    # a folder with MNIST's IDX files, or mnist.npz

mnist_torch.py and mnist_tensorflow.py begin with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezzo.jax
from mezzo.data.images import initial_weights, load, order
from mezzo.errors import MezzoError

HIDDEN, CLASSES, BATCH, LEARNING_RATE = 128, 10, 32, 1e-3


def network(params, x):
    (W1, b1), (W2, b2) = params
    return jax.nn.relu(x @ W1 + b1) @ W2 + b2


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="fp32", help="fp32, bf16, fp16, fp8 or any other policy of mezzo")
    parser.add_argument("--data", help="folder with IDX files, or mnist.npz; left out: scikit-learn's digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)

    data = load(options.data)
    print(f"{data.source}; network {data.pixels}-{HIDDEN}-{CLASSES}; JAX {jax.__version__}; {options.policy}")

    params = [(jnp.array(W), jnp.array(b)) for W, b in initial_weights((data.pixels, HIDDEN, CLASSES), options.seed)]
    precision = mezzo.jax.Precision(options.policy, seed=options.seed)
    loss_fn = precision(cross_entropy)
    logits_fn = jax.jit(precision(network))
    optimizer = precision.optimizer(optax.adam(LEARNING_RATE))
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y, state=opt_state)  # the state: for fp16 and nvfp4
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    accuracy = 0.0
    for epoch in range(options.epochs):
        shuffled = order(len(data.train_x), seed=options.seed, epoch=epoch)
        total = 0.0
        for batch in np.split(shuffled, range(BATCH, len(shuffled), BATCH)):
            params, opt_state, loss = train_step(params, opt_state, data.train_x[batch], data.train_y[batch])
            total += float(loss) * len(batch)
        precision.check(opt_state)  # stops where every step is skipped
        accuracy = float(np.mean(logits_fn(params, data.test_x, state=opt_state).argmax(1) == data.test_y))
        print(f"epoch {epoch + 1}  loss {total / len(shuffled):.4f}  test accuracy {accuracy:.2%}")
    print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except MezzoError as error:
        sys.exit(f"error: {error}")
