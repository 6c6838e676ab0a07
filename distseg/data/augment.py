"""The random numbers of augmentation, drawn once, so that every loader executes the same transform.

A transform is a pure function of (seed, stream, position in the stream's global order). Hence N ranks see what one
rank sees, and a resumed run what an uninterrupted one does, with no state to save in any loader.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.data.config import AugmentConfig
from distseg.data.seeding import generator

# Of the ISIC training images, RGB in [0, 1]; from the released code of Mirikharaji et al. 2019.
CHANNEL_MEANS = np.array([0.7077, 0.5913, 0.5467])
CHANNEL_DEVIATIONS = np.array([0.1550, 0.1635, 0.1785])

_LUMA = np.array([0.299, 0.587, 0.114])
_GREY_AXIS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # cross product with (1, 1, 1) / √3
_QUARTER_TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])
_ELASTIC_KNOTS = 4
_SUBPIXEL_BITS = 4  # of the coordinates in which cv2 draws


@dataclass(frozen=True, eq=False)
class Transform:
    """What to do with one image and its masks, after resizing to the network's resolution, in the order of the fields.

    Those that are None are not done; all transforms of a stream do the same.
    """

    matrix: NDArray[np.float32]
    """(2, 3): destination (x, y, 1) to source (x, y), in pixels from the frame's corner; pixel i's centre is at i + ½.
    With this origin right angles and flips have integer entries and permute the pixels exactly."""
    colour: NDArray[np.float32]
    """(3, 4): stored (R, G, B, 1) in 0…255 to the network's normalised input."""
    elastic: NDArray[np.float32] | None = None
    """(size, size, 2): x, y in pixels to add to a destination's coordinates for its source, before `matrix`."""
    hairs: NDArray[np.float32] | None = None
    """(size, size): factors in (0, 1] by which hairs darken the image, after `matrix`."""
    blur: np.float32 | None = None
    """Deviation in pixels of a Gaussian, after the hairs."""
    grain: NDArray[np.float32] | None = None
    """(3, size, size): to be added to the network's input, after `colour`."""


def identity_transform(image_size: int) -> Transform:
    """Normalisation alone, for evaluation."""
    return Transform(_about_centre(np.eye(2), np.zeros(2), image_size), _normalised(np.eye(3), np.zeros(3)))


def draw_transform(config: AugmentConfig, image_size: int, seed: int, stream: str, position: int) -> Transform:
    """The transform at `position` of `stream`'s global order.

    Geometry: right angles, each flip with probability ½, then zoom (uniform in its logarithm), shear, rotation and
    shift, all about the centre. Colour, unclipped: hue turned about the grey axis, saturation about the luma,
    contrast about the channel means, brightness. Each quantity has its own draw, so that switching one on leaves the
    others as they were. Elastic deformation, hairs, blur and grain come from generators of their own.
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
    place = (seed, stream, position)
    return Transform(
        matrix,
        _normalised((1 + brightness) * linear, (1 + brightness) * offset),
        _elastic_field(config.elastic, image_size, generator(*place, "elastic")) if config.elastic else None,
        _hairs(config.hairs, image_size, generator(*place, "hairs")) if config.hairs else None,
        np.float32(config.blur * generator(*place, "blur").random()) if config.blur else None,
        _grain(config.grain, image_size, generator(*place, "grain")) if config.grain else None,
    )


def warp_elastically(
    pixels: NDArray[np.uint8], field: NDArray[np.float32], interpolation: int, fill: tuple[int, ...]
) -> NDArray[np.uint8]:
    """(H, W) or (H, W, C) uint8 under `Transform.elastic`, `fill` (of each channel) where the source is outside."""
    row, column = np.mgrid[: pixels.shape[0], : pixels.shape[1]].astype(np.float32)
    warped = cv2.remap(pixels, column + field[..., 0], row + field[..., 1], interpolation, borderValue=fill)
    return np.asarray(warped, np.uint8)


def _elastic_field(amplitude: float, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Smooth: a grid of displacements up to `amplitude` of the frame, interpolated by cubic splines."""
    knots = rng.uniform(-1, 1, (_ELASTIC_KNOTS, _ELASTIC_KNOTS, 2)).astype(np.float32)
    field = cv2.resize(knots, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.float32(amplitude * size) * field.clip(-1, 1)  # cubics overshoot


def _hairs(most: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Dark arcs from anywhere in any direction, a third to one and a half frames long."""
    factors = np.ones((size, size), np.float32)
    along = np.linspace(0, 1, 16)[:, None]
    for _ in range(rng.integers(0, most, endpoint=True)):
        start, angle = rng.uniform(0, size, 2), rng.uniform(0, 2 * math.pi)
        bend, length = rng.uniform((-0.3, 0.3), (0.3, 1.5))
        thickness, darkness = 1 + int(rng.uniform(0, size / 96)), rng.uniform(0.3, 0.9)
        forward = length * size * np.array([math.cos(angle), math.sin(angle)])
        sideways = bend * np.array([-forward[1], forward[0]])
        arc = start + along * forward + 4 * along * (1 - along) * sideways
        drawn = np.zeros((size, size), np.uint8)
        points = np.round(arc * 2**_SUBPIXEL_BITS).astype(np.int32)
        cv2.polylines(drawn, [points], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
        factors *= 1 - np.float32(darkness / 255) * drawn
    return factors


def _grain(most: float, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    deviations = (most * rng.random() / CHANNEL_DEVIATIONS).astype(np.float32)
    return deviations[:, None, None] * rng.standard_normal((3, size, size), np.float32)


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
