"""Lesions of 2 % of the frame, of which two in three cheap masks miss theirs: what docs/methods.md measures.

python examples/small_lesions.py FOLDER          # a data set of 160 images, for data.root=FOLDER
"""

import csv
import sys
from pathlib import Path

import cv2
import numpy as np

from distseg.data.synthetic import draw_lesion

SIZE, LESION = 64, 24
SPLITS = {"train": 100, "val": 20, "test": 40}
MISSED = 0.7
"""Chance of a training mask to be empty; 67 of 100 are."""


def draw_small(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (64, 64, 3) RGB and true mask (64, 64) in {0, 1}: a drawn lesion, small, somewhere on its own skin."""
    top, left = rng.integers(0, SIZE - LESION + 1, 2).tolist()
    border = (top, SIZE - LESION - top, left, SIZE - LESION - left)
    image, mask = draw_lesion(LESION, rng)
    around = cv2.copyMakeBorder(image, *border, cv2.BORDER_REPLICATE)
    return around, cv2.copyMakeBorder(mask, *border, cv2.BORDER_CONSTANT)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("images", "masks", "noisy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        manifest = csv.writer(file)
        manifest.writerow(("id", "split", "image", "reference", "annotation"))
        for index, split in enumerate(split for split, count in SPLITS.items() for _ in range(count)):
            image, mask = draw_small(rng)
            row = [f"images/{index:03d}.png", f"masks/{index:03d}.png", ""]
            cv2.imwrite(str(folder / row[0]), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            cv2.imwrite(str(folder / row[1]), mask * 255)
            if split == "train":
                row[2] = f"noisy/{index:03d}.png"
                cv2.imwrite(str(folder / row[2]), mask * (0 if rng.random() < MISSED else 255))
            manifest.writerow((f"{index:03d}", split, *row))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
