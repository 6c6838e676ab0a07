"""Small images with masks of three classes: holes, touching objects, an empty one, names of several scripts."""

import numpy as np

CLASSES = ("background", "skin lesion", "hair & ruler")
SIZES = {
    "holes": (23, 37),
    "touching": (31, 19),
    "empty": (17, 29),
    "two words": (20, 24),
    "Läsion_é": (41, 13),
}
"""(height, width) by id."""
SPLITS = {"holes": "train", "touching": "train", "empty": "train", "two words": "val", "Läsion_é": "test"}


def draw_image(id: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB."""
    height, width = SIZES[id]
    return np.random.default_rng(len(id)).integers(0, 256, (height, width, 3), np.uint8)


def draw_mask(id: str, shift: int = 0) -> np.ndarray:
    """(H, W) uint8 class ids; another annotator's are shifted to the right."""
    height, width = SIZES[id]
    mask = np.zeros((height, width), np.uint8)
    if id == "holes":
        mask[3:19, 4:30] = 1
        mask[6:15, 8:20] = 0
        mask[9:12, 11:16] = 2  # in the hole, touching nothing
        mask[10, 13] = 0
    elif id == "touching":
        mask[2:10, 2:9] = 1
        mask[10:18, 9:15] = 1  # by a corner
        mask[2:10, 9:14] = 2  # along a side
        mask[25:, :4] = 2  # the frame's own
    elif id == "two words":
        y, x = np.mgrid[:height, :width]
        mask[(y - 9) ** 2 / 49 + (x - 11) ** 2 / 81 <= 1] = 1
    elif id == "Läsion_é":
        mask[np.random.default_rng(7).random((height, width)) < 0.3] = 1
        mask[np.random.default_rng(8).random((height, width)) < 0.2] = 2
    return np.roll(mask, shift, axis=1)
