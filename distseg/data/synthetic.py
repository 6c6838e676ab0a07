"""Drawn dermoscopy: images that look like skin lesions, with their exact masks, for demos and tests without a download.

A picture is skin reflectance times exp(−optical density), seen through a dermatoscope. Pigment adds optical density, so
one lesion darkens light and dark skin alike, as in Beer–Lambert's law; hair, bubbles and ruler lie on top. Lengths are
fractions of the frame's side. Fields are float32: draw scalars as Python floats, for NumPy's own would widen them.
"""

import csv
import hashlib
import json
import math
import shutil
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from distseg.errors import UserError

SUPERSAMPLING = 2
"""Drawn at twice the size and averaged down: hair is thinner than a pixel at network resolution."""

AREA_RANGE = (0.03, 0.45)
MEDIAN_AREA = 0.14
"""Lesion area as a fraction of the frame; the median is that of ISIC 2017."""

SKIN_RGB = (
    (226, 160, 148), (214, 192, 184), (192, 178, 158), (178, 150, 138), (222, 206, 178), (198, 164, 140),
    (182, 178, 170), (206, 150, 120), (186, 190, 200), (172, 130, 102), (146, 106, 80), (120, 84, 62),
)  # fmt: skip

ABSORPTION = np.array((
    (0.22, 0.50, 0.76),
    (0.80, 1.00, 1.10),
    (0.80, 0.58, 0.36),
    (0.05, 0.40, 0.34),
    (1.00, 1.00, 1.00),
    (1.10, 1.00, 0.85),
), np.float32)  # fmt: skip
"""Optical density of one unit of each absorber below, for red, green and blue light."""
MELANIN, DENSE_MELANIN, BLUE_GREY, BLOOD, RELIEF, SHADE = range(len(ABSORPTION))


