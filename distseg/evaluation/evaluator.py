"""Score a network over a split that is spread over ranks; the result does not depend on their number."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distseg.data.batch import Batch
from distseg.evaluation.metrics import count_predictions


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    rows: Iterable[range],
    count: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    class_count: int = 2,
) -> np.ndarray:
    """Count tp, fp, fn and tn of every image of a split against its true mask, int64, the same on every rank.

    (count, 4) of two classes, (count, class_count − 1, 4) of more: see `count_predictions`. `predict` maps images
    (B, 3, H, W) to logits (B, C, H, W). Whether the network is in evaluation mode is the caller's business. `batches`
    are this rank's, and `rows` say which images of the split they hold (`ShardSpec.evaluation_batches`).
    `sum_over_ranks` takes an int64 tensor on the device of the batches (on the CPU on a rank that has none) and returns
    the sum over ranks; counts are integers and each row is filled by one rank, so N ranks give what one rank gives,
    exactly.

    Raises ValueError for a batch without true masks. Raises, on every rank: FloatingPointError if any logit is not
    finite; ValueError if the rows do not cover range(count) exactly once.
    """
    filled = []
    # Batches are fetched outside inference mode: what a loader caches on the way must stay usable in training.
    for batch, positions in zip(batches, rows, strict=True):
        if batch.true_masks is None:
            raise ValueError("a batch without true masks cannot be scored")
        if len(batch.images) != len(positions):
            raise ValueError(f"a batch of {len(batch.images)} images was announced as rows {positions}")
        with torch.inference_mode():
            logits = predict(batch.images)
            broken = ~torch.isfinite(logits).flatten(1).all(dim=1)
            state = torch.stack([broken, torch.ones_like(broken)], dim=1)
            counted = count_predictions(logits, batch.true_masks, class_count).flatten(1)
            filled.append((positions, torch.cat([counted, state], dim=1)))

    # What went wrong travels with the counts: an error raised here by one rank would leave the others in the sum.
    table = torch.zeros(
        count, 4 * (class_count - 1) + 2, dtype=torch.int64, device=filled[0][1].device if filled else "cpu"
    )
    for positions, values in filled:
        table[positions.start : positions.stop] += values
    total = sum_over_ranks(table).cpu().numpy()

    counts, not_finite, seen = total[:, :-2], total[:, -2], total[:, -1]
    if (seen != 1).any():
        raise ValueError(f"{(seen != 1).sum()} of {count} images were evaluated never or more than once")
    if not_finite.any():
        raise FloatingPointError(
            f"the network's output is not finite on {not_finite.sum()} of {count} images, the first is number "
            f"{not_finite.argmax()}: the training has diverged; a lower optim.lr is the usual mend"
        )
    return counts if class_count == 2 else counts.reshape(count, class_count - 1, 4)
