"""What turns gradients into parameters."""

from distseg.optim.optimizers import build_optimizer
from distseg.optim.schedules import learning_rate

__all__ = ["build_optimizer", "learning_rate"]
