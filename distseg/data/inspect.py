"""A strict look at single files, once before training: decoded completely, of a known kind, and what they show."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose

from distseg.data.classes import IGNORE, UnnamedValues, grey_step, is_wide_grey
from distseg.data.decode import Decoding, content_of, opened, orientation_of, turn_of
from distseg.data.png import lacks_rows
from distseg.errors import BadFileError

_COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_SHOWN_VALUES = 5
_AS_BINARY = "or save it with background as 0 and lesion as 255, and nothing else"
_MEND = (
    "say what the values mean (data.classes={background: 0, lesion: [1, 2]}, data.ignore=[255]), part greys by "
    f"data.threshold=128, {_AS_BINARY}"
)
_MEND_OF_COLOURS = f"""say what they mean (data.classes={{background: "#000000", lesion: "#ff0000"}}), {_AS_BINARY}"""
_JPEG = (
    "is a JPEG, which does not keep values; save it as PNG from what it was made of, or set data.threshold=128 for two "
    "classes"
)
_PADDING = 64
"""Bytes that some cameras leave before the end of a JPEG, when all of it has been decoded."""
THUMBNAIL = 16
"""Side of the thumbnails that are kept of every file, pixels: 768 bytes an image, 256 a mask."""
TILE = 48
"""Side of the tiles that the report shows, pixels."""
_LEAST_DRAWN = 4 * THUMBNAIL
"""Pixels of a side that a JPEG is at least drawn with, where it has them."""


@dataclass(frozen=True)
class ImageFacts:
    size: tuple[int, int]
    """(width, height) as it is trained on."""
    orientation: int
    """The EXIF orientation, 1 to 8."""
    digest: str
    """SHA-256 of the file."""
    thumbnail: bytes = b""
    """(16, 16, 3) uint8 RGB, squashed, each pixel the mean of its area."""
    tile: bytes = b""
    """A JPEG of 48×48 pixels, squashed, to be looked at: about a kilobyte."""


@dataclass(frozen=True)
class MaskFacts:
    size: tuple[int, int]
    lit: float
    """The share of the labelled pixels that are lesion, or of any class but background."""
    lit_border: float
    """The share of the frame's outermost pixels that are lesion."""
    digest: str
    """SHA-256 of the file."""
    shares: tuple[float, ...]
    """The share of each class among the labelled pixels."""
    thumbnail: bytes
    """(16, 16) uint8, squashed: the share of each pixel's area that is no background, 255 the whole."""


@dataclass(frozen=True)
class _Decoded:
    image: Image.Image
    """As it is stored, of a JPEG a reduced one."""
    facts: ImageFacts
    is_jpeg: bool
    grey_step: int
    turn: Transpose | None
    """What is left to do to the pixels."""

    def turned(self, image: Image.Image) -> Image.Image:
        return image if self.turn is None else image.transpose(self.turn)


def inspect_image(path: Path, decoding: Decoding) -> ImageFacts:
    """Decode the whole file. Raises BadFileError that says what is wrong.

    Wrong are also 16 bits a channel, CMYK, transparency and several pages, which decoders treat each in its own way.
    """
    decoded = _decode_strictly(path, decoding)
    pixels = np.asarray(decoded.turned(decoded.image.convert("RGB")))
    tile = cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", tile[..., ::-1])[1].tobytes()
    return replace(decoded.facts, thumbnail=_thumbnail(tile), tile=jpeg)


