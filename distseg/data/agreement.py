"""How far the masks of one image agree."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from distseg.data.classes import IGNORE
from distseg.data.sample import FileKey

Agreement = dict[tuple[FileKey, FileKey], float]
"""Dice of every two masks of an image, by their keys in the order of `Sample.files`."""
_MOST_PIXELS = 2**20
"""Of larger masks every k-th row and column is compared, so that ten annotators of 24 megapixels need no 240 MB."""


def thinned(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Every k-th row and column of a mask, so that at most 2²⁰ pixels are left; a copy."""
    step = int(np.ceil(np.sqrt(mask.size / _MOST_PIXELS))) or 1
    return mask[::step, ::step].copy()


def agreement(masks: Mapping[FileKey, NDArray[np.uint8]]) -> Agreement:
    """Dice of every two of `masks`, (H, W) uint8 class ids, 255 = ignore; masks of unequal sizes are left out."""
    return {
        (first, second): dice(masks[first], masks[second])
        for first, second in combinations(masks, 2)
        if masks[first].shape == masks[second].shape
    }


def dice(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """2 |same class, not background| / (|not background| + |not background|) over the pixels that both label.

    Of two classes it is Dice's coefficient of the lesion. 1 where both mark nothing.
    """
    labelled = (first != IGNORE) & (second != IGNORE)
    ours, theirs = labelled & (first > 0), labelled & (second > 0)
    both = np.count_nonzero(ours & (first == second))
    marked = np.count_nonzero(ours) + np.count_nonzero(theirs)
    return 2 * both / marked if marked else 1.0
