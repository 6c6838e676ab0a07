"""Counts at the files' own resolution, beside those at the network's (evaluator.py)."""

from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distseg.data.decode import Decoding, read_mask
from distseg.data.geometry import Frame, Placement
from distseg.data.reader import read_ahead
from distseg.data.sample import Sample
from distseg.evaluation.metrics import confusion


def at_own_resolution(logits: Tensor, place: Placement, height: int, width: int) -> Tensor:
    """(C, rows, columns) of a canvas to (C, height, width) of the file, bilinearly about the same centre."""
    rows, columns = place.picture
    picture = logits[None, :, rows, columns]
    if picture.shape[2:] == (height, width):
        return picture[0]
    return interpolate(picture.float(), (height, width), mode="bilinear", align_corners=False)[0]


class OwnResolution:
    """A predictor that also counts what it predicts at the files' own resolution, against their masks as they are.

    To be called on batches of the images of `rows` in turn, as `evaluate` does. One image at a time is enlarged, so
    that memory does not grow with the batch.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        samples: Sequence[Sample],
        rows: Iterable[range],
        frame: Frame,
        decoding: Decoding,
        threads: int,
    ) -> None:
        """`rows` say which of `samples` a batch holds. Masks are read ahead, and not the next ones of a whole batch."""
        self._predict = predict
        self._rows = list(rows)
        self._frame = frame
        self._taken = 0
        self._counts = torch.zeros(len(samples), 4, dtype=torch.int64)
        own = [samples[position] for positions in self._rows for position in positions]
        self._masks: Generator = read_ahead(
            iter([sample] for sample in own), lambda s: read_mask(s.truth, decoding), 1, threads
        )

    def __call__(self, images: Tensor) -> Tensor:
        """The logits that `predict` gives for a batch. Raises BadFileError where a mask cannot be decoded."""
        logits = self._predict(images)
        for position, each in zip(self._rows[self._taken], logits, strict=True):
            [mask] = next(self._masks)[1]
            truth = torch.from_numpy(mask).to(each.device)
            height, width = truth.shape
            own = at_own_resolution(each, self._frame.place(height, width), height, width)
            foreground = own[0] > 0 if len(own) == 1 else own.argmax(dim=0) > 0
            self._counts[position] = confusion(foreground[None], truth[None])[0].cpu()
        self._taken += 1
        return logits

    @property
    def counts(self) -> Tensor:
        """(n, 4) int64 on the CPU: true and false positives, false and true negatives; 0 for what was not predicted."""
        return self._counts

    def close(self) -> None:
        """Stop reading ahead."""
        self._masks.close()
