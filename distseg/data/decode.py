"""Files into pixels on the CPU: what the noise, the torch loader and the error messages of both loaders read with.

EXIF orientation is ignored for image and mask alike: masks are drawn on the stored pixels and carry no EXIF themselves.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distseg.errors import BadFileError

# What both loaders can decode; PIL would open more.
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "TIFF", "PPM", "WEBP")


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises BadFileError where the file is missing or no image."""
    return cv2.cvtColor(_decode(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8 in {0, 1}: 1 where the grey value is not black. Raises BadFileError as `read_image` does."""
    return (_decode(path, cv2.IMREAD_GRAYSCALE) > 0).astype(np.uint8)


def check_image(path: Path) -> tuple[int, int]:
    """Decode the whole file strictly and return (width, height). Raises BadFileError that says what is wrong."""
    return _decode_strictly(path)[1]


def check_mask(path: Path) -> tuple[int, int]:
    """`check_image` for a mask, which must also be binary: {0, 255} or {0, 1}, as grey values or palette indices."""
    mask, size = _decode_strictly(path)
    grey = mask if mask.mode in ("1", "L", "P") else mask.convert("L")
    values = {value for value, count in enumerate(grey.histogram()) if count}
    if not (values <= {0, 1} or values <= {0, 255}):
        raise BadFileError(f"{path}: mask is not binary: it holds {_few(values)}; save it with 0 and 255 only")
    if mask.mode == "P" and any((value > 0) != _is_lit(mask.getpalette(), value) for value in values):
        raise BadFileError(f"{path}: its palette does not draw background black and lesion lit; save it as grey 0/255")
    return size


def _decode(path: Path, flags: int) -> NDArray[np.uint8]:
    try:
        encoded = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read: {error.strerror}") from None
    pixels = cv2.imdecode(encoded, flags | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    if pixels is None:
        raise BadFileError(f"{path}: not a readable image; replace the file or take its row out of the data")
    return pixels


def _decode_strictly(path: Path) -> tuple[Image.Image, tuple[int, int]]:
    """The decoded image, of a JPEG only a thumbnail, and the (width, height) of what is in the file."""
    # cv2 and DALI fill what a truncated JPEG lacks with grey and carry on; PIL raises.
    try:
        if path.stat().st_size == 0:
            raise BadFileError(f"{path}: the file is empty; fetch it again")
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            image.draft(None, (size[0] // 8, size[1] // 8))  # JPEG only: reads every coefficient, draws few pixels
            image.load()
            return image, size
    except BadFileError:
        raise
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise BadFileError(f"{path}: cannot be decoded: {' '.join(str(error).split())}; fetch it again") from None


def _is_lit(palette: list[int], index: int) -> bool:
    red, green, blue = palette[3 * index : 3 * index + 3]
    return 299 * red + 587 * green + 114 * blue >= 1000  # a grey value of 1, the least that every decoder shows


def _few(values: set[int]) -> str:
    shown = ", ".join(str(value) for value in sorted(values)[:5])
    return f"{shown}, …" if len(values) > 5 else shown
