"""Masks as PNG without waiting for zlib: most of a mask's decoding is inflating long runs of one value.

PIL inflates by the system's zlib, for which zlib 1.2.13 takes 2.5 ms of a mask of 1.5 megapixels and zlib-ng 0.1 ms. So
the pixels are inflated here and handed to PIL stored, which leaves it the rest: filters, palettes, bits, errors.
"""

import struct
from functools import reduce
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray
from zlib_ng import zlib_ng

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_BLOCK = 0xFFFF
_STRIP = 1 << 20
_DAMAGED = cast(type[Exception], zlib_ng.error)  # its stub calls it an instance
_MAY_TURN = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type."""


def with_pixels_stored(content: bytes, most_pixels: int) -> bytes:
    """A file that decodes to the same pixels, stored rather than deflated where `content` is a PNG as masks are.

    Those have one channel of up to 8 bits, are not interlaced and have at most `most_pixels`. All others come back as
    they are, as do those that are damaged: it is for the decoder to say what is wrong with them.
    """
    try:
        before, header, deflated, after = _parts(content)
        width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
    except (ValueError, struct.error):
        return content
    if colour not in (_GREY, _PALETTE) or depth > 8 or any(methods) or width * height > most_pixels:
        return content
    size = height * (1 + (width * depth + 7) // 8)  # each row has its filter before it
    inflate = zlib_ng.decompressobj()
    try:
        rows = inflate.decompress(deflated, size + 1)
    except _DAMAGED:
        return content
    if len(rows) != size or not inflate.eof:
        return content
    stored = _stored(rows)
    checksum = reduce(lambda crc, part: zlib_ng.crc32(part, crc), stored, zlib_ng.crc32(b"IDAT"))
    length = sum(map(len, stored))
    return b"".join([before, struct.pack(">I4s", length, b"IDAT"), *stored, struct.pack(">I", checksum), after])


def plain_pixels(stored: bytes) -> NDArray[np.uint8] | None:
    """(H, W) uint8 of a PNG that is nothing but grey values of 8 bits; for what `with_pixels_stored` has stored.

    None for all others, and where metadata may say how the picture is to be turned.
    """
    before, header, _, after = _parts(stored)
    width, height, depth, colour, *_ = struct.unpack(">IIBBBBB", header)
    if (depth, colour) != (8, _GREY) or any(kind in before or kind in after for kind in _MAY_TURN):
        return None
    pixels = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
    usable = pixels is not None and pixels.dtype == np.uint8 and pixels.shape == (height, width)
    return np.asarray(pixels, np.uint8) if usable else None


def _stored(content: bytes) -> list[bytes | memoryview]:
    """A zlib stream of blocks that are not compressed, in parts, to be copied once (RFC 1950, RFC 1951 §3.2.4)."""
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    for first in range(0, len(content), _BLOCK):
        block = memoryview(content)[first : first + _BLOCK]
        is_last = first + _BLOCK >= len(content)
        parts += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
    return [*parts, struct.pack(">I", zlib_ng.adler32(content))]


def _parts(content: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """What comes before the pixels, of that the header's fields, the deflated stream, and what comes after it.

    Raises ValueError or struct.error where `content` is no PNG or ends before IEND.
    """
    if not content.startswith(_SIGNATURE + b"\0\0\0\rIHDR"):
        raise ValueError("no PNG")
    pieces, at, kind = [], len(_SIGNATURE), b""
    first = last = 0
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if end > len(content):
            raise ValueError("truncated")
        if kind == b"IDAT" and last in (0, at):  # those that follow other chunks are not read
            first = first or at
            pieces.append(content[at + 8 : end - 4])
            last = end
        at = end
    return content[:first], content[16:29], b"".join(pieces), content[last:]


def lacks_rows(content: bytes) -> bool:
    """Whether a PNG's stream ends, as a sound stream does, before the rows that its header promises.

    Decoders fill in the rest. What is damaged in another way is for them to find; False then.
    """
    try:
        _, header, deflated, _ = _parts(content)
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    except (ValueError, struct.error):
        return False
    bits = depth * _CHANNELS.get(colour, 1)
    left = sum(
        rows * (1 + (columns * bits + 7) // 8)
        for rows, columns in (_interlaced(height, width) if interlaced else [(height, width)])
        if rows and columns
    )
    inflate = zlib_ng.decompressobj()
    try:
        while left > 0 and not inflate.eof:
            rows = inflate.decompress(deflated, min(left, _STRIP))
            if not rows and not inflate.unconsumed_tail:
                break
            deflated = inflate.unconsumed_tail
            left -= len(rows)
    except _DAMAGED:
        return False
    return left > 0


def _interlaced(height: int, width: int) -> list[tuple[int, int]]:
    """(rows, columns) of Adam7's seven passes (PNG specification, §8.2)."""
    starts_and_steps = [
        (0, 8, 0, 8),
        (0, 8, 4, 8),
        (4, 8, 0, 4),
        (0, 4, 2, 4),
        (2, 4, 0, 2),
        (0, 2, 1, 2),
        (1, 2, 0, 1),
    ]
    return [
        ((height - row + row_step - 1) // row_step, (width - column + column_step - 1) // column_step)
        for row, row_step, column, column_step in starts_and_steps
    ]
