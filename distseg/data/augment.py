"""The random numbers of augmentation, drawn once, so that every loader executes the same transform.

A transform is a pure function of (seed, stream, position in the stream's global order). Hence N ranks see what one
rank sees, and a resumed run what an uninterrupted one does, with no state to save in any loader.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distseg.config import AugmentConfig
from distseg.data.seeding import generator

# Of the ISIC training images, RGB in [0, 1]; from the released code of Mirikharaji et al. 2019.
CHANNEL_MEANS = np.array([0.7077, 0.5913, 0.5467])
CHANNEL_DEVIATIONS = np.array([0.1550, 0.1635, 0.1785])

_LUMA = np.array([0.299, 0.587, 0.114])
_GREY_AXIS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # cross product with (1, 1, 1) / √3
_QUARTER_TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])


@dataclass(frozen=True, eq=False)
class Transform:
    """What to do with one image and its masks, after resizing to the network's resolution."""

    matrix: NDArray[np.float32]
    """(2, 3): destination (x, y, 1) to source (x, y), in pixels from the frame's corner; pixel i's centre is at i + ½.
    With this origin right angles and flips have integer entries and permute the pixels exactly."""
    colour: NDArray[np.float32]
    """(3, 4): stored (R, G, B, 1) in 0…255 to the network's normalised input."""


def identity_transform(image_size: int) -> Transform:
    """Normalisation alone, for evaluation."""
    return Transform(_about_centre(np.eye(2), np.zeros(2), image_size), _normalised(np.eye(3), np.zeros(3)))


def draw_transform(config: AugmentConfig, image_size: int, seed: int, stream: str, position: int) -> Transform:
    """The transform at `position` of `stream`'s global order.

    Geometry: right angles, each flip with probability ½, then zoom (uniform in its logarithm), shear, rotation and
    shift, all about the centre. Colour, unclipped: hue turned about the grey axis, saturation about the luma,
    contrast about the channel means, brightness. Each quantity has its own draw, so that switching one on leaves the
    others as they were.
    """
    unit = generator(seed, "augment", stream, position).random(12)
    signed = 2 * unit - 1

    turned = np.linalg.matrix_power(_QUARTER_TURN, int(4 * unit[0]) if config.right_angles else 0)
    flips = np.where(config.flip & (unit[1:3] < 0.5), -1.0, 1.0)
    low, high = (math.log(bound) for bound in config.scale)
    zoom = math.exp(low + (high - low) * unit[3])
    shear = np.array([[1.0, math.tan(math.radians(config.shear * signed[4]))], [0.0, 1.0]])
    rotation = _rotation(math.radians(config.rotate * signed[5]))
    shift = config.translate * image_size * signed[6:8]
    matrix = _about_centre(rotation @ shear @ turned * flips / zoom, shift, image_size)

    brightness, contrast, saturation = np.array([config.brightness, config.contrast, config.saturation]) * signed[8:11]
    linear = _hue_turn(math.radians(config.hue * signed[11]))
    linear = ((1 + saturation) * np.eye(3) - saturation * _LUMA) @ linear
    linear, offset = (1 + contrast) * linear, -contrast * CHANNEL_MEANS
    return Transform(matrix, _normalised((1 + brightness) * linear, (1 + brightness) * offset))


def _rotation(angle: float) -> NDArray[np.float64]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


def _hue_turn(angle: float) -> NDArray[np.float64]:
    """Rodrigues' rotation about the grey axis, which keeps greys and R + G + B."""
    return np.eye(3) + math.sin(angle) * _GREY_AXIS + (1 - math.cos(angle)) * _GREY_AXIS @ _GREY_AXIS


def _about_centre(linear: NDArray[np.float64], shift: NDArray[np.float64], image_size: int) -> NDArray[np.float32]:
    centre = np.full(2, image_size / 2)
    return np.column_stack([linear, centre - linear @ (centre + shift)]).astype(np.float32)


def _normalised(linear: NDArray[np.float64], offset: NDArray[np.float64]) -> NDArray[np.float32]:
    """The colour map `linear`, `offset` on [0, 1], with scaling before it and normalisation after it."""
    scaled = np.column_stack([linear / 255, offset - CHANNEL_MEANS])
    return (scaled / CHANNEL_DEVIATIONS[:, None]).astype(np.float32)
