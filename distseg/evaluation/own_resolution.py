"""Counts at the files' own resolution, beside those at the network's (evaluator.py)."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distseg.data.decode import Decoding, read_mask
from distseg.data.geometry import Frame, Placement
from distseg.data.reader import read_ahead
from distseg.data.sample import Sample
from distseg.evaluation.metrics import count_predictions

_STRIP = 2**22
"""Numbers in what `own_strips` gives at once, about."""
_WHOLE = 2**24
"""The same of a picture that comes in one band."""


def at_own_resolution(logits: Tensor, place: Placement, height: int, width: int) -> Tensor:
    """(C, rows, columns) of a canvas to (C, height, width) of the file, bilinearly about the same centre."""
    return torch.cat([*own_strips(iter([logits]), place, height, width)], dim=1)


def own_strips(bands: Iterator[Tensor], place: Placement, height: int, width: int) -> Iterator[Tensor]:
    """`at_own_resolution` in strips (C, rows, width) from top to bottom, of a canvas that comes in such `bands`.

    Memory is taken for a band and a strip.
    """
    rows, columns = place.picture
    before, after, share = _taps(place.height, height)
    kept: Tensor | None = None  # rows of the picture from `first` on
    first = reached = done = canvas_row = 0
    for band in bands:
        part = band[:, max(rows.start - canvas_row, 0) : max(rows.stop - canvas_row, 0), columns]
        canvas_row += band.shape[1]
        if part.shape[1] == place.height and len(band) * height * width <= _WHOLE:
            yield _enlarged(part, height, width)  # one pass where the steps below take four
            return
        kept = part if kept is None else torch.cat([kept, part], dim=1)
        reached += part.shape[1]
        ready = int(torch.searchsorted(after, reached))
        at_once = max(1, _STRIP // (len(band) * width))
        for start in range(done, ready, at_once):
            stop = min(start + at_once, ready)
            low, high = int(before[start]), int(after[stop - 1]) + 1
            slab = kept[:, low - first : high - first]
            if (place.height, place.width) == (height, width):
                yield slab
                continue
            if place.width != width:
                slab = _enlarged(slab, high - low, width)
            above, below = (slab[:, (taps[start:stop] - low).to(slab.device)] for taps in (before, after))
            yield torch.lerp(above.float(), below.float(), share[start:stop, None].to(slab.device))
        done = ready
        needed = min(int(before[done]), reached) if done < height else reached
        kept, first = kept[:, needed - first :], needed


def _enlarged(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape[1:] == (height, width):
        return picture
    return interpolate(picture[None].float(), (height, width), mode="bilinear", align_corners=False)[0]


def _taps(source: int, output: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `output` pixels along a side the two of `source` between which it lies, and the share of the second.

    Pixels are about the same centre, and those beyond the ends are as the ends, as torch's interpolate has it.
    """
    position = ((torch.arange(output, dtype=torch.float64) + 0.5) * (source / output) - 0.5).clamp(min=0)
    before = position.floor().long().clamp(max=source - 1)
    return before, (before + 1).clamp(max=source - 1) if source != output else before, (position - before).float()


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
        class_count: int = 2,
    ) -> None:
        """`rows` say which of `samples` a batch holds. Masks are read ahead, and not the next ones of a whole batch."""
        self._predict = predict
        self._rows = list(rows)
        self._frame = frame
        self._taken = 0
        self._class_count = class_count
        of_classes = () if class_count == 2 else (class_count - 1,)
        self._counts = torch.zeros(len(samples), *of_classes, 4, dtype=torch.int64)
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
            self._counts[position] = count_predictions(own[None], truth[None], self._class_count)[0].cpu()
        self._taken += 1
        return logits

    @property
    def counts(self) -> Tensor:
        """`count_predictions` of all samples, int64 on the CPU; 0 for what was not predicted."""
        return self._counts

    def close(self) -> None:
        """Stop reading ahead."""
        self._masks.close()
