"""Storing the pixels changes how a mask is decoded and nothing of what comes out, errors included."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from distseg.data.png import plain_pixels, with_pixels_stored

MOST = 200_000


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(content: bytes) -> tuple | str:
    """What PIL makes of it: mode, pixels and palette, or that it refuses."""
    try:
        with Image.open(BytesIO(content)) as image:
            return image.mode, image.size, image.tobytes(), image.getpalette(), image.info.get("transparency")
    except (OSError, SyntaxError, ValueError, struct.error, UnidentifiedImageError):
        return "refused"


def blob(height: int = 41, width: int = 53) -> np.ndarray:
    row, column = np.mgrid[:height, :width]
    return ((row - 20) ** 2 + (column - 25) ** 2 < 200).astype(np.uint8)


def noise(most: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, most, (41, 53), np.uint8)


def palette(indices: np.ndarray, colours: int) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * colours, np.uint8).tolist())
    return image


def png(rows: bytes, width: int, height: int, depth=8, colour=0, interlaced=0, cuts=(), text: bytes = b"a\0b") -> bytes:
    """By hand, from filtered rows; `cuts` divide the deflated stream into several IDAT chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    stream = zlib.compress(rows)
    pieces = [stream[first:last] for first, last in zip((0, *cuts), (*cuts, None), strict=True)]
    data = b"".join(chunk(b"IDAT", piece) for piece in pieces)
    said = chunk(b"tEXt", text) if text else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + said + data + chunk(b"IEND", b"")


def filtered_rows(kind: int) -> bytes:
    residuals = np.random.default_rng(kind).integers(0, 256, (41, 53), np.uint8)
    return np.column_stack([np.full(41, kind, np.uint8), residuals]).tobytes()


MASKS = {
    "grey": encoded(Image.fromarray(blob() * 255)),
    "0 and 1": encoded(Image.fromarray(blob())),
    "noise": encoded(Image.fromarray(noise())),
    "one bit": encoded(Image.fromarray(blob() * 255).convert("1")),
    "palette of 2": encoded(palette(noise(2), 2), bits=1),
    "palette of 4": encoded(palette(noise(4), 4), bits=2),
    "palette of 16": encoded(palette(noise(16), 16), bits=4),
    "palette of 256": encoded(palette(noise(), 256)),
    "transparent colour": encoded(palette(noise(4), 4), transparency=2),
    "large": encoded(Image.fromarray(np.kron(blob(), np.full((7, 9), 255, np.uint8)))),
    "many chunks": png(filtered_rows(0), 53, 41, cuts=(1, 2, 700, 700)),
    **{f"filter {kind}": png(filtered_rows(kind), 53, 41) for kind in range(5)},
}
OTHERS = {
    "rgb": encoded(Image.fromarray(np.stack([noise()] * 3, axis=-1))),
    "grey with alpha": encoded(Image.fromarray(noise()).convert("LA")),
    "16 bits": encoded(Image.fromarray(noise().astype(np.uint16) * 257)),
    "jpeg": encoded(Image.fromarray(noise()), "JPEG"),
    "bmp": encoded(Image.fromarray(noise()), "BMP"),
    "empty": b"",
    "signature only": b"\x89PNG\r\n\x1a\n",
    "interlaced": png(filtered_rows(0), 53, 41, interlaced=1),
    "more than it may have": encoded(Image.fromarray(np.zeros((400, 501), np.uint8))),
    "more rows than it says": png(filtered_rows(0) + bytes(54), 53, 41),
    "fewer rows than it says": png(filtered_rows(0)[:-54], 53, 41),
    "a bomb": png(bytes(10**7), 10, 10),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_decodes_to_the_same_pixels_without_inflating(name):
    stored = with_pixels_stored(MASKS[name], MOST)
    assert stored != MASKS[name]
    assert len(stored) >= 41 * 53 // 8
    assert decoded(stored) == decoded(MASKS[name]) != "refused"
    with Image.open(BytesIO(stored)) as image:
        image.verify()  # every chunk's checksum


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_mask_comes_back_as_it_is(name):
    assert with_pixels_stored(OTHERS[name], MOST) is OTHERS[name]


PLAIN = {
    "grey": MASKS["grey"],
    "noise": MASKS["noise"],
    "large": MASKS["large"],
    **{f"filter {kind}": png(filtered_rows(kind), 53, 41, text=b"") for kind in range(5)},
}
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("name", PLAIN)
def test_grey_pixels_are_those_of_pil_and_so_is_damage(name):
    whole = PLAIN[name]
    pixels = plain_pixels(with_pixels_stored(whole, MOST))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(BytesIO(whole))))
    accepted = 0
    for at in range(len(whole)):
        damaged = whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :]
        stored = with_pixels_stored(damaged, MOST)
        if stored is not damaged and (pixels := plain_pixels(stored)) is not None:
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(BytesIO(damaged))))
            accepted += 1
    assert accepted <= 12, "none of the header or the rows"  # checksums of IDAT and IEND, which PIL does not look at


@pytest.mark.parametrize(
    "content",
    [
        *(MASKS[name] for name in ("one bit", "palette of 2", "palette of 256", "transparent colour", "filter 0")),
        encoded(Image.fromarray(blob() * 255), exif=TURNED),
    ],
)
def test_other_masks_are_for_pil(content):
    stored = with_pixels_stored(content, MOST)
    assert stored is not content and plain_pixels(stored) is None


@pytest.mark.parametrize("name", ["one bit", "palette of 16", "filter 4"])
def test_damage_is_seen_as_without_it(name):
    whole = MASKS[name]
    damaged = [whole[:length] for length in range(len(whole))]
    for bits in (1, 128):
        damaged += [whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :] for at in range(len(whole))]
    for content in damaged:
        assert decoded(with_pixels_stored(content, MOST)) == decoded(content)
