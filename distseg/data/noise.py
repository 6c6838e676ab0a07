"""Making true masks wrong, on purpose and repeatably, to know how well a method copes.

Every noisy mask is a pure function of (true mask or image, kind, parameters, seed, sample id): no order, rank or
machine enters. Distances are compared as integers and random numbers drawn pixel by pixel in raster order, so that no
rounding decides.
"""

import csv
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.data.config import NoiseConfig
from distseg.data.decode import read_image, read_mask
from distseg.data.manifest import Sample
from distseg.data.seeding import generator, stable_hash
from distseg.errors import UserError
from distseg.files import write_atomically

Mask = NDArray[np.uint8]
"""(H, W) uint8 in {0, 1}."""
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_WALK_SIDE = 256


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
        cv2.fillPoly(drawn, [corners], 1)
    return drawn


def box(mask: Mask) -> Mask:
    """(H, W) uint8: the axis-aligned bounding box of all that is set in `mask` (H, W) uint8; empty where `mask` is."""
    drawn = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows):
        drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    return drawn


def boundary(mask: Mask, alpha: float, beta: float, rng: np.random.Generator) -> Mask:
    """The lesion drawn too large, too small or beside its place, in a fraction `alpha` of the masks.

    One of the three at random, until the wrong pixels are a fraction `beta` of the lesion's area: the literature's
    protocol with alpha in {0.3, 0.5, 0.7} and beta in {0.5, 0.7} (Gonzalez-Jimenez et al. 2023, section 3). Too large
    and too small hit the fraction to the pixel, pixels nearest to the contour first; the shift, in a random direction,
    comes as near as whole pixels allow. What leaves the frame is lost; a lesion is never erased, and one that the frame
    keeps from growing grows as far as there is room.
    """
    altered, way, direction = rng.random() < alpha, rng.integers(3), rng.random() * 2 * np.pi
    area = int(mask.sum())
    if not altered or area == 0:
        return mask.copy()
    wrong = round(beta * area)
    if way == 0:
        return _flip_nearest(mask, 0, wrong)
    if way == 1:
        return _flip_nearest(mask, 1, min(wrong, area - 1))
    return _shifted(mask, wrong, np.array([np.sin(direction), np.cos(direction)]))


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
    walker = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    for grows in rng.random(steps) < theta1:
        # The default border of these two neither grows nor shrinks a lesion that touches the frame.
        rim = cv2.dilate(walker, _CROSS) - walker if grows else walker - cv2.erode(walker, _CROSS)
        places = np.flatnonzero(rim)
        walker.reshape(-1)[places[rng.random(len(places)) < theta2]] ^= 1
    drawn = cv2.resize(walker, mask.shape[::-1], interpolation=cv2.INTER_NEAREST)
    return drawn ^ (rng.random(mask.shape) < theta3).astype(np.uint8) if theta3 else drawn


def unsupervised(image: NDArray[np.uint8]) -> Mask:
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


def corrupt(mask: Mask, config: NoiseConfig, sample_id: str, image: NDArray[np.uint8] | None = None) -> Mask:
    """The noisy mask of one sample: (H, W) uint8 in {0, 1} from (H, W) uint8 in {0, 1}.

    `image` (H, W, 3) uint8 RGB is needed where `config.looks_at_image`; ValueError without it.
    """
    if config.kind == "mixed":
        # The same annotators, in the same order, draw the same sample again; each has random numbers of its own.
        chosen = int(generator(config.seed, "annotator", sample_id).integers(len(config.annotators)))
        annotator = config.annotators[chosen]
        seed = stable_hash(config.seed, "annotator", chosen) % 2**63
        return corrupt(mask, annotator.model_copy(update={"seed": seed}), sample_id, image)
    rng = generator(config.seed, "noise", sample_id)
    if config.kind == "polygon":
        return polygon(mask, config.vertices, rng)
    if config.kind == "box":
        return box(mask)
    if config.kind == "boundary":
        return boundary(mask, config.alpha, config.beta, rng)
    if config.kind == "markov":
        return markov(mask, config.steps, config.theta1, config.theta2, config.theta3, rng)
    if config.kind == "unsupervised":
        if image is None:
            raise ValueError("unsupervised noise is drawn from the image; give it")
        return unsupervised(image)
    return mask


