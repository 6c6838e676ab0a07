"""Files into pixels on the CPU: what is truncated or no image raises, where other decoders fill in grey.

inspect.py looks harder, once before training; the readers here are what both loaders, the cache and the noise use.
"""

import errno
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distseg.data.classes import IGNORE, PLAIN_CLASSES, ClassMap, UnnamedValues, grey_step
from distseg.data.geometry import Frame
from distseg.data.jpeg import plain_pixels as plain_jpeg
from distseg.data.jpeg import plain_size as plain_jpeg_size
from distseg.data.png import plain_pixels as plain_png
from distseg.data.png import with_pixels_stored
from distseg.data.resize import resize_mask
from distseg.errors import BadFileError

# What both loaders can decode; PIL would open more.
FORMATS = ("JPEG", "JPEG2000", "PNG", "BMP", "TIFF", "PPM", "WEBP")
MAX_SIDE = 2**16
"""Pixels; a picture of one row takes seconds and gigabytes to reduce."""
_ORIENTATION = 0x0112
_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
"""Where PIL looks for the orientation of a JPEG."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
}
_UNDONE = _TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused here, and at a lower bound


@dataclass(frozen=True)
class Decoding:
    """How files are read: the keys of `data` that concern decoding."""

    orientation: Literal["apply", "ignore"] = "apply"
    """Whether pixels are turned as a file's EXIF orientation says."""
    max_file_bytes: int = 2**29
    max_pixels: int = 2**26
    max_scans: int = 100
    classes: ClassMap = PLAIN_CLASSES
    """What the values of a mask mean."""


PLAIN = Decoding()


def read_image(path: Path, decoding: Decoding = PLAIN) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB. Raises BadFileError where the file is missing or no image."""
    with opened(path, decoding) as image:
        turn = turn_of(image, decoding)
        colours = _as_mode(image, "RGB")
        return np.array(colours if turn is None else colours.transpose(turn))


def read_mask(path: Path, decoding: Decoding = PLAIN) -> NDArray[np.uint8]:
    """(H, W) uint8 class ids, 255 = ignore. Raises BadFileError as `read_image` does, and for values without a class.

    The plain binary map takes for 1 whatever is not black.
    """
    content = content_of(path, decoding)
    # A PNG is inflated by png.py, to the same pixels in two thirds of the time, and a grey one decoded without PIL.
    stored = with_pixels_stored(content, decoding.max_pixels)
    plain = plain_png(stored) if stored is not content else None
    if plain is not None:
        with _named(path, decoding):
            return _mask_of_grey(plain, decoding)
    with opened(path, decoding, stored) as image:
        step = grey_step(image)  # first: EXIF of a PNG is read by loading it
        turn = turn_of(image, decoding)
        if not decoding.classes.is_plain:
            ids = decoding.classes.ids(image, step)
            return ids if turn is None else np.asarray(Image.fromarray(ids).transpose(turn))
        grey = _as_mode(image, "L")
        return (np.asarray(grey if turn is None else grey.transpose(turn)) > 0).view(np.uint8)


def _mask_of_grey(grey: NDArray[np.uint8], decoding: Decoding) -> NDArray[np.uint8]:
    if decoding.classes.is_plain:
        return (grey > 0).view(np.uint8)
    return decoding.classes.ids(Image.fromarray(grey), 1)


def read_resized_image(path: Path, frame: Frame, decoding: Decoding = PLAIN) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, the canvas of `frame`, resampled with an antialiasing filter.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves at least twice the size that is needed: the inverse DCT
    averages as a box filter would, for a third of the time.
    """
    return read_canvas(path, frame, decoding)[0]


