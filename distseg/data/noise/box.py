"""Masks by a bounding box."""

from typing import Literal

import numpy as np

from distseg.data.noise.kind import AnnotatorKind, Image, Mask


class BoxNoise(AnnotatorKind):
    kind: Literal["box"] = "box"

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return box(mask)


def box(mask: Mask) -> Mask:
    """(H, W) uint8: the axis-aligned bounding box of all that is set in `mask` (H, W) uint8; empty where `mask` is."""
    drawn = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    return drawn
