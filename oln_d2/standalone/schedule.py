"""What changes over a run: the learning rate, and the moving average of the weights."""

import math
from collections.abc import Callable
from typing import Any

import torch

WARMUP_FACTOR = 0.001
# The rate is divided by 10 after these parts of the run: after 6 and 7 of the paper's 8 epochs.
STEPS = (6 / 8, 7 / 8)


def lr_factor(iteration: int, iterations: int, warmup: int, schedule: str = "step") -> float:
    """
    Args:
        iteration: 0 or more, below `iterations`.
        warmup: iterations in which the rate rises linearly from `WARMUP_FACTOR` on.
        schedule: "step", see `STEPS`; or "cosine", from 1 to 0 along half a wave.

    Returns:
        what the rate is multiplied by, in [0, 1].
    """
    if schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * iteration / iterations))
    else:
        factor = 0.1 ** sum(iteration >= step * iterations for step in STEPS)
    if iteration < warmup:
        factor *= WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / warmup
    return factor


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """
    Args:
        decay: of the average, in [0, 1). The average is over fewer steps as long as there were
            few: with a fixed decay, the weights at the start would weigh almost half of it after
            700 steps of 0.999.

    Returns:
        `multi_avg_fn` of `torch.optim.swa_utils.AveragedModel`.
    """

    @torch.no_grad()
    def update(means: Any, values: Any, number: Any) -> None:
        number = float(number)  # once, since it may make a GPU wait
        if means[0].is_floating_point():
            weight = 1 - min(decay, (1 + number) / (10 + number))
            torch._foreach_lerp_(means, values, weight)
        else:
            torch._foreach_copy_(means, values)

    return update