def inspect_mask(path: Path, decoding: Decoding) -> tuple[MaskFacts, NDArray[np.uint8]]:
    """As `inspect_image`, of a mask, which must hold nothing but what the keys of `data` give a class.

    Without these keys it must be binary: {0, 255} or {0, 1}, grey values or palette indices. With the facts (H, W)
    class ids as they are trained on, 255 = ignore; of a JPEG those of a reduced picture.
    """
    decoded = _decode_strictly(path, decoding, is_mask=True)
    mask, classes = decoded.image, decoding.classes
    if classes.is_plain:
        lit = _strictly_binary(path, decoded)
        ids = lit.view(np.uint8)
    else:
        if decoded.is_jpeg and classes.threshold is None:
            raise BadFileError(f"{path}: mask {_JPEG}")
        try:
            classes.check_one_lesion(mask, decoded.grey_step)
            ids = classes.ids(mask, decoded.grey_step)
        except UnnamedValues as error:
            raise BadFileError(f"{path}: mask {error}") from None
        lit = (ids > 0) & (ids != IGNORE)
    if decoded.turn is not None:
        ids = np.asarray(decoded.turned(Image.fromarray(ids)))
        lit = (ids > 0) & (ids != IGNORE)
    counts = _counts(ids, classes.is_plain)
    labelled = max(sum(counts[:IGNORE]), 1)
    facts = decoded.facts
    return MaskFacts(
        facts.size,
        np.count_nonzero(lit) / labelled,
        float(_border(lit).mean()),
        facts.digest,
        tuple(count / labelled for count in counts[: len(classes.names)]),
        _thumbnail(255 * lit.view(np.uint8)),
    ), ids


def _counts(ids: NDArray[np.uint8], binary: bool) -> list[int]:
    """The pixels of each id, from 0 on."""
    if binary:
        lit = int(np.count_nonzero(ids))
        return [ids.size - lit, lit]
    return Image.fromarray(ids).histogram()


def _values_in(pixels: NDArray[np.uint8]) -> set[int]:
    top, lit = int(pixels.max()), int(np.count_nonzero(pixels))
    if top == 0:
        return {0}
    if np.count_nonzero(pixels == top) == lit:  # of a sound mask, for a tenth of a histogram's time
        return {0, top} if lit < pixels.size else {top}
    return set(np.flatnonzero(np.bincount(pixels.ravel())).tolist())


def _strictly_binary(path: Path, decoded: _Decoded) -> NDArray[np.bool_]:
    """Where a mask that must be binary is lit."""
    mask = decoded.image
    grey = mask if mask.mode in ("1", "L", "P") else mask.convert("L")
    pixels = np.asarray(grey).view(np.uint8)
    values = _values_in(pixels)
    if not (values <= {0, 1} or values <= {0, 255}):
        colours = _colours(mask)
        mend = f"it {_JPEG}" if decoded.is_jpeg else _MEND_OF_COLOURS if colours else _MEND
        held = _few(colours or [str(value) for value in sorted(values)])
        raise BadFileError(f"{path}: mask is not binary: it holds {held}; {mend}")
    if mask.mode == "P" and any((value > 0) != _is_lit(mask.getpalette() or [], value) for value in values):
        raise BadFileError(f"{path}: its palette does not draw background black and lesion lit; save it as grey 0/255")
    return pixels > 0


def _decode_strictly(path: Path, decoding: Decoding, is_mask: bool = False) -> _Decoded:
    """The decoded image and what is known of the whole; values of 16 bits only of masks whose values have classes."""
    content = content_of(path, decoding)
    with opened(path, decoding, content) as image:
        if image.format == "PNG":
            image.verify()  # every chunk's checksum; loading looks at none
            if lacks_rows(content):
                raise BadFileError(f"{path}: has fewer rows than its header says; fetch it again")
    with opened(path, decoding, content) as image:
        values_have_classes = is_mask and not decoding.classes.is_plain
        if (wide := _wide_samples(image)) is not None and not (values_have_classes and is_wide_grey(image)):
            classes = "name its grey values in data.classes, or " if is_mask and is_wide_grey(image) else ""
            raise BadFileError(f"{path}: stores {wide}; {classes}save it with 8 bits a channel")
        if image.mode not in _COLOUR_MODES and wide is None:
            raise BadFileError(f"{path}: its colours are {image.mode}; save it as RGB or grey")
        pages, of_one_page = getattr(image, "n_frames", 1), ("JPEG", "MPO")  # phones keep a preview after a JPEG
        if pages > 1 and image.format not in of_one_page:
            raise BadFileError(f"{path}: has {pages} pages; save the one that is meant as a file of its own")
        step, is_jpeg = grey_step(image), image.format in of_one_page
        orientation, turn, (width, height) = orientation_of(image), turn_of(image, decoding), image.size
        if is_jpeg:
            picture = Image.fromarray(_decode_jpeg(path, content, image.mode))
        else:
            image.load()
            _check_palette_and_alpha(path, image)
            picture = image.copy()
        if turn in (Transpose.TRANSPOSE, Transpose.TRANSVERSE, Transpose.ROTATE_90, Transpose.ROTATE_270):
            width, height = height, width
        facts = ImageFacts((width, height), orientation, hashlib.sha256(content).hexdigest())
        return _Decoded(picture, facts, is_jpeg, step, turn)


