"""Drawn lesions for the other examples, so that none of them needs a download.

python examples/drawn.py FOLDER          # a data set of 60 images, for data.root=FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distseg.data.noise.polygon import polygon
from distseg.data.synthetic import draw_lesion, write_dataset

SIZE = 32


def lesions(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 3, 32, 32) float in [-1, 1], true masks and triangles inside them, (count, 32, 32) uint8."""
    rng = np.random.default_rng(seed)
    drawn = [draw_lesion(SIZE, rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2) / 127.5 - 1
    masks = np.stack([mask for _, mask in drawn])
    triangles = np.stack([polygon(mask, 3, rng) for mask in masks])
    return images, torch.from_numpy(masks), torch.from_numpy(triangles)


if __name__ == "__main__":
    write_dataset(Path(sys.argv[1]), {"train": 40, "val": 10, "test": 10}, size=SIZE, seed=0)
