"""Averages over the last steps, of which label models learn."""

from torch import Tensor

DECAY = 0.9
"""Of the exponential moving averages, a step."""
MEMORY = 1 / (1 - DECAY)
"""How many steps they remember: an average times this is about the sum over them."""


def averaged(average: Tensor, new: Tensor) -> Tensor:
    return DECAY * average + (1 - DECAY) * new
