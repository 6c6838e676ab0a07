"""JPEGs as most are, without PIL's parser, which holds Python's lock for longer than decoding a small picture takes."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_MAY_TURN = (b"Exif\0", b"http://ns.adobe.com/xap")
"""Where the orientation of a JPEG may stand."""
_COLOURS = ("YCbCr", "Gray")


def plain_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that `plain_pixels` may decode; None for all others, which are PIL's to look at.

    It has one or three channels and no metadata that may say how it is to be turned.
    """
    if not content.startswith(b"\xff\xd8\xff") or any(mark in content for mark in _MAY_TURN):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return (height, width) if colours in _COLOURS else None


def plain_pixels(content: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3) uint8 RGB, the pixels that PIL gives; None where libjpeg-turbo warns of anything."""
    try:
        return np.asarray(simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, strict=True))
    except ValueError:
        return None