def draw_lesion(size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image and its true mask: (size, size, 3) uint8 RGB and (size, size) uint8 in {0, 1}.

    The lesion is one region without holes, about 3 to 45 % of the frame. Everything is drawn from `rng`.
    """
    side = size * SUPERSAMPLING
    depth, lesion = _lesion_region(side, rng)
    absorbers = _skin(side, rng)
    _add_lesion(absorbers, depth, lesion, rng)
    _add_spots(absorbers, lesion, rng)
    _add_shade(absorbers, rng)

    density = np.tensordot(ABSORPTION.T, absorbers, 1)
    picture = _skin_colour(rng)[:, None, None] * np.exp(-density)  # (3, side, side) until it is scaled down
    if rng.random() < 0.45:
        _lay_hair(picture, rng)
    if rng.random() < 0.2:
        _lay_ruler(picture, rng)
    if rng.random() < 0.25:
        _lay_bubbles(picture, rng)
    if rng.random() < 0.3:
        _lay_field_stop(picture, rng)
    picture = np.ascontiguousarray(picture.transpose(1, 2, 0))
    image = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    mask = cv2.resize(lesion.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) >= 0.5
    return _through_camera(image, rng), _largest_region(mask).astype(np.uint8)


def write_dataset(folder: Path, counts: dict[str, int], size: int, seed: int) -> None:
    """Draw `counts` images a split, e.g. `{"train": 240, "test": 80}`, into a dataset that launch/train.py reads.

    Writes images/*.jpg, masks/*.png (0 or 255), manifest.csv (id, split, image, mask: paths relative to `folder`) and
    dataset.json (the parameters). Sample i is drawn from the seed (seed, i), whatever the other counts. A dataset of
    these parameters is left as it is and one of others is replaced; the folder appears complete or not at all.

    Raises UserError where `folder` holds something that this function has not written.
    """
    drawn_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    parameters = json.dumps({"counts": counts, "size": size, "seed": seed, "drawn_by": drawn_by}, indent=2) + "\n"
    record = folder / "dataset.json"
    if record.is_file():
        if record.read_text() == parameters:
            return
    elif folder.exists():
        raise UserError(f"{folder}: holds something other than a drawn dataset; remove it or choose another folder")

    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "images").mkdir(parents=True)
    (aside / "masks").mkdir()
    with (aside / "manifest.csv").open("w", newline="") as file:
        manifest = csv.writer(file, lineterminator="\n")
        manifest.writerow(("id", "split", "image", "mask"))
        for index, split in enumerate(split for split, count in counts.items() for _ in range(count)):
            image, mask = draw_lesion(size, np.random.default_rng((seed, index)))
            row = (f"lesion_{index:05d}", split, f"images/lesion_{index:05d}.jpg", f"masks/lesion_{index:05d}.png")
            jpeg = (cv2.IMWRITE_JPEG_QUALITY, 95)
            blue_first = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
            (aside / row[2]).write_bytes(cv2.imencode(".jpg", blue_first, jpeg)[1].tobytes())
            (aside / row[3]).write_bytes(cv2.imencode(".png", mask * 255)[1].tobytes())
            manifest.writerow(row)
    (aside / "dataset.json").write_text(parameters)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


# --- the lesion and the skin, as fields -------------------------------------------------------------------------------


def _noise(side: int, cells: float, rng: Generator) -> np.ndarray:
    """(side, side) float32 smooth noise of about zero mean and unit deviation, `cells` bumps across the frame."""
    knots = int(np.ceil(cells)) + 1
    grid = rng.standard_normal((knots, knots), dtype=np.float32)
    stretched = round(knots * side / cells)
    field = cv2.resize(grid, (stretched, stretched), interpolation=cv2.INTER_CUBIC)
    # A random window, so that the knots of two layers do not fall together.
    top, left = rng.integers(0, stretched - side + 1, 2)
    return field[top : top + side, left : left + side] * 1.35  # interpolation averages: back to unit deviation


def _coordinates(side: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, side) and y (side, 1): pixel centres, in (0, 1)."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    return axis[None, :], axis[:, None]


def _blur(field: np.ndarray, radius: float) -> np.ndarray:
    return cv2.GaussianBlur(field, (0, 0), max(radius * field.shape[0], 0.3))


def _largest_region(region: np.ndarray) -> np.ndarray:
    """The largest connected part of a boolean (H, W) region, its holes filled."""
    outlines, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(region.shape, np.uint8)
    cv2.drawContours(filled, [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return filled.astype(bool)


def _lesion_region(side: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Depth (side, side) float32, 0 at the border, 1 at its deepest, negative outside; and the lesion, bool.

    Overlapping elliptic lobes with a noisy level set: rounded, lobed or notched, and never symmetric.
    """
    area = float(np.clip(MEDIAN_AREA * math.exp(rng.normal(0, 0.75)), *AREA_RANGE))
    radius = math.sqrt(area / math.pi)
    spread = 0.045 if rng.random() < 0.8 else 0.13
    centre = (0.5 + np.clip(rng.normal(0, spread, 2), -0.25, 0.25)).tolist()
    x, y = _coordinates(side)
    turn = rng.uniform(0, math.pi)
    stretch = math.exp(abs(rng.normal(0, 0.17)))
    notch = rng.random() < 0.25

    nearness = np.zeros((side, side), np.float32)
    for lobe in range(rng.integers(1, 5)):
        away = 0 if lobe == 0 else rng.uniform(0.3, 0.9) * radius
        bearing = rng.uniform(0, 2 * math.pi)
        lobe_radius = radius * (1.0 if lobe == 0 else rng.uniform(0.45, 0.8))
        dx = x - centre[0] - away * math.cos(bearing)
        dy = y - centre[1] - away * math.sin(bearing)
        along = (dx * math.cos(turn) + dy * math.sin(turn)) / (lobe_radius * stretch)
        across = (dy * math.cos(turn) - dx * math.sin(turn)) / (lobe_radius / stretch)
        nearness += np.exp(-(along**2 + across**2))
    if notch:
        bearing = rng.uniform(0, 2 * math.pi)
        dx = x - centre[0] - radius * math.cos(bearing)
        dy = y - centre[1] - radius * math.sin(bearing)
        nearness -= 0.7 * np.exp(-(dx**2 + dy**2) / (0.4 * radius) ** 2)

    height = np.log(np.maximum(nearness, 1e-4))
    height += rng.uniform(0.12, 0.32) * _noise(side, 1.0 / radius, rng)
    height += rng.uniform(0.05, 0.18) * _noise(side, 2.6 / radius, rng)
    height += rng.uniform(0.04, 0.12) * _noise(side, 7.0 / radius, rng)
    border = float(np.quantile(height, 1 - area))
    lesion = _largest_region(height > border)
    depth = (height - border) / (height.max() - border)
    return depth, lesion


def _add_lesion(absorbers: np.ndarray, depth: np.ndarray, lesion: np.ndarray, rng: Generator) -> None:
    """Add the lesion's pigment, fading over its border, to `absorbers` (absorber, side, side)."""
    side = lesion.shape[0]
    solid = lesion.astype(np.float32)
    # One lesion has sharp and fading stretches of border; both pass through half at the mask's outline.
    fading = np.clip(rng.uniform(-0.1, 1.2) + 0.4 * _noise(side, 3, rng), 0, 1)
    cover = (1 - fading) * _blur(solid, rng.uniform(0.004, 0.009)) + fading * _blur(solid, rng.uniform(0.015, 0.04))
    # Pigment thins out in grains, not as a mist.
    cover = np.clip(cover + 0.7 * cover * (1 - cover) * _noise(side, 44, rng), 0, 1)

    unevenness = rng.uniform(0.3, 1.0)
    mottle = rng.uniform(0.08, 0.22) * _noise(side, 9, rng) + rng.uniform(0.08, 0.22) * _noise(side, 30, rng)
    brown = rng.uniform(0.6, 1.4) * np.maximum(1 + unevenness * mottle, 0.15)
    brown *= 1 + rng.uniform(-0.2, 1.0) * np.clip(_blur(depth, 0.02), -0.2, 1)
    pattern = rng.choice(("network", "globules", "plain"), p=(0.4, 0.25, 0.35))
    if pattern == "network":
        # Where smooth noise crosses zero it draws a mesh of lines around paler holes.
        lines = np.exp(-((_noise(side, rng.uniform(36, 60), rng) / 0.5) ** 2))
        brown *= 1 + rng.uniform(0.3, 0.7) * np.clip(0.8 + 0.5 * _noise(side, 6, rng), 0, 1.2) * (lines - 0.5)
    elif pattern == "globules":
        brown += rng.uniform(0.5, 1.2) * np.clip(_noise(side, rng.uniform(32, 48), rng) - 0.8, 0, 1)

    softness = rng.uniform(0.25, 0.6)

    def patches(share: float, cells: float) -> np.ndarray:
        """A region of about `share` of the lesion, with a rough and soft edge."""
        field = _noise(side, cells, rng) + unevenness * (0.4 * _noise(side, 22, rng) + 0.2 * _noise(side, 40, rng))
        return 1 / (1 + np.exp((float(np.quantile(field[lesion], 1 - share)) - field) / softness))

    pigment = np.zeros_like(absorbers)
    pigment[MELANIN] = brown
    if rng.random() < 0.6:
        pigment[DENSE_MELANIN] = rng.uniform(0.3, 1.1) * patches(rng.uniform(0.15, 0.6), 6)
    if rng.random() < 0.25:
        pigment[BLUE_GREY] = rng.uniform(0.3, 0.8) * patches(rng.uniform(0.1, 0.4), 5)
    if rng.random() < 0.3:
        pigment[BLOOD] = rng.uniform(0.3, 1.0) * patches(rng.uniform(0.2, 0.8), 4)
    if rng.random() < 0.2:
        cover *= 1 - 0.75 * patches(rng.uniform(0.05, 0.2), 6)  # regression: the pigment is gone
    absorbers += pigment * cover
    if rng.random() < 0.3:
        absorbers[BLOOD] += rng.uniform(0.1, 0.35) * _blur(solid, 0.05)  # an inflamed surround


def _skin(side: int, rng: Generator) -> np.ndarray:
    """(absorber, side, side) float32: healthy skin about its mean: blotches, furrows, grain, a few vessels."""
    skin = np.zeros((len(ABSORPTION), side, side), np.float32)
    skin[BLOOD] = 0.05 * _noise(side, 3, rng) + rng.uniform(0.01, 0.07) * _noise(side, rng.uniform(10, 22), rng)
    skin[MELANIN] = rng.uniform(0.01, 0.05) * _noise(side, 6, rng) + rng.uniform(0.01, 0.045) * _noise(side, 36, rng)
    furrows = np.exp(-((_noise(side, rng.uniform(26, 46), rng) / 0.4) ** 2))
    grain = rng.standard_normal((side, side), dtype=np.float32)
    skin[RELIEF] = rng.uniform(0, 0.045) * furrows + rng.uniform(0.01, 0.03) * grain
    if rng.random() < 0.25:
        vessels = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(3, 14)):
            _draw_strand(vessels, rng.uniform(0, 1, 2), rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.2), 0.004, rng)
        skin[BLOOD] += rng.uniform(0.2, 0.6) * _blur(vessels.astype(np.float32) / 255, 0.004)
    return skin


def _add_spots(absorbers: np.ndarray, lesion: np.ndarray, rng: Generator) -> None:
    """Add freckles and small naevi to `absorbers`: pigment that is no part of the lesion."""
    side = lesion.shape[0]
    x, y = _coordinates(side)
    brown = np.zeros((side, side), np.float32)
    freckles = rng.integers(4, 30) if rng.random() < 0.3 else rng.integers(0, 4)
    naevi = rng.integers(1, 4) if rng.random() < 0.3 else 0
    outside = cv2.distanceTransform((~lesion).astype(np.uint8), cv2.DIST_L2, 3)
    for number in range(freckles + naevi):
        is_naevus = number >= freckles
        radius = rng.uniform(0.018, 0.036) if is_naevus else rng.uniform(0.006, 0.016)
        strength = rng.uniform(0.7, 1.9) if is_naevus else rng.uniform(0.2, 0.7)
        column, row = rng.integers(0, side, 2)
        stretch = rng.uniform(0.7, 1.3)
        if outside[row, column] < (2 * radius + 0.015) * side:
            continue
        distance = ((x - x[0, column]) / stretch) ** 2 + ((y - y[row, 0]) * stretch) ** 2
        brown += strength * np.exp(-((distance / radius**2) ** 1.5))
    absorbers[MELANIN] += brown * np.maximum(1 + 0.3 * _noise(side, 40, rng), 0)


def _add_shade(absorbers: np.ndarray, rng: Generator) -> None:
    """Add the lamp's unevenness to `absorbers`: a slope, and a fall-off towards the rim that leaves it bluer."""
    x, y = _coordinates(absorbers.shape[-1])
    bearing = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0, 0.16) * ((x - 0.5) * math.cos(bearing) + (y - 0.5) * math.sin(bearing))
    middle = rng.normal(0.5, 0.05, 2).tolist()
    rim = (x - middle[0]) ** 2 + (y - middle[1]) ** 2
    absorbers[SHADE] = slope + (rng.uniform(0.7, 1.4) if rng.random() < 0.2 else rng.uniform(0.0, 0.4)) * rim


def _skin_colour(rng: Generator) -> np.ndarray:
    """(3,) float32 reflectance: a tone between two of the palette, times exposure and white balance."""
    first, second = rng.choice(len(SKIN_RGB), 2)
    blend = rng.uniform(0, 0.4)
    tone = (1 - blend) * np.array(SKIN_RGB[first]) + blend * np.array(SKIN_RGB[second])
    return (tone / 255 * np.exp(rng.normal(0.06, 0.08) + rng.normal(0, 0.025, 3))).astype(np.float32)


# --- what lies between the skin and the camera ------------------------------------------------------------------------


def _draw_strand(canvas: np.ndarray, start: np.ndarray, bearing: float, length: float, width: float,
                 rng: Generator) -> None:  # fmt: skip
    """A curved line that tapers to both ends, white on a uint8 `canvas`; `start` is (x, y) in fractions of the side."""
    side = canvas.shape[0]
    t = np.linspace(0, 1, 24)
    headings = bearing + rng.normal(0, 0.7) * (t - 0.5) + rng.normal(0, 0.12) * np.sin(2 * np.pi * t)
    steps = np.stack((np.cos(headings), np.sin(headings)), 1)
    spine = start + np.cumsum(steps, 0) * length / len(t)
    half = (width / 2 * np.minimum(1, 8 * t + 0.4) * (1 - t) ** 0.6)[:, None] * steps[:, ::-1] * (-1, 1)
    outline = np.concatenate((spine + half, (spine - half)[::-1])) * side
    cv2.fillPoly(canvas, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)


def _paint(picture: np.ndarray, stencil: np.ndarray, colour: np.ndarray, opacity: float) -> None:
    """Lay `colour` over `picture` (3, side, side), in place, where the uint8 `stencil` is white."""
    alpha = stencil.astype(np.float32) * np.float32(opacity / 255)
    picture += alpha * (colour.astype(np.float32)[:, None, None] - picture)


def _lay_hair(picture: np.ndarray, rng: Generator) -> None:
    """A few long hairs, a coat of them, or the stubble of a shaved field; mostly dark, combed one way or not at all."""
    side = picture.shape[-1]
    stencil = np.zeros((side, side), np.uint8)
    kind = rng.choice(("few", "many", "stubble"), p=(0.6, 0.22, 0.18))
    count = {"few": rng.integers(1, 9), "many": rng.integers(12, 38), "stubble": rng.integers(6, 40)}[kind]
    lengths = (0.03, 0.10) if kind == "stubble" else (0.25, 0.95)
    combed = rng.uniform(0, 2 * np.pi)
    disorder = rng.choice((0.25, 0.6, 3.0))
    width = rng.uniform(0.0035, 0.0075)
    for _ in range(count):
        bearing = rng.normal(combed, disorder)
        length = rng.uniform(*lengths)
        middle = rng.uniform(-0.05, 1.05, 2)
        start = middle - 0.5 * length * np.array((np.cos(bearing), np.sin(bearing)))
        _draw_strand(stencil, start, bearing, length, width * rng.uniform(0.6, 1.1), rng)
    dark, light = np.array((0.10, 0.07, 0.06)), np.array((0.42, 0.26, 0.14))
    _paint(picture, stencil, dark + rng.beta(0.8, 2.0) * (light - dark), rng.uniform(0.65, 0.95))


def _lay_ruler(picture: np.ndarray, rng: Generator) -> None:
    """A scale with ticks near the lower rim, as contact plates carry it."""
    side = picture.shape[-1]
    stencil = np.zeros((side, side), np.uint8)
    tilt = rng.choice((0.0, 0.05, -0.5, 0.6)) + rng.normal(0, 0.04)
    along, across = np.array((np.cos(tilt), np.sin(tilt))), np.array((np.sin(tilt), -np.cos(tilt)))
    length = rng.uniform(0.4, 0.6)
    start = np.array((rng.uniform(0.35, 0.65), rng.uniform(0.85, 0.93))) - along * length / 2

    def line(a: np.ndarray, b: np.ndarray) -> None:
        first, last = (tuple(np.round(point * side * 16).astype(int).tolist()) for point in (a, b))
        cv2.line(stencil, first, last, 255, 1, cv2.LINE_AA, shift=4)

    line(start, start + along * length)
    for tick in range(21):
        foot = start + along * length * tick / 20
        line(foot, foot + across * (0.036 if tick % 10 == 0 else 0.018))
    _paint(picture, stencil, np.array((0.22, 0.17, 0.16)), rng.uniform(0.6, 0.9))


def _lay_bubbles(picture: np.ndarray, rng: Generator) -> None:
    """Air in the immersion fluid: bright specks, and a few rings with a highlight."""
    side = picture.shape[-1]
    stencil = np.zeros((side, side), np.uint8)
    cluster = rng.uniform(0.1, 0.9, 2)
    for _ in range(rng.integers(5, 30)):
        x, y = (rng.normal(cluster, 0.2) * side * 16).astype(int).tolist()
        cv2.circle(stencil, (x, y), int(rng.uniform(0.001, 0.005) * side * 16), 255, cv2.FILLED, cv2.LINE_AA, shift=4)
    for _ in range(rng.integers(0, 4)):
        x, y = (rng.normal(cluster, 0.15) * side * 16).astype(int).tolist()
        radius = int(rng.uniform(0.012, 0.035) * side * 16)
        cv2.circle(stencil, (x, y), radius, 110, 1, cv2.LINE_AA, shift=4)
        glint = (x - radius // 2, y - radius // 2)
        cv2.circle(stencil, glint, radius // 5, 255, cv2.FILLED, cv2.LINE_AA, shift=4)
    _paint(picture, stencil, np.array((0.97, 0.97, 1.0)), rng.uniform(0.5, 0.9))


def _lay_field_stop(picture: np.ndarray, rng: Generator) -> None:
    """The dermatoscope's round field of view: corners as dark as a lesion."""
    x, y = _coordinates(picture.shape[-1])
    middle = rng.normal(0.5, 0.02, 2).tolist()
    distance = np.hypot(x - middle[0], y - middle[1])
    softness = float(rng.choice((0.003, 0.012, 0.04)))
    outside = 1 / (1 + np.exp(-np.clip((distance - rng.uniform(0.50, 0.70)) / softness, -30, 30)))
    picture += outside * (np.float32(rng.uniform(0.01, 0.10)) - picture)


def _through_camera(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Focus, sensor noise, 8 bits and JPEG: (H, W, 3) float32 to uint8."""
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.25, 0.65))
    image = image * 255 + rng.uniform(0.5, 2.0) * rng.standard_normal(image.shape, dtype=np.float32)
    pixels = np.clip(np.round(image), 0, 255).astype(np.uint8)
    quality = int(rng.integers(70, 95))
    encoded = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))[1]
    # No conversion to BGR and back: this pass is there for its block noise alone.
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    assert decoded is not None  # what was encoded here
    return decoded
