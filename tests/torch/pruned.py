"""A net with a little of what can be pruned and what is left alone, and what its tests do with it."""

import torch
import torch.nn.functional as F
from torch import nn

from mezzo.torch import Precision, Pruner

OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "plain AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
}
PRUNED = ["up.weight", "down.weight"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm([3, 8])  # its weight has two axes
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids):
        return self.head(self.down(F.gelu(self.up(self.norm(self.tokens(ids))))))


def make(policy="fp32", optimizer="fused AdamW", precision=None, **how):
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, **how)
    return model, optimizer, pruner, Precision(model, optimizer, policy, pruner=pruner, **(precision or {}))


def train(model, precision, steps=1, start=0, spoil=lambda step: None):
    last = None
    for i in range(start, start + steps):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randint(0, 11, (4, 3), generator=g), torch.randint(0, 11, (4, 3), generator=g)
        precision.backward(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
        spoil(i)
        last = precision.step()
    return last


def zeros(model, names=PRUNED):
    return {name: model.get_parameter(name).detach() == 0 for name in names}


def share(model, names=PRUNED):
    found = zeros(model, names).values()
    return sum(int(z.sum()) for z in found) / sum(z.numel() for z in found)
