"""Score a network over a split that is spread over ranks; the result does not depend on their number."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from distseg.data.batch import Batch
from distseg.evaluation.metrics import confusion


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    rows: Iterable[range],
    count: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Count tp, fp, fn and tn of every image of a split against its true mask: (count, 4) int64, on every rank.

    `predict` maps images (B, 3, H, W) to logits (B, C, H, W): foreground is logit > 0 for C = 1 (probability above
    0.5), argmax > 0 for C ≥ 2. Whether the network is in evaluation mode is the caller's business. `batches` are this
    rank's, and `rows` say which images of the split they hold (`ShardSpec.evaluation_batches`). `sum_over_ranks` takes
    an int64 tensor on the device of the batches (on the CPU on a rank that has none) and returns the sum over ranks;
    counts are integers and each row is filled by one rank, so N ranks give what one rank gives, exactly.

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
            foreground = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1) > 0
            broken = ~torch.isfinite(logits).flatten(1).all(dim=1)
            state = torch.stack([broken, torch.ones_like(broken)], dim=1)
            filled.append((positions, torch.cat([confusion(foreground, batch.true_masks), state], dim=1)))

    # What went wrong travels with the counts: an error raised here by one rank would leave the others in the sum.
    table = torch.zeros(count, 6, dtype=torch.int64, device=filled[0][1].device if filled else "cpu")
    for positions, values in filled:
        table[positions.start : positions.stop] += values
    total = sum_over_ranks(table).cpu().numpy()

    counts, not_finite, seen = total[:, :4], total[:, 4], total[:, 5]
    if (seen != 1).any():
        raise ValueError(f"{(seen != 1).sum()} of {count} images were evaluated never or more than once")
    if not_finite.any():
        raise FloatingPointError(
            f"the network's output is not finite on {not_finite.sum()} of {count} images, the first is number "
            f"{not_finite.argmax()}: the training has diverged; a lower optim.lr is the usual mend"
        )
    return counts
