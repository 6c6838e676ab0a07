"""Steps of given images: of given weights, for what comes after the method, and of a method on the same batch again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from distseg.data.batch import Batch
from distseg.data.streams import Stream
from distseg.distributed.collectives import AllReduce
from distseg.meta.reduction import OneProcess
from distseg.meta.weights import WeightMap
from distseg.methods.losses.cross_entropy import CrossEntropy
from distseg.methods.method import Method
from distseg.methods.part import LabelModel, Loss
from distseg.methods.phases import Phase, Phases
from distseg.methods.step import MicroBatch, Step
from distseg.methods.weighting.uniform import Uniform


class GivenSteps:
    """Begins a step of the same images again and again, under cross-entropy unless another loss is given."""

    def __init__(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        weigh: Callable[[], Sequence[WeightMap]],
        loss: Loss | None = None,
    ) -> None:
        """images (B, 3, H, W) and masks (B, H, W) of each micro-batch; `weigh`, asked at each step, weighs them."""
        self._batches = [Batch(x, y, y, ()) for x, y in zip(images, masks, strict=True)]
        self._weigh, self._loss = weigh, loss or CrossEntropy()

    def begin(self, index: int, diagnose: bool) -> Step:
        pairs = zip(self._batches, self._weigh(), strict=True)
        return Step([MicroBatch(batch, weights) for batch, weights in pairs], self._loss, AllReduce())

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing is learned."""


class GivenStream:
    """Stands for a stream: one batch again and again."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, index: int, micro: int) -> Batch:
        return self._batch


def method_on(
    noisy: Batch,
    clean: Batch | None,
    clean_share: float,
    label_model: LabelModel | None,
    logits_of: Callable[[Tensor], Tensor],
) -> Method:
    """A method in its main phase: uniform weights, cross-entropy, labels by `label_model`, or as drawn if None.

    The clean images have `clean_share` of the loss; they are held out where it is 0. One process, one micro-batch.
    """
    held_out = replace(clean, true_masks=clean.masks) if clean and not clean_share else None
    given = (noisy, clean if clean_share else None, held_out)
    first, learned, unseen = (None if batch is None else cast(Stream, GivenStream(batch)) for batch in given)
    return Method(
        phases=Phases(((0, Phase(first, learned, unseen, clean_share, main=True)),)),
        weighting=Uniform(OneProcess()),
        loss=CrossEntropy(),
        label_model=label_model,
        accumulation=1,
        reduction=OneProcess(),
        logits_of=logits_of,
        labels_first=False,
    )
