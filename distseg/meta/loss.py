"""The weighted loss for one's own training loop, and a look at the masks that one's own data set has."""

import torch
from torch import Tensor

from distseg import ops
from distseg.errors import InvalidArgument
from distseg.ops import IGNORE


class BinaryMasks:
    """Refuses masks of 0 and 255, in which 255 was meant to be the lesion: all of it would be ignored.

    Looks until it has seen a label that is neither, which waits for the device: in general once.
    """

    def __init__(self) -> None:
        self._known_good = False

    def look(self, *masks: Tensor) -> bool:
        """Whether all of these masks together hold 255 and, beside it, nothing but 0; never again once they held 1."""
        if self._known_good:
            return False
        ignored, other = (
            torch.stack([part.any() for part in parts]).any()
            for parts in ([m == IGNORE for m in masks], [(m != 0) & (m != IGNORE) for m in masks])
        )
        holds_ignored, self._known_good = torch.stack([ignored, other]).tolist()
        return holds_ignored and not self._known_good

    @staticmethod
    def refuse() -> None:
        raise InvalidArgument("masks hold 0 and 255 alone, and 255 means ignore: give the lesion the value 1")


_masks_of_weighted_loss = BinaryMasks()


def weighted_loss(
    logits: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    level: Tensor | None = None,
) -> Tensor:
    """Σ W·ℓ over every pixel, a scalar; differentiable twice in the logits and the weights, in either mode.

    logits (B, C, H, W), C = 1 binary; masks (B, H, W) integer class ids, 255 = ignore; weights (B, H, W), for instance
    of a PixelReweighter; scale and level as in `distseg.ops.weighted_loss`. Raises ValueError for shapes and dtypes
    that do not fit, on the CPU for labels that are no class id (on a GPU the loss is then NaN), and, with C = 1, for
    first masks that hold 0 and 255 alone.
    """
    if logits.ndim == 4 and logits.shape[1] == 1 and _masks_of_weighted_loss.look(masks):
        BinaryMasks.refuse()
    return ops.weighted_loss(logits, masks, weights, scale, level)