def write_noisy_masks(samples: list[Sample], config: NoiseConfig, folder: Path) -> tuple[list[Sample], float]:
    """Give each sample a noisy mask, as PNG (0/255) in `folder`, and say how wrong they are.

    Each file is written aside and renamed, manifest.csv (id, mask, kind, parameters, seed, wrong_pixel_rate) last; a
    rerun writes the same bytes. With kind `none` nothing is written: samples keep the noisy mask that they bring, or
    none.

    Returns:
        The samples with `noisy_mask` set, in the order given, and the mean over them of the fraction of wrong pixels;
        a sample without a noisy mask of its own counts as 0.
    """
    if config.kind == "none":
        return samples, _mean(_own_rate(sample) for sample in samples)
    folder.mkdir(parents=True, exist_ok=True)

    def write(sample: Sample) -> tuple[Sample, float]:
        true = read_mask(sample.mask)
        noisy = corrupt(true, config, sample.id, read_image(sample.image) if config.looks_at_image else None)
        path = folder / f"{sample.id}.png"
        write_atomically(path, cv2.imencode(".png", noisy * 255)[1].tobytes(), durable=False)  # can be drawn again
        return replace(sample, noisy_mask=path), _wrong_pixel_rate(noisy, true)

    with ThreadPoolExecutor() as pool:
        written = list(pool.map(write, samples))
    parameters = config.parameters
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "mask", "kind", "parameters", "seed", "wrong_pixel_rate"])
    for sample, rate in written:
        rows.writerow([sample.id, sample.noisy_mask.name, config.kind, parameters, config.seed, f"{rate:.6f}"])
    write_atomically(folder / "manifest.csv", table.getvalue())
    return [sample for sample, _ in written], _mean(rate for _, rate in written)


def _outline(mask: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(N, 2) x, y of the outer contour pixels of the largest component, in order; N = 0 for an empty mask."""
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count == 1:
        return np.empty((0, 2), np.int32)
    largest = 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA]))
    component = (labels == largest).astype(np.uint8)
    contours, _ = cv2.findContours(component, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return contours[0].reshape(-1, 2)


def _flip_nearest(mask: Mask, label: int, count: int) -> Mask:
    """Flip the `count` pixels of `label` that are nearest to the other label, or all where there are fewer.

    The frame's outside is background: a lesion that touches it is eroded from there as well.
    """
    framed = np.pad(mask, 1) == label
    distance = cv2.distanceTransform(framed.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    squared = np.rint(distance.astype(np.float64) ** 2).astype(np.int64)
    candidates = np.flatnonzero(mask == label)
    nearest = candidates[np.argsort(squared.ravel()[candidates], kind="stable")[:count]]
    drawn = mask.copy()
    drawn.ravel()[nearest] ^= 1
    return drawn


def _shifted(mask: Mask, wrong: int, direction: NDArray[np.float64]) -> Mask:
    """`mask` moved along `direction` (rows, columns) until `wrong` pixels differ, to the nearest whole step."""

    def moved(distance: int) -> Mask:
        rows, columns = np.rint(distance * direction)
        matrix = np.float64([[1, 0, columns], [0, 1, rows]])
        return cv2.warpAffine(mask, matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST)

    def differing(distance: int) -> int:
        return int(np.count_nonzero(moved(distance) != mask))

    # Bisection between a shift that changes too little and one that changes enough; once the lesion has left the frame
    # its whole area is wrong.
    low, high = 0, 2 * sum(mask.shape)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if differing(middle) < wrong else (low, middle)
    nearest = low if wrong - differing(low) <= differing(high) - wrong else high
    return moved(nearest) if moved(nearest).any() else moved(low)


def _own_rate(sample: Sample) -> float:
    if sample.noisy_mask is None:
        return 0.0
    noisy, true = read_mask(sample.noisy_mask), read_mask(sample.mask)
    if noisy.shape != true.shape:
        raise UserError(f"{sample.noisy_mask}: not of the size of {sample.mask}; resample it, nearest neighbour")
    return _wrong_pixel_rate(noisy, true)


def _wrong_pixel_rate(noisy: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    return float(np.mean(noisy != true))


def _mean(rates: Iterable[float]) -> float:
    values = list(rates)
    return float(np.mean(values)) if values else 0.0
