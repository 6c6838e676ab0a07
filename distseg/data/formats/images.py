"""The images that annotations speak of, found by name in a folder; no path from a file is ever opened."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from distseg.data.decode import Decoding, content_of, opened, turn_of
from distseg.data.layouts.pairing import image_files
from distseg.data.png import lacks_rows
from distseg.data.sample import fault_of_id
from distseg.errors import BadFileError, UserError
from distseg.text import for_terminal

_TRANSPOSING = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
)
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the name of an uploaded file."""
_SHOWN = 200


@dataclass(frozen=True)
class Picture:
    """An image file's bytes."""

    name: str
    """Where it comes from, for errors."""
    suffix: str
    content: bytes
    size: tuple[int, int]
    """(width, height) as it is displayed: turned as its orientation says, unless the decoding ignores that."""


def picture(name: str, content: bytes, decoding: Decoding) -> Picture:
    """Raises BadFileError for what is no image or too large; the pixels are not looked at."""
    path = Path(name)
    with opened(path, decoding, content) as image:
        turn, (width, height), kind = turn_of(image, decoding), image.size, str(image.format).lower()
    size = (height, width) if turn in _TRANSPOSING else (width, height)
    suffix = path.suffix.lower()
    return Picture(name, suffix if suffix[1:].isalnum() and suffix.isascii() else f".{kind}", content, size)


@contextmanager
def opened_whole(path: Path, decoding: Decoding, content: bytes) -> Iterator[Image.Image]:
    """`opened`, of a mask: raises BadFileError too where a PNG is damaged in a way that decoders fill in."""
    with opened(path, decoding, content) as image:
        if image.format == "PNG":
            image.verify()  # every chunk's checksum; loading looks at none
            if lacks_rows(content):
                raise BadFileError(f"{path}: has fewer rows than its header says; export it again")
    with opened(path, decoding, content) as image:
        yield image


def check_size(shown: Picture, size: tuple[int, int], what: str) -> None:
    """Raises BadFileError where annotations of `size` (width, height) are not of the picture's."""
    if size != shown.size:
        given, there = f"{size[0]}×{size[1]}", f"{shown.size[0]}×{shown.size[1]}"
        turned = (
            "; if it has an EXIF orientation, see data.orientation" if size == shown.size[::-1] != shown.size else ""
        )
        raise BadFileError(f"{what}: is for an image of {given}, but {shown.name} has {there}{turned}")


class ImageFolder:
    """The images below a folder."""

    def __init__(self, root: Path, decoding: Decoding) -> None:
        if not root.is_dir():
            raise UserError(f"--images {root}: no such folder")
        self._root = root
        self._decoding = decoding
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for path in image_files(root):
            self._by_name.setdefault(_composed(path.name), []).append(path)
            self._by_stem.setdefault(_composed(path.stem), []).append(path)

    def find(self, name: str, where: str) -> Path:
        """The file that `name`, a path of any kind, ends in; of several that with most of its folders.

        Where there is none, the eight digits are left out that Label Studio puts before an upload's name. Raises
        BadFileError that begins with `where`.
        """
        parts = _parts(name)
        for last in dict.fromkeys((parts[-1], UPLOAD_PREFIX.sub("", parts[-1]))) if parts else ():
            if found := self._by_name.get(last):
                return self._best(found, [*parts[:-1], last], name, where)
        raise self._missing(name, where)

    def find_stem(self, name: str, where: str) -> Path:
        """As `find`, for a name without its ending."""
        parts = _parts(name)
        if parts and (found := self._by_stem.get(parts[-1])):
            return self._best(found, parts, name, where)
        raise self._missing(name, where)

    def relative(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def open(self, path: Path) -> Picture:
        return picture(str(path), content_of(path, self._decoding), self._decoding)

    def _missing(self, name: str, where: str) -> BadFileError:
        shown = for_terminal(name[:_SHOWN])
        return BadFileError(f"{where}: its image {shown} is not in {self._root}; say where with --images FOLDER")

    def _best(self, found: list[Path], parts: list[str], name: str, where: str) -> Path:
        if len(found) == 1:
            return found[0]
        shared = [_shared(parts[:-1], _parts(self.relative(path))[:-1]) for path in found]
        best = [path for path, count in zip(found, shared, strict=True) if count == max(shared)]
        if len(best) > 1:
            raise BadFileError(
                f"{where}: its image {for_terminal(name[:_SHOWN])} may be {best[0]} or {best[1]}; name the folder with "
                "--images FOLDER"
            )
        return best[0]


def ids_of(names: Iterable[str], where: Path) -> dict[str, str]:
    """An id for each of `names`, paths without their endings: the last part, or if several have it the whole path.

    Raises BadFileError for a name that cannot be an id, and for names that are the same.
    """
    names = list(names)
    if len(set(names)) < len(names):
        name = next(name for name, count in Counter(names).items() if count > 1)
        raise BadFileError(f"{where}: has the image {for_terminal(name)} twice; keep one")
    last = Counter(PurePosixPath(name).name for name in names)
    ids = {
        name: _composed(PurePosixPath(name).name if last[PurePosixPath(name).name] == 1 else name.replace("/", "__"))
        for name in names
    }
    for name, id in ids.items():
        if (fault := fault_of_id(id)) is not None:
            raise BadFileError(f"{where}: image {for_terminal(name[:_SHOWN])}: {fault}; rename the image")
    if len(set(ids.values())) < len(ids):
        id = next(id for id, count in Counter(ids.values()).items() if count > 1)
        raise BadFileError(f"{where}: several images would have the id {id}; rename one")
    return ids


def without_suffix(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _composed(name: str) -> str:
    """macOS stores é as two letters, which the tables of other systems write as one."""
    return unicodedata.normalize("NFC", name)


def _parts(name: str) -> list[str]:
    return [_composed(part) for part in re.split(r"[/\\]", name) if part not in ("", ".")]


def _shared(first: list[str], second: list[str]) -> int:
    """How many parts the two have in common at their ends."""
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count
