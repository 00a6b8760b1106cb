"""The classic network on MNIST, in PyTorch: 784-128-10, ReLU, softmax cross-entropy, Adam, under any policy of mezzo.

    python examples/mnist_torch.py                               # scikit-learn's digits: the network is then 64-128-10
    python examples/mnist_torch.py --data mnist/ --policy fp8    # a folder with MNIST's IDX files, or mnist.npz

mnist_jax.py and mnist_tensorflow.py begin with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import mezzo.torch
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
    print(f"{data.source}; network {data.pixels}-{HIDDEN}-{CLASSES}; PyTorch {torch.__version__}; {options.policy}")
    train_x, train_y, test_x, test_y = map(torch.from_numpy, (data.train_x, data.train_y, data.test_x, data.test_y))

    model = nn.Sequential(nn.Linear(data.pixels, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    with torch.no_grad():
        initial = initial_weights((data.pixels, HIDDEN, CLASSES), options.seed)
        for layer, (W, b) in zip((model[0], model[2]), initial, strict=True):
            layer.weight.copy_(torch.from_numpy(W.T))  # nn.Linear stores (out, in)
            layer.bias.copy_(torch.from_numpy(b))
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    precision = mezzo.torch.Precision(model, optimizer, policy=options.policy, seed=options.seed)

    accuracy = 0.0
    for epoch in range(options.epochs):
        shuffled = order(len(train_x), seed=options.seed, epoch=epoch)
        total = 0.0
        for batch in np.split(shuffled, range(BATCH, len(shuffled), BATCH)):
            loss = F.cross_entropy(model(train_x[batch]).float(), train_y[batch])
            precision.backward(loss)
            precision.step()
            total += loss.item() * len(batch)
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).double().mean().item()
        print(f"epoch {epoch + 1}  loss {total / len(train_x):.4f}  test accuracy {accuracy:.2%}")
    print(f"test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    try:
        main()
    except MezzoError as error:
        sys.exit(f"error: {error}")
