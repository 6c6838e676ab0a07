"""What an audit says of each mask, and the mask that it proposes for each image."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from distseg.data.agreement import dice
from distseg.data.classes import IGNORE
from distseg.data.decode import Decoding, read_mask
from distseg.data.inspect import inspect_mask
from distseg.data.resize import resize_mask
from distseg.data.sample import Problem
from distseg.errors import BadFileError
from distseg.files import write_atomically
from distseg.inference.audit.drawn import Drawn
from distseg.inference.audit.model import Judge, LabelModel, logits_of, masks_at
from distseg.labels.quality import drawn_probability, expected_dice, softmin_score

_MOST_PIXELS = 2**22
"""Proposals of larger images are made at this size and enlarged, so that memory is bounded."""


@dataclass(frozen=True)
class Verdict:
    """Of one mask."""

    drawn: Drawn
    annotator: str
    judge: str
    expected_dice: float
    """With the truth."""
    wrong: float
    """Expected share of wrong pixels."""
    softmin: float
    """Of the network's own probabilities (labels/quality.py)."""
    prediction_dice: float
    """Dice of the mask and what the network predicts."""
    size: tuple[int, int]
    """(height, width) of the file."""
    area: int
    """Pixels of the file that are marked, and how many the proposal marks."""
    proposed_area: int
    shift: float
    """Mean signed distance from the proposed to the drawn contour, pixels of the file; above 0 where it is drawn too
    large. NaN where one of the two marks nothing."""
    agreement: float
    """Mean Dice with the masks that others have drawn of the image; NaN without any."""
    true_dice: float
    """With the reference, where it is known and the mask is not it; NaN elsewhere."""

    @property
    def file(self) -> Path:
        return self.drawn.masks[self.annotator]

    @property
    def relative_shift(self) -> float:
        """In sizes of the object, the root of its proposed area."""
        return self.shift / math.sqrt(self.proposed_area) if self.proposed_area else math.nan

    @property
    def missed(self) -> bool:
        """Nothing is drawn where something is proposed."""
        return self.area == 0 and self.proposed_area > 0

    @property
    def invented(self) -> bool:
        return self.area > 0 and self.proposed_area == 0


def judge_masks(
    judges: Sequence[Judge], model: LabelModel, proposals: Path, decoding: Decoding, threads: int
) -> Iterator[list[Verdict] | Problem]:
    """Of each judge's images in turn a verdict a mask; writes PROPOSALS/ID.png at the image's own size.

    A file that cannot be read is a problem. Raises StorageError.
    """
    with ThreadPoolExecutor(threads) as pool:
        for judge in judges:
            work = partial(_verdicts, judge, model, proposals, decoding)
            for first in range(0, len(judge.drawn), 4 * threads):
                yield from pool.map(work, judge.drawn[first : first + 4 * threads])


def wrong_map(judge: Judge, model: LabelModel, drawn: Drawn, annotator: str, decoding: Decoding) -> NDArray[np.float32]:
    """(rows, columns) at the network's resolution: P(label wrong) of each pixel of a mask."""
    relative = logits_of(judge.images, drawn.sample.id)
    masks = masks_at(drawn, (relative.shape[1], relative.shape[2]), decoding)
    posterior = model.posterior(judge.name, relative, masks).softmax(0)
    right = drawn_probability(posterior, torch.from_numpy(masks[annotator]))
    return (1 - right).numpy()


def contour_shift(drawn: NDArray[np.bool_], proposed: NDArray[np.bool_]) -> float:
    """Mean signed distance of the contour of `drawn` (H, W) to that of `proposed`, pixels; above 0 outside of it.

    NaN where one of the two is empty or fills the frame, and has no contour. The frame's border is none.
    """
    if drawn.all() or not drawn.any() or proposed.all() or not proposed.any():
        return math.nan
    signed = np.where(proposed, 0.5 - _distance(proposed), _distance(~proposed) - 0.5)
    # Pixels on both sides of the drawn contour: half a pixel before it and half a pixel behind.
    padded = np.pad(drawn, 1, mode="edge").view(np.uint8)
    inner = drawn & (cv2.erode(padded, _CROSS)[1:-1, 1:-1] == 0)
    outer = ~drawn & (cv2.dilate(padded, _CROSS)[1:-1, 1:-1] > 0)
    return float((signed[inner].mean() + signed[outer].mean()) / 2)


