"""Per-image scores of segmentations and their bootstrap intervals, all from four counts an image and class.

Counts of two classes are (n, 4), of the foreground. Of C > 2 classes they are (n, C − 1, 4): each class but background
against all others. The scores of an image are then macro means, over these classes, and so are the means over images.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE = 255
_COUNT = re.compile(r"[0-9]{1,15}", re.ASCII)
_HEADER, _CLASS_HEADER = "id,tp,fp,fn,tn", "id,class,tp,fp,fn,tn"
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


def count_predictions(logits: Tensor, truth: Tensor, class_count: int = 2) -> Tensor:
    """The counts of each image of logits (B, C, H, W): (B, 4) of two classes, (B, class_count − 1, 4) of more.

    A pixel is foreground where its logit is above 0 for C = 1 (probability above 0.5), and of the class with the
    highest logit for C ≥ 2; of two classes any but 0 is foreground. `truth` and what is raised: as for `confusion`.
    """
    if class_count == 2:
        return confusion(logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(dim=1) > 0, truth)
    return class_confusion(logits.argmax(dim=1), truth, class_count)


def class_confusion(prediction: Tensor, truth: Tensor, class_count: int) -> Tensor:
    """`confusion` of each class but background against all others: (B, class_count − 1, 4) int64.

    `prediction` (B, H, W) integer class ids.
    """
    ignored = truth == IGNORE
    alone = [torch.where(ignored, truth, (truth == label).to(truth.dtype)) for label in range(1, class_count)]
    counts = [confusion(prediction == label, each) for label, each in enumerate(alone, start=1)]
    return torch.stack(counts, dim=1)


def image_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Turn (n, 4) counts [tp, fp, fn, tn] into the five SCORES, each (n,) float64 in [0, 1].

    Of (n, K, 4) counts, macro means over the K classes of `class_scores`.
    """
    return {name: scores.mean(axis=1) for name, scores in class_scores(counts).items()}


def class_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Turn counts into the five SCORES of each image and class, each (n, K) float64 in [0, 1]; K = 1 for (n, 4).

    0/0 is 1: a score whose error cannot occur is perfect. So an empty prediction of an empty truth has Dice and
    Jaccard 1 (and a non-empty one 0), sensitivity is 1 where there is no foreground to miss, specificity 1 where there
    is no background to hit, and an image that is ignored throughout has 1 everywhere.
    """
    counts = np.asarray(counts, dtype=np.int64)
    tp, fp, fn, tn = np.moveaxis(counts.reshape(len(counts), -1, 4), -1, 0)
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "jaccard": _ratio(tp, tp + fp + fn),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
    }


def summarise(
    counts: np.ndarray, prefix: str, seed: int = 0, resamples: int = 2000, class_names: Sequence[str] = ()
) -> dict[str, float]:
    """Mean over images of each score, with a 95 % percentile bootstrap interval over images (Efron 1979).

    `counts` as from `count_predictions`. Returns `{prefix}/dice`, `{prefix}/dice_low`, `{prefix}/dice_high` and so on
    for the five SCORES, of more than two classes macro means over all but background, and beside them the mean over
    images of each class, `{prefix}/dice/CLASS`, by `class_names`, background first. Every score is resampled with the
    same images, so intervals of one call can be compared. Raises ValueError for n = 0.
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
    if np.asarray(counts).ndim == 3:
        for name, scores in class_scores(counts).items():
            means = zip(class_names[1:], scores.mean(axis=0), strict=True)
            summary |= {f"{prefix}/{name}/{label}": float(mean) for label, mean in means}
    return summary


def never_predicted(counts: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Of the classes but background, those that are predicted nowhere."""
    predicted = np.asarray(counts).reshape(len(counts), -1, 4)[..., :2].sum(axis=(0, 2)).tolist()
    return [name for name, pixels in zip(class_names[1:], predicted, strict=True) if not pixels]


def counts_csv(ids: Sequence[str], counts: np.ndarray, class_names: Sequence[str] = ()) -> str:
    """The counts of every image as CSV with the columns id, tp, fp, fn, tn: all scores follow from them.

    Of more than two classes a row an image and class, with the column class after id.
    """
    labels = [f",{name}" for name in class_names[1:]] if np.asarray(counts).ndim == 3 else [""]
    rows = [
        f"{id}{label},{','.join(str(int(count)) for count in row)}\n"
        for id, of_image in zip(ids, np.asarray(counts).reshape(len(counts), -1, 4), strict=True)
        for label, row in zip(labels, of_image, strict=True)
    ]
    return (_CLASS_HEADER if labels != [""] else _HEADER) + "\n" + "".join(rows)


def read_counts_csv(text: str) -> tuple[list[str], np.ndarray, list[str]]:
    """The inverse of `counts_csv`: ids, counts and the names of the classes that have a row, none for (n, 4).

    Raises ValueError, naming the row, for anything else.
    """
    header, *lines = text.removesuffix("\n").split("\n")
    if header == _CLASS_HEADER:
        return _read_class_rows(lines)
    if header != _HEADER:
        raise ValueError(f"row 1: is not {_HEADER}")
    ids, counts = _read_rows(lines)
    if len(set(ids)) < len(ids):
        raise ValueError("an id is there twice")
    return ids, np.array(counts, np.int64).reshape(-1, 4), []


def _read_class_rows(lines: Sequence[str]) -> tuple[list[str], np.ndarray, list[str]]:
    keys, counts = _read_rows(lines)
    pairs = [key.rpartition(",") for key in keys]
    ids, names = (list(dict.fromkeys(part)) for part in ([id for id, _, _ in pairs], [name for _, _, name in pairs]))
    if [(id, name) for id, _, name in pairs] != [(id, name) for id in ids for name in names]:
        raise ValueError("not every image has a row of every class, in one order")
    return ids, np.array(counts, np.int64).reshape(len(ids), -1, 4), names


def _read_rows(lines: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """What stands before the last four cells of each row, and these as numbers."""
    ids, counts = [], []
    for number, line in enumerate(lines, start=2):
        name, *cells = line.rsplit(",", 4)
        if len(cells) != 4 or not all(_COUNT.fullmatch(cell) for cell in cells):
            raise ValueError(f"row {number}: is not an id and four counts")
        ids.append(name)
        counts.append([int(cell) for cell in cells])
    return ids, counts


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.ones(numerator.shape), where=denominator > 0)
