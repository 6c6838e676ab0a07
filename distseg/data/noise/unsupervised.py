"""Masks by an automatic segmenter."""

from typing import ClassVar, Literal

import cv2
import numpy as np

from distseg.data.noise.kind import AnnotatorKind, Image, Mask


class UnsupervisedNoise(AnnotatorKind):
    needs_image: ClassVar[bool] = True

    kind: Literal["unsupervised"] = "unsupervised"

    def draw(self, mask: Mask, image: Image | None, rng: np.random.Generator) -> Mask:
        if image is None:
            raise ValueError("unsupervised noise is drawn from the image; give it")
        return unsupervised(image)


def unsupervised(image: Image) -> Mask:
    """What an automatic segmenter draws from the image alone: the dark region near the centre.

    Otsu's threshold (1979) on the blurred blue channel, in which pigment is darkest; of the connected regions below it
    the one with most pixels, where a pixel counts by a Gaussian around the frame's centre (a fifth of the frame wide):
    dark corners of a dermoscope are larger than many a lesion. Never empty, except where the image is one colour.

    Args:
        image: (H, W, 3) uint8 RGB, as decoded: it is as repeatable as the decoder.
    """
    height, width = image.shape[:2]
    blue = cv2.GaussianBlur(image[..., 2], (0, 0), max(height, width) * 1.5 / 128)
    if blue.min() == blue.max():
        return np.zeros((height, width), np.uint8)
    _, dark = cv2.threshold(blue, 0, 1, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    count, labels = cv2.connectedComponents(dark, connectivity=8)
    rows, columns = (np.exp(-(((np.arange(side) + 0.5) / side - 0.5) ** 2) / (2 * 0.2**2)) for side in (height, width))
    counted = np.bincount(labels.ravel(), np.outer(rows, columns).ravel(), count)
    return (labels == 1 + int(np.argmax(counted[1:]))).astype(np.uint8)
