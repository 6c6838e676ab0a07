"""Masks whose contour wandered."""

from typing import Annotated, Literal

import cv2
import numpy as np
from pydantic import Field

from distseg.data.noise.kind import AnnotatorKind, Image, Mask
from distseg.data.resize import resize_mask
from distseg.section import Fraction

_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_WALK_SIDE = 256


class MarkovNoise(AnnotatorKind):
    kind: Literal["markov"] = "markov"
    steps: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Steps of the walk, T."""
    theta1: Fraction = 0.2
    """How often a step grows the lesion; at the default the lesion is drawn too small."""
    theta2: Fraction = 0.05
    """How many of the contour's pixels a step moves."""
    theta3: Fraction = 0.0
    """How many pixels of the frame are flipped at the end."""

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        return markov(mask, self.steps, self.theta1, self.theta2, self.theta3, rng)


def markov(mask: Mask, steps: int, theta1: float, theta2: float, theta3: float, rng: np.random.Generator) -> Mask:
    """A contour that wandered: `steps` steps of a random walk of the boundary, then flips of single pixels.

    The Markov label noise of Yao et al. 2023 ("Learning to Segment from Noisy Annotations: A Spatial Correction
    Approach", definition 1). Each step takes, with probability `theta1`, the background pixels that touch the lesion,
    and else the lesion's pixels that touch the background (4-neighbours within the frame), and flips each with
    probability `theta2`. So theta1 is the annotator's bias to large or small, and theta2 · steps the reach in pixels.
    At the end every pixel of the frame is flipped with probability `theta3`; the authors blur these flips away again,
    here they stay. For ISIC 2017 they take steps = 200, theta1 in {0.2, 0.8}, theta2 = 0.05.

    A mask of more than 256 pixels on its longer side walks on a grid of that size, so that a level means the same for a
    photograph as for its thumbnail. A walk may erase a lesion that is smaller than its reach.
    """
    scale = max(1.0, max(mask.shape) / _WALK_SIDE)
    height, width = (max(1, round(side / scale)) for side in mask.shape)
    walker = resize_mask(mask, height, width).copy()
    for grows in rng.random(steps) < theta1:
        # The default border of these two neither grows nor shrinks a lesion that touches the frame.
        rim = cv2.dilate(walker, _CROSS) - walker if grows else walker - cv2.erode(walker, _CROSS)
        places = np.flatnonzero(rim)
        walker.reshape(-1)[places[rng.random(len(places)) < theta2]] ^= 1
    drawn = resize_mask(walker, *mask.shape)
    return drawn ^ (rng.random(mask.shape) < theta3).astype(np.uint8) if theta3 else drawn
