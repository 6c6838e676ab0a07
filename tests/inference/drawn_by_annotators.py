"""A data set of dark discs whose annotators err in known ways, and what a good network says of its images."""

import csv
from pathlib import Path

import cv2
import numpy as np

SIZE = 48
SHIFTS = {"generous": 2.0, "exact": 0.0, "strict": -2.0}
"""How many pixels outside of the true contour each draws."""


def disc(number: int, beyond: float = 0.0, side: int = SIZE) -> np.ndarray:
    """(side, side) uint8: the true object of an image, or one whose contour is `beyond` outside of it."""
    rng = np.random.default_rng(number)
    middle, radius = rng.uniform(0.4, 0.6, 2) * side, rng.uniform(0.2, 0.27) * side
    rows, columns = np.mgrid[:side, :side] + 0.5
    return (np.hypot(rows - middle[0], columns - middle[1]) < radius + beyond).astype(np.uint8)


def logits(number: int, seed: int = 0) -> np.ndarray:
    """(2, SIZE, SIZE) float16 relative logits: sure far from the contour, and beside it wrong as a network is."""
    mask = disc(number)
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform(1 - mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    coarse = np.random.default_rng((seed, number)).normal(0, 1.5, (6, 6)).astype(np.float32)
    error = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    lesion = 2 * np.where(mask > 0, inside - 0.5, 0.5 - outside) + error
    return np.stack([np.zeros_like(lesion), lesion]).astype(np.float16)


def write_data(
    root: Path, images: int = 12, val: int = 4, group: str = "", shifts: dict[str, float] | None = None
) -> Path:
    """ROOT/manifest.csv: training images with an annotation by each annotator, validation and test with references.

    The first training image has an empty mask by its first annotator, the second nothing at all."""
    shifts = SHIFTS if shifts is None else shifts
    rows = []
    for number in range(images + 2 * val):
        split = "train" if number < images else "val" if number < images + val else "test"
        name = f"{split}{number:03d}"
        mask = disc(number) * (number != 1)
        picture = np.full((SIZE, SIZE, 3), 200, np.uint8) - 120 * mask[..., None]
        picture[0, 0] = number  # no two images are the same
        row = {"id": name, "split": split, "image": f"images/{name}.png", "group": f"{group}{number // 2}"}
        _write(root / row["image"], picture)
        if split == "train":
            for place, (annotator, shift) in enumerate(shifts.items()):
                drawn = disc(number, shift) * (number != 1) * (not (number == 0 and place == 0))
                row[f"annotation:{annotator}"] = f"annotations/{annotator}/{name}.png"
                _write(root / row[f"annotation:{annotator}"], 255 * drawn.astype(np.uint8))
        else:
            row["reference"] = f"references/{name}.png"
            _write(root / row["reference"], 255 * mask)
        rows.append(row)
    columns = ["id", "split", "image", "reference", *(f"annotation:{name}" for name in shifts), "group"]
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)
