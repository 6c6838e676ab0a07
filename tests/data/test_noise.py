import csv
import subprocess
import sys

import cv2
import numpy as np
import pytest

from distseg.config import DataConfig, NoiseConfig
from distseg.data.decode import read_mask
from distseg.data.manifest import read_samples, split_clean
from distseg.data.noise import box, corrupt, polygon, write_noisy_masks
from distseg.data.seeding import generator


def draw_ellipse(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros((60, 80), np.uint8)
    centre, axes = rng.integers((30, 20), (50, 40)), rng.integers(8, 20, 2)
    return cv2.ellipse(mask, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 360, 1, -1)


MASKS = [draw_ellipse(seed) for seed in range(10)]


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour outside it; the frame's outside counts as outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner & 1


def corners(drawn: np.ndarray) -> np.ndarray:
    contours, _ = cv2.findContours(drawn, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    (hull,) = [cv2.convexHull(contour).reshape(-1, 2) for contour in contours]
    return hull


@pytest.mark.parametrize("mask", MASKS)
def test_polygon_corners_lie_on_the_true_contour(mask):
    hull = corners(polygon(mask, 3, generator(0)))
    x, y = hull.T
    assert boundary(mask)[y, x].sum() >= 3  # the rest of the hull is the raster of the straight edges
    assert not np.any(polygon(mask, 3, generator(0)) & ~cv2.dilate(mask, np.ones((3, 3))) & 1)


@pytest.mark.parametrize("mask", MASKS)
def test_polygon_approaches_a_convex_mask_from_below(mask):
    areas = [polygon(mask, n, generator(0)).sum() for n in (3, 7, 10_000)]
    assert 0 < areas[0] < areas[1] < mask.sum()
    np.testing.assert_array_equal(polygon(mask, 10_000, generator(0)), mask)


def test_polygon_vertices_are_at_equal_arc_length():
    square = np.zeros((50, 50), np.uint8)
    square[10:41, 10:41] = 1  # the contour is 120 pixels long, so four clicks are 30 apart: a turned square
    for seed in range(5):
        drawn = polygon(square, 4, generator(seed))
        (x0, y0), (x1, y1) = corners(drawn).min(axis=0), corners(drawn).max(axis=0)
        assert (x0, y0, x1, y1) == (10, 10, 40, 40)


def test_polygon_takes_the_largest_component_and_fills_holes():
    mask = np.zeros((60, 60), np.uint8)
    cv2.circle(mask, (15, 15), 10, 1, -1)
    cv2.circle(mask, (45, 45), 13, 1, -1)
    mask[44:47, 44:47] = 0
    drawn = polygon(mask, 1000, generator(0))
    assert drawn[:30, :30].sum() == 0
    assert drawn[45, 45] == 1
    assert box(mask)[5:59, 5:59].all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2), (1, 5), (5, 1)])
def test_tiny_masks_survive(shape):
    mask = np.zeros((9, 9), np.uint8)
    mask[3 : 3 + shape[0], 2 : 2 + shape[1]] = 1
    for seed in range(5):
        drawn = polygon(mask, 7, generator(seed))
        assert 0 < drawn.sum() <= mask.sum()
        assert not np.any(drawn > mask)
    np.testing.assert_array_equal(box(mask), mask)


def test_empty_masks_stay_empty():
    empty = np.zeros((8, 8), np.uint8)
    assert polygon(empty, 3, generator(0)).sum() == 0
    assert box(empty).sum() == 0


def test_box_is_exact():
    mask = np.zeros((20, 30), np.uint8)
    mask[4, 7] = mask[15, 9] = mask[8, 21] = 1
    expected = np.zeros_like(mask)
    expected[4:16, 7:22] = 1
    np.testing.assert_array_equal(box(mask), expected)


def test_corrupt_is_a_pure_function_of_seed_and_id():
    mask, before = MASKS[0], MASKS[0].copy()
    config = NoiseConfig(kind="polygon", vertices=3)
    drawn = corrupt(mask, config, "a")
    np.testing.assert_array_equal(corrupt(mask, config, "a"), drawn)
    np.testing.assert_array_equal(mask, before)
    assert np.any(corrupt(mask, config, "b") != drawn)
    assert np.any(corrupt(mask, NoiseConfig(kind="polygon", seed=1), "a") != drawn)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(corrupt(mask, NoiseConfig(kind="box"), "a"), box(mask))


def test_random_numbers_do_not_depend_on_the_process():
    program = "from distseg.data.seeding import generator; print(generator(3, 'noise', 'ISIC_1').random())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) == generator(3, "noise", "ISIC_1").random()


def test_written_masks_are_what_corrupt_says_and_a_rerun_is_byte_identical(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset()), seed=0)
    _, noisy = split_clean(samples, 3, seed=0)
    config, folder = NoiseConfig(kind="polygon", vertices=3, seed=4), tmp_path / "noisy"
    written, rate = write_noisy_masks(noisy, config, folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}

    (folder / f"{noisy[0].id}.png").unlink()  # a run killed on the way, and its order changed
    again, again_rate = write_noisy_masks(noisy[::-1], config, folder)
    assert (again[::-1], again_rate) == (written, pytest.approx(rate))
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert second.keys() == first.keys() == {"manifest.csv", *(f"{s.id}.png" for s in noisy)}
    assert all(second[name] == first[name] for name in first if name != "manifest.csv")
    write_noisy_masks(noisy, config, folder)
    assert (folder / "manifest.csv").read_bytes() == first["manifest.csv"]

    rates = []
    with (folder / "manifest.csv").open() as file:
        for sample, before, row in zip(written, noisy, csv.DictReader(file), strict=True):
            expected = corrupt(read_mask(sample.mask), config, sample.id)
            stored = cv2.imread(str(sample.noisy_mask), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(stored, expected * 255)
            assert (sample.id, sample.image, sample.mask) == (before.id, before.image, before.mask)
            rates.append(np.mean(expected != read_mask(sample.mask)))
            assert (row["id"], row["kind"], row["parameters"], row["seed"]) == (sample.id, "polygon", "vertices=3", "4")
            assert float(row["wrong_pixel_rate"]) == pytest.approx(rates[-1], abs=1e-6)
    assert 0 < rate == pytest.approx(np.mean(rates))


def test_kind_none_keeps_the_masks_that_the_data_brings(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset(noisy=True)), seed=0)  # its noisy masks are the complements
    assert write_noisy_masks(samples, NoiseConfig(), tmp_path / "noisy") == (samples, 1.0)
    assert not (tmp_path / "noisy").exists()


def test_kind_none_without_noisy_masks_is_no_noise(make_dataset, tmp_path):
    samples = read_samples(DataConfig(root=make_dataset()), seed=0)
    assert write_noisy_masks(samples, NoiseConfig(), tmp_path / "noisy") == (samples, 0.0)
