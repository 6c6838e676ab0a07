"""Drawn dermoscopy is reproducible, has the lesions it claims, and cannot be solved by a threshold."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from distseg.data import synthetic
from distseg.data.synthetic import draw_lesion, write_dataset
from distseg.errors import UserError

COUNTS = {"train": 4, "val": 1, "test": 2}
SIZE = 48


@pytest.fixture(scope="module")
def samples() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_lesion(64, np.random.default_rng((7, index))) for index in range(100)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", [31, 64, 128])
def test_image_and_mask_have_the_promised_form(size):
    for index in range(4):
        image, mask = draw_lesion(size, np.random.default_rng((size, index)))
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((size, size), np.uint8)
        assert set(np.unique(mask)) == {0, 1}


def test_a_seed_is_one_picture():
    first, again, other = (draw_lesion(SIZE, np.random.default_rng((seed, 5))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    assert (first[1] != other[1]).any()


def test_a_lesion_is_one_region_without_holes(samples):
    for _, mask in samples:
        outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        assert len(outlines) == 1, tree


def test_areas_are_those_of_dermoscopy(samples):
    areas = np.array([mask.mean() for _, mask in samples])
    # A region cut off at a bridge loses a little area, and the outline is that of pixels.
    assert 0.02 <= areas.min() < 0.05
    assert 0.30 < areas.max() <= 0.48
    assert 0.10 < np.median(areas) < 0.18


def test_most_lesions_stand_near_the_centre(samples):
    offsets = [np.hypot(*(np.argwhere(mask).mean(0) / 64 - 0.5)) for _, mask in samples]
    assert np.median(offsets) < 0.10
    assert max(offsets) > 0.15


def test_a_lesion_is_darker_than_the_skin_about_it(samples):
    for image, mask in samples:
        surround = cv2.dilate(mask, np.ones((9, 9))) - cv2.dilate(mask, np.ones((3, 3)))
        # The median, because hair crosses both.
        inside, outside = (np.median(image[region > 0].mean(1)) for region in (mask, surround))
        assert inside < 0.97 * outside


def test_skin_reaches_from_light_to_brown(samples):
    tones = [np.median(image[mask == 0].mean(1)) for image, mask in samples]
    assert min(tones) < 110
    assert max(tones) > 190


def test_a_threshold_does_not_solve_the_task(samples):
    scores = []
    for image, mask in samples:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        _, dark = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
        scores.append(2 * (dark & mask).sum() / (dark.sum() + mask.sum()))
    assert np.mean(scores) < 0.8
    assert np.quantile(scores, 0.2) < 0.6


def test_dataset_holds_what_the_manifest_says(tmp_path):
    write_dataset(tmp_path / "data", COUNTS, SIZE, seed=3)
    with (tmp_path / "data" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "split", "image", "mask"]
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val"] + ["test"] * 2
    assert len({row["id"] for row in rows}) == 7
    for index, row in enumerate(rows):
        image, mask = draw_lesion(SIZE, np.random.default_rng((3, index)))
        written = cv2.imread(str(tmp_path / "data" / row["image"]))[..., ::-1]
        assert np.abs(written.astype(int) - image).mean() < 4  # JPEG, and RGB where RGB belongs
        stored = cv2.imread(str(tmp_path / "data" / row["mask"]), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(stored, mask * 255)
    named = {row[key] for row in rows for key in ("image", "mask")} | {"manifest.csv", "dataset.json"}
    assert named == set(contents(tmp_path / "data"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_equal_parameters_give_equal_bytes(tmp_path):
    write_dataset(tmp_path / "a", COUNTS, SIZE, seed=3)
    write_dataset(tmp_path / "b", COUNTS, SIZE, seed=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_smaller_dataset_is_the_beginning_of_a_larger(tmp_path):
    write_dataset(tmp_path / "large", {"train": 4, "test": 1}, SIZE, seed=3)
    write_dataset(tmp_path / "small", {"train": 2}, SIZE, seed=3)
    large, small = contents(tmp_path / "large"), contents(tmp_path / "small")
    pictures = [name for name in small if name.startswith(("images", "masks"))]
    assert len(pictures) == 4
    assert all(small[name] == large[name] for name in pictures)


def test_a_complete_dataset_is_left_alone_and_another_replaced(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    write_dataset(folder, COUNTS, SIZE, seed=3)
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw_lesion", lambda *_: pytest.fail("drew what is there"))
        write_dataset(folder, COUNTS, SIZE, seed=3)
    assert contents(folder) == before

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthetic, "draw_lesion", interrupt)
        write_dataset(folder, {"train": 1}, SIZE, seed=4)
    assert contents(folder) == before

    write_dataset(folder, {"train": 1}, SIZE, seed=4)
    assert len(list((folder / "images").iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_write_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    calls = []

    def draw_then_stop(size, rng):
        calls.append(size)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_lesion(size, rng)

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw_lesion", draw_then_stop)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(folder, COUNTS, SIZE, seed=3)
    assert not folder.exists()

    write_dataset(folder, COUNTS, SIZE, seed=3)
    assert len(list((folder / "images").iterdir())) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"data: .*choose another folder"):
        write_dataset(folder, COUNTS, SIZE, seed=3)
    assert contents(folder) == {"thesis.txt": b"years of work"}
