"""What the parts of a method are built from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from distseg.data.batch import Labels
from distseg.data.sample import Sample
from distseg.data.streams import Stream
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Placement
from distseg.meta.reduction import Reduction
from distseg.methods.part import FOLDS


class OpenStream(Protocol):
    def __call__(self, name: str, samples: Sequence[Sample], labels: Labels, batch_size: int) -> Stream: ...


@dataclass(frozen=True)
class Context:
    """The run that a method belongs to: its samples, its budget, and the network that the meta pass may look at."""

    noisy: Sequence[Sample]
    clean: Sequence[Sample]
    steps: int
    batch_size: int
    """Images of a micro-batch on this rank; `clean_batch_size` is the number of clean ones beside noisy ones."""
    clean_batch_size: int
    accumulation: int
    """Micro-batches a step."""
    seed: int
    open_stream: OpenStream
    model: nn.Module
    """The network without the engine's hooks, in training mode."""
    placement: Placement
    reduction: Reduction
    device: torch.device
    one_pass: bool = False
    """Whether steps are made by a network whose forward pass may carry tangents: whole parameters, no autocast."""
    adds_gradients: bool = False
    """Whether a gradient that is known already can be added to the update: distseg.distributed.engine.add_gradient."""
    annotators: int | None = None
    """How many there are where batches have all annotations, else None."""
    classes: int = 2
    """Of the masks; the network has as many channels, or one for two classes."""
    _streams: dict[tuple[str, int], Stream] = field(default_factory=dict, compare=False)

    @property
    def trusted(self) -> frozenset[str]:
        """Ids of the noisy stream's images whose masks are references, which no label model changes."""
        return frozenset(sample.id for sample in self.noisy if sample.picked)

    @property
    def folds(self) -> dict[str, int]:
        """Which fold each clean image is in, by id."""
        return {sample.id: number % FOLDS for number, sample in enumerate(self.clean)}

    @property
    def paired(self) -> frozenset[str]:
        """Ids of the clean images that annotators have drawn too."""
        return frozenset(sample.id for sample in self.clean if sample.annotations)

    def noisy_stream(self, size: int | None = None) -> Stream:
        return self._stream("noisy", self.noisy, "noisy", size or self.batch_size)

    def clean_stream(self, size: int) -> Stream:
        return self._stream("clean", self.clean, "true", size)

    def held_out_stream(self, size: int) -> Stream:
        """The clean images with a drawn mask beside the reference, where there is one; with all of them, if wanted."""
        return self._stream("held_out", self.clean, "true" if self.annotators else "noisy", size)

    def true_stream(self) -> Stream:
        """Every training image with its true mask."""
        return self._stream("oracle", [*self.noisy, *self.clean], "true", self.batch_size)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of images (B, 3, H, W): the network as it is, with no side effects."""
        return StatelessNetwork(self.model, self.placement)(self.placement.trainable(), images)

    def _stream(self, name: str, samples: Sequence[Sample], labels: Labels, size: int) -> Stream:
        if (name, size) not in self._streams:
            self._streams[name, size] = self.open_stream(name, samples, labels, size)
        return self._streams[name, size]
