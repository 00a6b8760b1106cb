"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, kind: str, min_lr: float, decay: float) -> float:
    """The rate of one step.

    step     counted from 0
    steps    of the whole run
    peak     the highest rate, reached after `warmup` steps of linear increase
    kind     "cosine": half a cosine from peak to min_lr·peak (Loshchilov & Hutter 2016, arXiv 1608.03983)
             "wsd": peak until the last `decay` share of the steps, then linear to min_lr·peak (arXiv 2404.06395)
             "constant": peak
    min_lr   share of the peak that remains at the end
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "constant":
        return peak
    if kind == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return peak * (min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    last = max(1, round(steps * decay))
    done = max(0.0, (step - (steps - last) + 1) / last)
    return peak * (1 - (1 - min_lr) * min(1.0, done))
