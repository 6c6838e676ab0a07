"""Sums over the processes that share a global batch: all that the maths knows of distribution."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, in place or not; every process gets the same bits."""


class Reduction(Protocol):
    """How sums over processes are made. Every process calls the same methods in the same order."""

    @property
    def sums_gradients(self) -> bool:
        """Whether gradients by parameters are still to be summed over the processes.

        Not where there is one process, nor where the parameters are sharded: derivatives by shards come back summed.
        """

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor; may be made in place."""

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin a sum in the background; what is returned waits for its result."""

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """The sum of what each process's shards contribute; `tensor` itself where parameters are whole."""


@dataclass(frozen=True)
class OneProcess:
    """The global batch is here."""

    sums_gradients: bool = False

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class ByFunction:
    """Sums by a function of a user's own, for instance an all-reduce; nothing travels in the background."""

    function: SumOverRanks
    sharded: bool = False
    """Whether a process has only its shards of the parameters."""

    @property
    def sums_gradients(self) -> bool:
        return not self.sharded

    def sum(self, tensor: Tensor) -> Tensor:
        return self.function(tensor)

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        result = self.function(tensor)
        return lambda: result

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        return self.function(tensor) if self.sharded else tensor
