"""Where the parameters of a network are: whole on every rank, or in shards over the ranks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class Placement(Protocol):
    """How the method gets at the parameters of a module."""

    sharded: bool
    """Whether a rank has but a part of the elements. The derivatives of a network by them then sum over the ranks."""

    def trainable(self) -> dict[str, Tensor]:
        """What this rank holds of the parameters that are trained, by name; constants that nobody may write to."""

    def operands(self, trainable: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors to run the module with when `trainable` take the place of its trained parameters."""

    def saving_shards(self) -> AbstractContextManager[None]:
        """Within, autograd keeps no more of a parameter than this rank holds."""


@dataclass(frozen=True)
class Whole:
    """Every rank holds every parameter."""

    model: nn.Module
    sharded = False

    def trainable(self) -> dict[str, Tensor]:
        # Contiguous, because group normalisation has no forward mode for channels-last features (torch 2.13).
        return {n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}

    def operands(self, trainable: dict[str, Tensor]) -> dict[str, Tensor]:
        return trainable

    def saving_shards(self) -> AbstractContextManager[None]:
        return nullcontext()
