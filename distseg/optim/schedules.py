"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state to be right."""

import math

from distseg.optim.config import OptimConfig

WARM_UP = 0.3
START, END = 1 / 25, 1e-4
"""one_cycle (Smith & Topin 2018) with torch's defaults: from lr/25 up to lr, then down to lr/25/10⁴ = START · END."""


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate for update `step` (0-based) of `steps`.

    constant: lr.  step: lr · gammaⁿ after n milestones; the update at `milestone · steps` is the first with the lower
    rate. cosine: from lr to 0 over the run.  one_cycle: cosine up for the first 30 %, cosine down for the rest.
    """
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        passed = sum(step >= milestone * steps for milestone in config.milestones)
        return config.lr * config.gamma**passed
    if config.schedule == "cosine":
        return config.lr * _cosine(step / steps)
    top = WARM_UP * steps - 1
    if step <= top:
        return config.lr * (START + (1 - START) * (1 - _cosine(step / top)))
    low = START * END
    return config.lr * (low + (1 - low) * _cosine((step - top) / (steps - 1 - top)))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))
