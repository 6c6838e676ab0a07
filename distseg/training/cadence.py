"""When a run logs, draws, validates and saves."""

import math
from dataclasses import dataclass

from distseg.training.config import TrainConfig


@dataclass(frozen=True)
class Cadence:
    """Each question is asked with the number of updates that are done."""

    config: TrainConfig
    steps: int

    @property
    def _validation(self) -> int:
        return self.config.validate_every or max(1, math.ceil(self.steps / 10))

    def logs(self, done: int) -> bool:
        return done % self.config.log_every == 0 or done == self.steps

    def draws(self, done: int) -> bool:
        return done % (self.config.figure_every or self._validation) == 0

    def validates(self, done: int) -> bool:
        return done % self._validation == 0 or done == self.steps

    def saves(self, done: int) -> bool:
        return done % (self.config.checkpoint_every or self._validation) == 0 or done == self.steps
