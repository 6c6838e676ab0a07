"""Placements, windows and tiles against brute force."""

import numpy as np
import pytest
from PIL import Image

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.data.decode import read_resized_image, read_resized_mask, read_size
from distseg.data.geometry import PADDING, Frame, cut, tile_starts, tile_weights

RNG = np.random.default_rng(0)
SIZES = [tuple(int(side) for side in RNG.integers(1, 3000, 2)) for _ in range(60)]


def nearest(length: float) -> int:
    """The integer ≥ 1 that is nearest, of two the lower one."""
    return min(range(1, int(length) + 3), key=lambda whole: abs(whole - length))


def middle(first: int, length: int, canvas: int) -> None:
    """`first` is the place of `length` in `canvas` that has the least difference of margins, of two the upper one."""
    margins = [abs(place - (canvas - length - place)) for place in range(canvas - length + 1)]
    assert first == int(np.argmin(margins))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_letterbox_keeps_the_aspect_and_lies_in_the_middle(height, width):
    for size in (8, 65, 96):
        place = Frame(size, "letterbox").place(height, width)
        assert place.canvas == (size, size)
        assert max(place.height, place.width) == size
        assert place.height == nearest(size * height / max(height, width))
        assert place.width == nearest(size * width / max(height, width))
        middle(place.top, place.height, size)
        middle(place.left, place.width, size)


@pytest.mark.parametrize("scale", [0.25, 0.37, 1.0, 1.7])
def test_a_crop_has_one_scale_and_is_padded_where_the_network_takes_more(scale):
    for height, width in SIZES:
        place = Frame(96, "crop", scale).place(height, width)
        assert (place.height, place.width) == (nearest(height * scale), nearest(width * scale))
        assert place.canvas == (max(96, place.height), max(96, place.width))
        middle(place.top, place.height, place.canvas[0])
        middle(place.left, place.width, place.canvas[1])


def test_a_squashed_file_is_the_whole_canvas():
    place = Frame(96).place(1000, 37)
    assert (place.canvas, place.top, place.left, place.height, place.width) == ((96, 96), 0, 0, 96, 96)


@pytest.mark.parametrize("frame", [Frame(64, "letterbox"), Frame(64, "crop"), Frame(64, "crop", 0.4)], ids=str)
@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (20, 30), (64, 64)])
def test_what_the_picture_leaves_free_is_padding(tmp_path, frame, height, width):
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.full((height, width), 255, np.uint8)).save(tmp_path / "mask.png")
    image, mask = (
        read_resized_image(tmp_path / "image.png", frame),
        read_resized_mask(tmp_path / "mask.png", frame),
    )
    place = frame.place(height, width)
    inside = np.zeros(place.canvas, bool)
    inside[place.top : place.top + place.height, place.left : place.left + place.width] = True
    np.testing.assert_array_equal(mask, np.where(inside, 1, 255))
    np.testing.assert_array_equal(image, np.where(inside[..., None], 0, PADDING))


def test_padding_is_zero_to_the_network_to_half_a_grey_level():
    normalised = (np.array(PADDING) / 255 - CHANNEL_MEANS) / CHANNEL_DEVIATIONS
    assert np.abs(normalised).max() <= 0.5 / 255 / CHANNEL_DEVIATIONS.min()


def test_a_square_file_in_a_letterbox_is_that_file_squashed(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (130, 130, 3), np.uint8)
    for suffix in ("png", "jpg"):
        Image.fromarray(pixels).save(tmp_path / f"image.{suffix}")
        squashed, boxed = (
            read_resized_image(tmp_path / f"image.{suffix}", Frame(48, shape)) for shape in ("squash", "letterbox")
        )
        np.testing.assert_array_equal(squashed, boxed)
    Image.fromarray((pixels[..., 0] > 128).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    squashed, boxed = (read_resized_mask(tmp_path / "mask.png", Frame(48, shape)) for shape in ("squash", "letterbox"))
    np.testing.assert_array_equal(squashed, boxed)


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_the_place_is_that_of_the_picture_as_exif_turns_it(tmp_path, suffix, tag):
    """A file with the tag lies where a file without it lies, whose pixels have been turned."""
    stored = np.zeros((60, 100, 3), np.uint8)
    stored[:20, :40] = (200, 30, 90)
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(stored).save(tmp_path / f"turned.{suffix}", exif=exif)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    plain = Image.fromarray(stored)
    plain = plain.transpose(undo[tag]) if tag in undo else plain
    plain.save(tmp_path / "plain.png")
    assert read_size(tmp_path / f"turned.{suffix}") == plain.size[::-1]
    for frame in (Frame(40, "letterbox"), Frame(40, "crop", 0.5), Frame(40, "crop")):
        actual, expected = (
            read_resized_image(tmp_path / name, frame).astype(int) for name in (f"turned.{suffix}", "plain.png")
        )
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).mean() < 4
        assert suffix == "jpg" or np.abs(actual - expected).max() <= 1  # rows are resampled before columns


def test_every_window_comes_and_none_leaves_the_canvas():
    canvas = np.arange(12 * 9, dtype=np.uint8).reshape(12, 9)
    seen = set()
    for row in np.linspace(0, 1, 200, endpoint=False):
        for column in (0.0, 0.3, 0.5, 1 - 2**-53):
            window = cut(canvas, (float(row), column), 8)
            assert window.shape == (8, 8)
            top, left = divmod(int(window[0, 0]), 9)
            np.testing.assert_array_equal(window, canvas[top : top + 8, left : left + 8])
            seen.add((top, left))
    assert seen == {(top, left) for top in range(5) for left in range(2)}
    assert cut(canvas, None, 8) is canvas
    np.testing.assert_array_equal(cut(canvas[:8, :8], (0.99, 0.99), 8), canvas[:8, :8])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_the_fewest_tiles_cover_each_pixel_and_overlap(overlap):
    for size in (8, 33, 96):
        for length in [size, size + 1, *(int(n) for n in np.random.default_rng(size).integers(size, 20 * size, 60))]:
            starts = tile_starts(length, size, overlap)
            covered = np.zeros(length, int)
            for start in starts:
                covered[start : start + size] += 1
            assert starts[0] == 0 and starts[-1] == length - size
            assert covered.min() >= 1
            steps = np.diff(starts)
            assert (steps > 0).all() and (steps <= size * (1 - overlap)).all()
            assert (len(starts) - 2) * int(size * (1 - overlap)) < length - size or len(starts) == 1


def test_weights_are_a_tent_of_whole_numbers():
    assert tile_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert tile_weights(4).tolist() == [1, 2, 2, 1]
