"""Per-image scores of binary segmentations and their bootstrap intervals, all from four counts an image."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
_COUNT = re.compile(r"[0-9]{1,15}", re.ASCII)
SCORES = ("dice", "jaccard", "sensitivity", "specificity", "accuracy")


def confusion(prediction: Tensor, truth: Tensor) -> Tensor:
    """Count true positives, false positives, false negatives and true negatives of each image.

    `prediction` (B, H, W) bool, True = foreground; `truth` (B, H, W) integer class ids on the same device, every
    class above 0 is foreground and 255 is left out. Returns (B, 4) int64 on that device, without a host
    synchronisation. Raises ValueError where the shapes differ.
    """
    if prediction.shape != truth.shape or prediction.ndim != 3:
        raise ValueError(f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} must be equal (B, H, W)")
    valid = truth != IGNORE
    positive, negative = valid & (truth > 0), valid & (truth == 0)
    cells = (prediction & positive, prediction & negative, ~prediction & positive, ~prediction & negative)
    return torch.stack([cell.sum(dim=(1, 2)) for cell in cells], dim=1)


def image_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Turn (n, 4) counts [tp, fp, fn, tn] into the five SCORES, each (n,) float64 in [0, 1].

    0/0 is 1: a score whose error cannot occur is perfect. So an empty prediction of an empty truth has Dice and
    Jaccard 1 (and a non-empty one 0), sensitivity is 1 where there is no foreground to miss, specificity 1 where there
    is no background to hit, and an image that is ignored throughout has 1 everywhere.
    """
    tp, fp, fn, tn = np.asarray(counts, dtype=np.int64).T
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "jaccard": _ratio(tp, tp + fp + fn),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
    }


def summarise(counts: np.ndarray, prefix: str, seed: int = 0, resamples: int = 2000) -> dict[str, float]:
    """Mean over images of each score, with a 95 % percentile bootstrap interval over images (Efron 1979).

    `counts` (n, 4) as from `confusion`. Returns `{prefix}/dice`, `{prefix}/dice_low`, `{prefix}/dice_high` and so on
    for the five SCORES. Every score is resampled with the same images, so intervals of one call can be compared.
    Raises ValueError for n = 0.
    """
    images = len(counts)
    if images == 0:
        raise ValueError(f"{prefix}: no images to score")
    chosen = np.random.default_rng(seed).integers(images, size=(resamples, images))
    summary: dict[str, float] = {}
    for name, scores in image_scores(counts).items():
        low, high = np.percentile(scores[chosen].mean(axis=1), (2.5, 97.5))
        summary |= {
            f"{prefix}/{name}": float(scores.mean()),
            f"{prefix}/{name}_low": float(low),
            f"{prefix}/{name}_high": float(high),
        }
    return summary


def counts_csv(ids: Sequence[str], counts: np.ndarray) -> str:
    """The counts of every image as CSV with the columns id, tp, fp, fn, tn: all scores follow from them."""
    rows = [f"{name},{','.join(str(int(c)) for c in row)}\n" for name, row in zip(ids, counts, strict=True)]
    return "id,tp,fp,fn,tn\n" + "".join(rows)


def read_counts_csv(text: str) -> tuple[list[str], np.ndarray]:
    """The inverse of `counts_csv`: ids and (n, 4) int64. Raises ValueError, naming the row, for anything else."""
    header, *lines = text.removesuffix("\n").split("\n")
    if header != "id,tp,fp,fn,tn":
        raise ValueError("row 1: is not id,tp,fp,fn,tn")
    ids, counts = [], []
    for number, line in enumerate(lines, start=2):
        name, *cells = line.rsplit(",", 4)
        if len(cells) != 4 or not all(_COUNT.fullmatch(cell) for cell in cells):
            raise ValueError(f"row {number}: is not an id and four counts")
        ids.append(name)
        counts.append([int(cell) for cell in cells])
    if len(set(ids)) < len(ids):
        raise ValueError("an id is there twice")
    return ids, np.array(counts, np.int64).reshape(-1, 4)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.ones(len(numerator)), where=denominator > 0)