def read_reduced(path: Path, frame: Frame, decoding: Decoding = PLAIN) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """(h, w, 3) uint8 RGB: what `read_canvas` resamples, and the (height, width) that the whole picture has.

    Of a JPEG they may be 1/2, 1/4 or 1/8 of it, rounded up; not of one that is turned, whose last pixel, which lies
    partly outside, would come first.
    """
    with opened(path, decoding) as image:
        turn = turn_of(image, decoding)
        if image.format == "TIFF":
            image.load()
        own = _turned_size(image, turn)
        place = frame.place(*own)
        if turn is None:
            image.draft(None, (2 * place.width, 2 * place.height))
        colours = _as_mode(image, "RGB")
        return np.array(colours if turn is None else colours.transpose(turn)), own


def read_canvas(path: Path, frame: Frame, decoding: Decoding = PLAIN) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """`read_resized_image`, and the (height, width) that the whole picture has."""
    content = content_of(path, decoding)
    whole = _small_jpeg(content, frame, decoding)
    if whole is not None:
        place = frame.place(*whole.shape[:2])
        resized = Image.fromarray(whole).resize((place.width, place.height), Image.Resampling.BILINEAR)
        return place.laid(np.array(resized), frame.image_fill), (whole.shape[0], whole.shape[1])
    with opened(path, decoding, content) as image:
        turn = turn_of(image, decoding)
        if image.format == "TIFF":
            image.load()  # which turns it
        own = _turned_size(image, turn)
        place = frame.place(*own)
        size = (place.height, place.width) if turn in _SIDEWAYS else (place.width, place.height)
        drafted = image.draft(None, (2 * size[0], 2 * size[1]))  # does nothing to other formats
        # Where a side is no multiple of the reduction, the last reduced pixel lies partly outside the picture.
        extent = drafted[1] if drafted else None
        # A triangle filter widened to the scale, which is DALI's too; cv2 has no antialiased linear filter.
        reduced = _as_mode(image, "RGB").resize(size, Image.Resampling.BILINEAR, box=extent)
        picture = np.array(reduced if turn is None else reduced.transpose(turn))
    return place.laid(picture, frame.image_fill), own


def _small_jpeg(content: bytes, frame: Frame, decoding: Decoding) -> NDArray[np.uint8] | None:
    """(H, W, 3) uint8 RGB of a plain JPEG that is too small to be reduced as it is decoded; None for all others."""
    size = plain_jpeg_size(content)
    if size is None or size[0] * size[1] > decoding.max_pixels or max(size) > MAX_SIDE:
        return None
    place = frame.place(*size)
    can_be_reduced = size[0] >= 4 * place.height and size[1] >= 4 * place.width
    return None if can_be_reduced else plain_jpeg(content)


def read_picture(path: Path, decoding: Decoding = PLAIN) -> Image.Image:
    """The whole picture, turned as it is to be, in PIL's memory and the file's own mode. Raises BadFileError.

    For a picture of which parts are wanted and whose copies would be large: `rgb_window`.
    """
    with opened(path, decoding) as image:
        turn = turn_of(image, decoding)
        image.load()
        return image if turn is None else image.transpose(turn)


def rgb_window(picture: Image.Image, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3) uint8 RGB, which must lie within `picture`."""
    return np.array(_as_mode(picture.crop((left, top, left + width, top + height)), "RGB"))


def read_resized_mask(path: Path, frame: Frame, decoding: Decoding = PLAIN) -> NDArray[np.uint8]:
    """(H, W) uint8 class ids, 255 = ignore, padding too: each pixel has the class of most of its area.

    A tie goes to the lowest id.
    """
    mask = read_mask(path, decoding)
    place = frame.place(*mask.shape)
    return place.laid(resize_mask(mask, place.height, place.width), IGNORE)


def read_size(path: Path, decoding: Decoding = PLAIN) -> tuple[int, int]:
    """(height, width) as `read_image` gives it, by the file's header."""
    with opened(path, decoding) as image:
        turn = turn_of(image, decoding)
        if image.format == "TIFF":
            image.load()
        return _turned_size(image, turn)


