"""Logits at the files' own resolution against bilinear interpolation by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distseg.data.decode import PLAIN
from distseg.data.geometry import Frame
from distseg.data.sample import Sample
from distseg.errors import BadFileError
from distseg.evaluation.own_resolution import OwnResolution, at_own_resolution

FRAMES = [Frame(24), Frame(24, "letterbox"), Frame(24, "crop", 0.4), Frame(24, "crop", 1.5), Frame(24, "crop")]


def by_hand(logits: np.ndarray, frame: Frame, height: int, width: int) -> np.ndarray:
    """Each pixel of the file from the four of its picture that surround its centre; beyond the outermost, those."""
    place = frame.place(height, width)
    picture = logits[place.top : place.top + place.height, place.left : place.left + place.width].astype(np.float64)

    def along(own: int, drawn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        centre = np.clip((np.arange(own) + 0.5) * drawn / own - 0.5, 0, drawn - 1)
        before = np.floor(centre).astype(int)
        return before, np.minimum(before + 1, drawn - 1), centre - before

    top, bottom, down = along(height, place.height)
    left, right, across = along(width, place.width)
    upper = picture[top][:, left] * (1 - across) + picture[top][:, right] * across
    lower = picture[bottom][:, left] * (1 - across) + picture[bottom][:, right] * across
    return upper * (1 - down)[:, None] + lower * down[:, None]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(70, 101), (101, 70), (15, 20), (24, 24), (1, 9)])
def test_each_pixel_of_the_file_is_interpolated_about_the_same_centre(frame, height, width):
    place = frame.place(height, width)
    logits = torch.randn(2, *place.canvas, generator=torch.Generator().manual_seed(0))
    actual = at_own_resolution(logits, place, height, width)
    expected = np.stack([by_hand(channel.numpy(), frame, height, width) for channel in logits])
    np.testing.assert_allclose(actual.numpy(), expected, atol=2e-4)  # places are float32 there


def write(folder: Path, number: int, height: int, width: int) -> tuple[Sample, np.ndarray]:
    mask = np.random.default_rng(number).integers(0, 2, (height, width), np.uint8)
    Image.fromarray(mask * 255).save(folder / f"{number}.png")
    return Sample(f"{number}", "test", folder / f"{number}.png", folder / f"{number}.png"), mask


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", ["squash", "letterbox"])
def test_counts_are_those_of_each_file_in_its_row(tmp_path, shape, channels):
    frame = Frame(24, shape)
    sizes = [(int(h), int(w)) for h, w in np.random.default_rng(9).integers(5, 90, (7, 2))]
    samples, masks = zip(*(write(tmp_path, n, *size) for n, size in enumerate(sizes)), strict=True)
    logits = torch.randn(7, channels, 24, 24, generator=torch.Generator().manual_seed(1))
    rows = [range(1, 4), range(4, 6)]  # a rank's share
    given = iter(rows)

    def predict(images):
        positions = next(given)
        return logits[positions.start : positions.stop]

    own = OwnResolution(predict, samples, rows, frame, PLAIN, threads=2)
    for positions in rows:
        images = torch.zeros(len(positions), 3, 24, 24)
        assert torch.equal(own(images), logits[positions.start : positions.stop])
    own.close()
    for n, mask in enumerate(masks):
        drawn = np.stack([by_hand(channel.numpy(), frame, *mask.shape) for channel in logits[n]])
        found = drawn[0] > 0 if channels == 1 else drawn.argmax(axis=0) > 0
        cells = [found & (mask == 1), found & (mask == 0), ~found & (mask == 1), ~found & (mask == 0)]
        expected = [int(cell.sum()) for cell in cells] if 1 <= n < 6 else [0] * 4
        assert own.counts[n].tolist() == expected


def test_a_mask_that_breaks_is_named_and_reading_stops(tmp_path):
    sample, _ = write(tmp_path, 0, 30, 30)
    sample.truth.write_bytes(b"no image")
    own = OwnResolution(lambda images: images[:, :1], [sample], [range(1)], Frame(24), PLAIN, threads=1)
    with pytest.raises(BadFileError, match=r"0\.png"):
        own(torch.zeros(1, 3, 24, 24))
    own.close()
