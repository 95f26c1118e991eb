"""Learning rate over a run."""

import math

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
