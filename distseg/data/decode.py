"""Files into pixels on the CPU, strictly: what is truncated or no image raises, where other decoders fill in grey.

EXIF orientation is ignored by the readers and refused by the checks: masks are drawn on the stored pixels.
"""

import errno
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distseg.data.png import with_pixels_stored
from distseg.errors import BadFileError

# What both loaders can decode; PIL would open more.
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "TIFF", "PPM", "WEBP")
MAX_PIXELS = 2**26
"""8192²; more is refused unread, as a decompression bomb. The largest ISIC images have 6000×4000."""

_ORIENTATION = 0x0112
_COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused here, and at a lower bound


def read_image(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises BadFileError where the file is missing or no image."""
    with _opened(path) as image:
        return _rgb(image)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8 in {0, 1}: 1 where the grey value is not black. Raises BadFileError as `read_image` does."""
    with _opened(path) as image:
        return (_grey(image) > 0).astype(np.uint8)


def read_resized_image(path: Path, size: int) -> NDArray[np.uint8]:
    """(size, size, 3) uint8 RGB, squashed with an antialiasing filter.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves at least twice `size`: the inverse DCT averages as a box
    filter would, for a third of the time.
    """
    with _opened(path) as image:
        image.draft(None, (2 * size, 2 * size))  # does nothing to other formats
        colours = image if image.mode == "RGB" else image.convert("RGB")
        # A triangle filter widened to the scale, which is DALI's too; cv2 has no antialiased linear filter.
        return np.array(colours.resize((size, size), Image.Resampling.BILINEAR))


def read_resized_mask(path: Path, size: int) -> NDArray[np.uint8]:
    """(size, size) uint8 in {0, 1}: of each cell the source pixel under its centre."""
    with _opened(path, stored=True) as image:
        # Before it becomes an array: copying a large mask out of PIL takes half as long as decoding it.
        resized = image.resize((size, size), Image.Resampling.NEAREST)
    return (_grey(resized) > 0).astype(np.uint8)


def check_image(path: Path) -> tuple[int, int]:
    """Decode the whole file and return (width, height).

    Raises BadFileError that says what is wrong: also 16 bits a channel, CMYK, transparency and an EXIF orientation,
    which decoders treat each in its own way.
    """
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


@contextmanager
def _opened(path: Path, stored: bool = False) -> Iterator[Image.Image]:
    """The image with its header read; whatever goes wrong in the block is a BadFileError that names the file.

    With `stored`, a mask's PNG is inflated by png.py, to the same pixels in two thirds of the time.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise BadFileError(f"{path}: is {kind}; put the image there or take its row out of the data")
        if status.st_size == 0:
            raise BadFileError(f"{path}: the file is empty; fetch it again")
        source = BytesIO(with_pixels_stored(path.read_bytes(), MAX_PIXELS)) if stored else path
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadFileError(f"{path}: {_bomb(f'{width}×{height}')}")
            yield image
    except BadFileError:
        raise
    except Image.DecompressionBombError:
        raise BadFileError(f"{path}: {_bomb('more than that')}") from None
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise BadFileError(f"{path}: its symbolic links lead in a circle") from None
        text = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise BadFileError(f"{path}: cannot be decoded: {text}; fetch it again") from None


def _bomb(size: str) -> str:
    return f"a decompression bomb: {size}, above {MAX_PIXELS:,} pixels; reduce it or take its row out of the data"


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(image if image.mode == "L" else image.convert("L"))


def _decode_strictly(path: Path) -> tuple[Image.Image, tuple[int, int]]:
    """The decoded image, of a JPEG only a thumbnail, and the (width, height) of what is in the file."""
    with _opened(path) as image:
        if image.format == "PNG":
            image.verify()  # every chunk's checksum; loading looks at none
    with _opened(path) as image:
        size = image.size
        if (wide := _wide_samples(image)) is not None:
            raise BadFileError(f"{path}: stores {wide}; save it with 8 bits a channel")
        if image.mode not in _COLOUR_MODES:
            raise BadFileError(f"{path}: its colours are {image.mode}; save it as RGB or grey")
        orientation = image.getexif().get(_ORIENTATION, 1)
        if orientation != 1:
            raise BadFileError(
                f"{path}: its EXIF orientation is {orientation}; turn the stored pixels of image and mask alike and "
                "remove the tag"
            )
        image.draft(None, (size[0] // 8, size[1] // 8))  # JPEG only: reads every coefficient, draws few pixels
        image.load()
        if "A" in image.mode or "transparency" in image.info:
            least, _ = image.convert("RGBA").getchannel("A").getextrema()
            if least < 255:
                raise BadFileError(f"{path}: parts of it are transparent; save it without an alpha channel")
        return image.copy(), size


def _wide_samples(image: Image.Image) -> str | None:
    """What is wider than 8 bits a channel; PIL reduces some such files as it loads them."""
    raw = [str(argument) for tile in image.tile for argument in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if any(";16" in argument or argument == "65535" for argument in raw) or image.mode.startswith("I;16"):
        return "16 bits a channel"
    if image.mode in ("I", "F"):
        return "32 bits a channel" if image.format != "PNG" else "16 bits a channel"
    return None


def _is_lit(palette: list[int], index: int) -> bool:
    red, green, blue = palette[3 * index : 3 * index + 3]
    return 299 * red + 587 * green + 114 * blue >= 1000  # a grey value of 1, the least that every decoder shows


def _few(values: set[int]) -> str:
    shown = ", ".join(str(value) for value in sorted(values)[:5])
    return f"{shown}, …" if len(values) > 5 else shown
