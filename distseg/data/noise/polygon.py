"""Masks by a few clicks on the contour."""

from typing import Annotated, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.noise.kind import AnnotatorKind, Image, Mask


class PolygonNoise(AnnotatorKind):
    kind: Literal["polygon"] = "polygon"
    vertices: Annotated[int, Field(ge=3, le=10_000)] = 3
    """Vertices on the true contour; 3 and 7 are the paper's levels."""

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return polygon(mask, self.vertices, rng)


def polygon(mask: Mask, vertices: int, rng: np.random.Generator) -> Mask:
    """The lesion as an annotator in a hurry draws it: `vertices` clicks on the true contour, joined and filled.

    The clicks are contour pixels at equal arc length from a random start (Mirikharaji et al. 2019). Where
    the mask has several components the one of largest area is drawn and the others are missed; holes are not seen.

    Args:
        mask: (H, W) uint8 in {0, 1}.
        rng: supplies one number, the start.

    Returns:
        (H, W) uint8 in {0, 1}, empty where `mask` is.
    """
    drawn = np.zeros_like(mask)
    contour = _outline(mask)
    if len(contour):
        steps = np.linalg.norm(np.roll(contour, -1, axis=0) - contour, axis=1)
        travelled = np.concatenate([[0.0], np.cumsum(steps)[:-1]])
        clicks = (rng.random() + np.arange(vertices) / vertices) % 1.0 * steps.sum()
        corners = contour[np.searchsorted(travelled, clicks, side="right") - 1]
        cv2.fillPoly(drawn, [corners], (1,))
    return drawn


def _outline(mask: Mask) -> NDArray[np.int32]:
    """(N, 2) x, y of the outer contour pixels of the largest component, in order; N = 0 for an empty mask."""
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count == 1:
        return np.empty((0, 2), np.int32)
    largest = 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA]))
    component = (labels == largest).astype(np.uint8)
    contours, _ = cv2.findContours(component, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return contours[0].reshape(-1, 2)
