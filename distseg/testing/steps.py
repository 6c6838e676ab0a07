"""Steps of given micro-batches, for tests and benchmarks of what comes after the method."""

from collections.abc import Callable, Sequence

from torch import Tensor

from distseg.data.batch import Batch
from distseg.distributed.collectives import AllReduce
from distseg.meta.weights import WeightMap
from distseg.methods.losses.cross_entropy import CrossEntropy
from distseg.methods.part import Loss
from distseg.methods.step import MicroBatch, Step


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
