"""A JPEG decoded without PIL has PIL's pixels, and what PIL must look at is left to it."""

import random
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from distseg.data.decode import read_resized_image
from distseg.data.geometry import Frame
from distseg.data.jpeg import plain_pixels, plain_size


def picture(height: int = 53, width: int = 71) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def of_pil(content: bytes) -> np.ndarray:
    with Image.open(BytesIO(content)) as image:
        return np.array(image.convert("RGB"))


TURNED = Image.Exif()
TURNED[0x0112] = 6
PLAIN = {
    **{f"subsampling {kind}": encoded(picture(), subsampling=kind, quality=80) for kind in range(3)},
    "progressive": encoded(picture(), progressive=True),
    "restarts": encoded(picture(), restart_marker_rows=1),
    "grey": encoded(picture().convert("L")),
    "one pixel": encoded(picture(1, 1)),
    "odd": encoded(picture(97, 33), quality=30),
}
OTHERS = {
    "turned": encoded(picture(), exif=TURNED),
    "xmp": encoded(picture(), xmp=b"<x:xmpmeta/>"),
    "four channels": encoded(picture().convert("CMYK")),
    "png": b"\x89PNG",
    "header alone": PLAIN["grey"][:20],
    "empty": b"",
}


@pytest.mark.parametrize("name", PLAIN)
def test_pixels_are_those_of_pil_and_so_is_damage_that_is_not_seen(name: str) -> None:
    whole, rng = PLAIN[name], random.Random(0)
    expected = of_pil(whole)
    assert plain_size(whole) == expected.shape[:2]
    np.testing.assert_array_equal(plain_pixels(whole), expected)
    for _ in range(100):
        at = rng.randrange(len(whole))
        damaged = whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
        if plain_size(damaged) == expected.shape[:2] and (pixels := plain_pixels(damaged)) is not None:
            np.testing.assert_array_equal(pixels, of_pil(damaged))
    assert all(plain_pixels(whole[:length]) is None for length in range(2, len(whole) - 2, 7)), "truncated"


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_for_pil(name: str) -> None:
    assert plain_size(OTHERS[name]) is None


@pytest.mark.parametrize("size", [(53, 71), (64, 64), (255, 255), (256, 256), (300, 255)])
def test_resized_images_are_the_same_without_and_with_metadata(size: tuple[int, int], tmp_path) -> None:
    """Those with metadata are PIL's; from four times the frame on both are, which reduces them as it decodes."""
    upright = Image.Exif()
    upright[0x0112] = 1
    image = picture(*size)
    image.save(tmp_path / "plain.jpg")
    image.save(tmp_path / "exif.jpg", exif=upright)
    for frame in (Frame(64), Frame(64, "letterbox"), Frame(16, "crop", 0.5)):
        plain, exif = (read_resized_image(tmp_path / f"{name}.jpg", frame) for name in ("plain", "exif"))
        np.testing.assert_array_equal(plain, exif)