def stored_pixels(path: Path, decoding: Decoding = PLAIN) -> int:
    """How many a file has, by its header alone. Raises BadFileError."""
    with opened(path, decoding) as image:
        return image.width * image.height


def _turned_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """(height, width) once it is turned."""
    width, height = image.size
    return (width, height) if turn in _SIDEWAYS else (height, width)


@contextmanager
def opened(path: Path, decoding: Decoding, content: bytes | None = None) -> Iterator[Image.Image]:
    """The image in `content`, or else in the file, with its header read.

    Whatever goes wrong in the block is a BadFileError that names the file.
    """
    content = content_of(path, decoding) if content is None else content
    if Image.MAX_IMAGE_PIXELS is not None and decoding.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = decoding.max_pixels  # PIL would refuse twice its own bound; ours is the stricter
    with _named(path, decoding), Image.open(BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width * height > decoding.max_pixels or max(width, height) > MAX_SIDE:
            raise BadFileError(f"{path}: {_bomb(f'{width}×{height}', decoding)}")
        yield image


def content_of(path: Path, decoding: Decoding) -> bytes:
    """The bytes of a regular file of a sane size. Raises BadFileError."""
    with _named(path, decoding):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise BadFileError(f"{path}: is {kind}; put the image there or take its row out of the data")
        if status.st_size == 0:
            raise BadFileError(f"{path}: the file is empty; fetch it again")
        if status.st_size > decoding.max_file_bytes:
            raise BadFileError(
                f"{path}: has {status.st_size:,} bytes, above data.max_file_bytes ({decoding.max_file_bytes:,}); "
                "reduce the picture, or set a larger data.max_file_bytes if it is sound"
            )
        content = path.read_bytes()
        if content.startswith(b"\xff\xd8") and (scans := content.count(b"\xff\xda")) > decoding.max_scans:
            raise BadFileError(
                f"{path}: a JPEG of {scans:,} scans, above data.max_scans ({decoding.max_scans:,}); save it again as "
                "baseline JPEG"
            )
        return content


@contextmanager
def _named(path: Path, decoding: Decoding) -> Iterator[None]:
    try:
        yield
    except BadFileError:
        raise
    except Image.DecompressionBombError:
        raise BadFileError(f"{path}: {_bomb('more than that', decoding)}") from None
    except UnnamedValues as error:
        raise BadFileError(f"{path}: mask {error}") from None
    except FileNotFoundError:
        raise BadFileError(f"{path}: no such file") from None
    except UnidentifiedImageError:  # its text has the address of a buffer, another in every process
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadFileError(
            f"{path}: cannot be decoded: it is no {kinds}, or its header is damaged; fetch it again, or save it as PNG"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            raise BadFileError(f"{path}: its symbolic links lead in a circle") from None
        text = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise BadFileError(f"{path}: cannot be decoded: {text}; fetch it again") from None


def _bomb(size: str, decoding: Decoding) -> str:
    return (
        f"a decompression bomb: {size}, above data.max_pixels ({decoding.max_pixels:,}) or {MAX_SIDE:,} on a side; "
        "reduce it or take its row out of the data"
    )


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def orientation_of(image: Image.Image) -> int:
    """1 to 8; 1, as stored, also where the tag is missing, 0 (undefined) or no orientation."""
    if image.format == "JPEG" and not _METADATA & image.info.keys():
        return 1  # PIL would set up a table of tags to find none in
    tag = image.getexif().get(_ORIENTATION, 1)
    return tag if tag in _TURNS else 1


def turn_of(image: Image.Image, decoding: Decoding) -> Image.Transpose | None:
    """What is left to do to the pixels as PIL gives them, to be asked for before they are loaded.

    PIL turns TIFF by itself, and no other format.
    """
    orientation = orientation_of(image)
    turned_by_pil = image.format == "TIFF"
    if (decoding.orientation == "apply") == turned_by_pil:
        return None
    return (_UNDONE if turned_by_pil else _TURNS).get(orientation)