def _distance(side: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(H, W): of pixels in `side` to the nearest on the other; by squares, for OpenCV rounds roots in several ways."""
    found = cv2.distanceTransform(side.view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(found.astype(np.float64) ** 2))


_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def _verdicts(
    judge: Judge, model: LabelModel, proposals: Path, decoding: Decoding, drawn: Drawn
) -> list[Verdict] | Problem:
    try:
        relative = logits_of(judge.images, drawn.sample.id)
        predicted = read_mask(judge.predictions / f"{drawn.sample.id}.png", decoding)
        # Inspected, for reading takes for lesion whatever is not black.
        own = {name: inspect_mask(path, decoding)[1] for name, path in drawn.masks.items()}
        truth = None if drawn.truth is None else read_mask(drawn.truth, decoding)
    except BadFileError as error:
        file, _, reason = str(error).partition(": ")
        return Problem(drawn.sample.id, file, reason)
    except (OSError, ValueError):
        reason = f"was not predicted; {judge.images.parent / 'failed.csv'} says why, or start the command again"
        return Problem(drawn.sample.id, str(drawn.sample.image), reason)
    size = predicted.shape
    for name, mask in own.items():
        if mask.shape != size:
            return Problem(drawn.sample.id, str(drawn.masks[name]), "is not of its image's size; resample it")
    proposed, working = _proposal(judge, model, relative, own)
    write_atomically(proposals / f"{drawn.sample.id}.png", decoding.classes.encode(proposed), durable=False)
    reduced = {name: resize_mask(mask, relative.shape[1], relative.shape[2]) for name, mask in own.items()}
    posterior = model.posterior(judge.name, relative, reduced).softmax(0)
    network = relative.softmax(0)
    scale = math.sqrt(predicted.size / working[0].size)
    verdicts = []
    for name, mask in own.items():
        small = torch.from_numpy(reduced[name])
        others = [dice(reduced[name], other) for annotator, other in reduced.items() if annotator != name]
        verdicts.append(
            Verdict(
                drawn,
                name,
                judge.name,
                expected_dice(posterior, small),
                _mean_wrong(posterior, small),
                softmin_score(network, small),
                dice(mask, predicted),
                (size[0], size[1]),
                _area(mask),
                _area(proposed),
                scale * contour_shift(_marks(working[1][name]), _marks(working[0])),
                float(np.mean(others)) if others else math.nan,
                math.nan if truth is None or truth.shape != size else dice(mask, truth),
            )
        )
    return verdicts


def _proposal(
    judge: Judge, model: LabelModel, relative: Tensor, own: dict[str, NDArray[np.uint8]]
) -> tuple[NDArray[np.uint8], tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]]:
    """The most probable classes at the image's own size; and, as far as memory is to be spared smaller, the same and
    the masks."""
    height, width = next(iter(own.values())).shape
    share = min(1.0, math.sqrt(_MOST_PIXELS / (height * width)))
    size = max(1, round(share * height)), max(1, round(share * width))
    masks = {name: resize_mask(mask, *size) for name, mask in own.items()}
    logits = interpolate(relative[None], size, mode="bilinear", align_corners=False)[0]
    working = model.posterior(judge.name, logits, masks).argmax(0).byte().numpy()
    return resize_mask(working, height, width), (working, masks)


def _mean_wrong(posterior: Tensor, mask: Tensor) -> float:
    valid = mask != IGNORE
    return float((1 - drawn_probability(posterior, mask))[valid].mean(dtype=torch.float64)) if valid.any() else 0.0


def _marks(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (mask > 0) & (mask != IGNORE)


def _area(mask: NDArray[np.uint8]) -> int:
    return int(np.count_nonzero(_marks(mask)))
