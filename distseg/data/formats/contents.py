"""What a file of an annotation tool holds, in the project's own terms."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distseg.data.decode import Decoding
from distseg.data.formats.images import Picture
from distseg.data.sample import SPLITS
from distseg.errors import BadFileError, UserError

Mask = NDArray[np.uint8]
"""(H, W) class ids; 255 is to be ignored."""
IGNORE = 255
BACKGROUND = "background"
IGNORED = "ignore"
"""The names that the two values have in every format; nnU-Net's words."""
MOST_CLASSES = 254
REFERENCE = "reference"
ANNOTATION = "annotation"
PROPOSAL = "proposal"
"""The role of a mask that nobody has drawn yet: to be corrected by whoever opens the tool, and read by no format."""
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Source:
    """A file or folder to be imported, and what its user says about it."""

    path: Path
    images: Path | None
    """The folder with the images; where it is None, the one that the annotations lie in."""
    role: str | None
    """Whose masks they are, for a format that does not say: reference, annotation or annotation:NAME."""
    decoding: Decoding

    @property
    def images_folder(self) -> Path:
        return self.images or (self.path if self.path.is_dir() else self.path.parent)

    @property
    def given_role(self) -> str:
        """Raises UserError where the user has to say."""
        if self.role is None:
            raise UserError(
                f"{self.path}: does not say whose masks it holds: add --as reference for an expert's, --as "
                "annotation for cheap ones, or --as annotation:NAME for those of one annotator"
            )
        return self.role


@dataclass(frozen=True)
class Item:
    """One image with its masks."""

    id: str
    split: str
    """train, val, test, or empty where nobody has said."""
    picture: Picture
    masks: dict[str, Mask]
    """By role; each of the picture's size."""
    group: str = ""
    overlapping: int = 0
    """Pixels in which objects of several classes lay over each other."""
    unmarked: bool = False
    """Whether the file has nothing at all for it."""


@dataclass(frozen=True)
class Contents:
    classes: tuple[str, ...]
    """The name of each id; background is 0."""
    items: Iterator[Item]
    """Read as they are asked for, so that one image is in memory at a time. Raises BadFileError for what is broken."""
    count: int
    unmarked: int = 0
    """How many items are unmarked: the file cannot say whether they show nothing or were not looked at."""
    unannotated: int = 0
    """Images that the tool says nobody has annotated; they are not among the items."""


class Canvas:
    """A mask onto which objects are painted in the order in which the file has them; a later one covers an earlier."""

    def __init__(self, size: tuple[int, int]) -> None:
        width, height = size
        self.mask: Mask = np.zeros((height, width), np.uint8)
        self._touched = np.zeros((height, width), bool)
        self._overlapping = np.zeros((height, width), bool)

    def paint(self, shape: NDArray[np.bool_], class_id: int) -> None:
        """Give the pixels of `shape` (H, W) a class."""
        self._overlapping |= shape & self._touched & (self.mask != class_id)
        self.mask[shape] = class_id
        self._touched |= shape

    @property
    def overlapping(self) -> int:
        return int(self._overlapping.sum())


def number_classes(names: Iterable[str], where: Path | str) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes in the order of `names` with background first, and the id of each name; names may occur twice.

    A class called background is id 0 and one called ignore is 255, in any case of letters. Raises BadFileError.
    """
    classes, ids = [BACKGROUND], dict[str, int]()
    for name in names:
        if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise BadFileError(
                f"{where}: the class name {name[:_LONGEST_NAME]!r} must be of 1 to {_LONGEST_NAME} printable letters"
            )
        if name.casefold() in (BACKGROUND, IGNORED):
            ids[name] = 0 if name.casefold() == BACKGROUND else IGNORE
        elif name not in ids:
            ids[name] = len(classes)
            classes.append(name)
    if len(classes) > MOST_CLASSES:
        raise BadFileError(f"{where}: has {len(classes)} classes, above {MOST_CLASSES}, which masks of 8 bits can hold")
    return tuple(classes), ids


def named_values(classes: tuple[str, ...]) -> dict[str, int]:
    """The id of each class by name, without background, and ignore as 255, last: what an exported file may hold.

    Raises UserError for a class whose name would be read back as another.
    """
    for name in classes[1:]:
        if name.casefold() in (BACKGROUND, IGNORED):
            raise UserError(f"data.classes: the name {name} means something else in annotation tools; choose another")
    return {name: id for id, name in enumerate(classes) if id} | {IGNORED: IGNORE}


def written_names(values: dict[str, int], ignored: bool) -> list[str]:
    """The names of `named_values` that a file has to list: ignore only if a mask has such pixels."""
    return [name for name in values if name != IGNORED or ignored]


def split_named(word: str) -> str:
    """train, val or test if a subset's name says so, as train2017 and validation do; else empty."""
    plain = word.casefold().rstrip("0123456789")
    known = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
    plain = known.get(plain, plain)
    return plain if plain in SPLITS else ""