def _decode_jpeg(path: Path, content: bytes, mode: str) -> NDArray[np.uint8]:
    """The picture at 1/8, or larger where that is tiny: every coefficient is read and few pixels are drawn.

    PIL's decoder fills in grey where scan data are damaged; libjpeg-turbo's warnings say where that was.
    """
    height, width, *_ = simplejpeg.decode_jpeg_header(content)

    def decoded(strict: bool) -> NDArray[np.uint8]:
        pixels = simplejpeg.decode_jpeg(
            content,
            "GRAY" if mode == "L" else "RGB",
            min_height=min(height, max(height // 8, _LEAST_DRAWN)),
            min_width=min(width, max(width // 8, _LEAST_DRAWN)),
            strict=strict,
        )
        return pixels.reshape(pixels.shape[:2]) if mode == "L" else pixels

    try:
        return decoded(strict=True)
    except ValueError as error:
        padding = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error))
        if padding is None or int(padding[1]) > _PADDING:
            raise BadFileError(f"{path}: cannot be decoded: damaged or truncated: {error}; fetch it again") from None
        return decoded(strict=False)


def _check_palette_and_alpha(path: Path, image: Image.Image) -> None:
    if image.mode == "P" and (palette := image.getpalette()) is not None:
        highest = int(np.asarray(image).max())
        if highest >= len(palette) // 3:
            raise BadFileError(
                f"{path}: uses colour {highest} of a palette of {len(palette) // 3}; save it again as grey or RGB"
            )
    has_alpha = "A" in image.mode or "transparency" in image.info
    if has_alpha and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
        raise BadFileError(f"{path}: parts of it are transparent; save it without an alpha channel")


def _wide_samples(image: Image.Image) -> str | None:
    """What is wider than 8 bits a channel; PIL reduces some such files as it loads them."""
    tiles = getattr(image, "tile", [])
    raw = [str(argument) for tile in tiles for argument in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if any(";16" in argument or argument == "65535" for argument in raw) or image.mode.startswith("I;16"):
        return "16 bits a channel"
    if image.mode in ("I", "F"):
        return "32 bits a channel" if image.format != "PNG" else "16 bits a channel"
    return None


def _is_lit(palette: list[int], index: int) -> bool:
    red, green, blue = palette[3 * index : 3 * index + 3]
    return 299 * red + 587 * green + 114 * blue >= 1000  # a grey value of 1, the least that every decoder shows


def _colours(mask: Image.Image) -> list[str]:
    """The colours of a mask, the most frequent ones first; none of one that stores greys or shows nothing else."""
    if mask.mode not in ("RGB", "RGBA", "LA", "PA"):
        return []
    pixels = np.asarray(mask.convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    if (colours == colours[:, :1]).all():
        return []
    return [f"the colour #{bytes(colours[n]).hex()}" for n in np.argsort(-counts, kind="stable")]


def _few(values: list[str]) -> str:
    shown = ", ".join(values[:_SHOWN_VALUES])
    return f"{shown}, …" if len(values) > _SHOWN_VALUES else shown


def _thumbnail(pixels: "NDArray[np.uint8] | cv2.typing.MatLike") -> bytes:
    return cv2.resize(pixels, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).tobytes()


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
