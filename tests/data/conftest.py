"""Synthetic data: dark discs on a light ground, whose masks can be told from the pixels."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest


def draw_lesion(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 image, lit where the (H, W) {0, 1} mask, an off-centre ellipse, is set and black elsewhere."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.35, 0.6)), int(height * rng.uniform(0.35, 0.6)))
    axes = (int(width * rng.uniform(0.15, 0.3)), int(height * rng.uniform(0.1, 0.2)))
    cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    return np.repeat(mask[..., None] * 255, 3, axis=2), mask


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write a manifest folder of PNG pairs and return its root."""

    def make(train: int = 8, val: int = 2, test: int = 3, size: int = 32, noisy: bool = False) -> Path:
        root = tmp_path / "dataset"
        for folder in ("images", "masks", "noisy"):
            (root / folder).mkdir(parents=True)
        rows = ["id,split,image,mask" + (",noisy_mask" if noisy else "")]
        splits = ["train"] * train + ["val"] * val + ["test"] * test
        for number, split in enumerate(splits):
            id = f"S{number:03d}"
            image, mask = draw_lesion(size, size, seed=number)
            cv2.imwrite(str(root / f"images/{id}.png"), image)
            cv2.imwrite(str(root / f"masks/{id}.png"), mask * 255)
            row = f"{id},{split},images/{id}.png,masks/{id}.png"
            if noisy:
                cv2.imwrite(str(root / f"noisy/{id}.png"), (1 - mask) * 255)
                row += f",noisy/{id}.png"
            rows.append(row)
        (root / "manifest.csv").write_text("\n".join(rows) + "\n")
        return root

    return make
