"""Images and masks at network resolution, written once and read in place of large originals.

A cache is a folder of shards of up to 256 samples, each two .npy files: `images` (n, S, S, 3) uint8 RGB and `masks`
(m, S, S) uint8 class ids, 255 = padding, all of the samples' masks in the order of `Sample.files`; and index.json,
which says what it was made from (of each source file its path under the root, its size, its time of change and its
SHA-256) and each .npy file's SHA-256.

The pixels are those that the loaders would decode on the CPU, so that training from the cache is bit for bit training
from the originals. index.json is written last: without it there is no cache, only shards, which a restarted run keeps
where they are whole and their sources as they were.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from distseg.data.classes import IGNORE, ClassMap
from distseg.data.config import DataConfig
from distseg.data.decode import Decoding, read_resized_image, read_resized_mask
from distseg.data.geometry import Frame, Shape
from distseg.data.sample import FileKey, Problem, Sample, leaves_root
from distseg.errors import BadFileError, UserError
from distseg.files import write_atomically
from distseg.section import Section

FORMAT = 5
SHARD_SIZE = 256
Kind = Literal["images", "masks"]
_READERS: dict[Kind, Callable[[Path, Frame, Decoding], NDArray[np.uint8]]] = {
    "images": read_resized_image,
    "masks": read_resized_mask,
}

# Written over, the folder would be lost to the runs that it was made for.
_ANOTHER = "make another with launch/prepare.py --cache and the name of a new folder"


Stamp = tuple[int, int]
"""A file's size in bytes and time of change in nanoseconds."""
Source = tuple[str, int, int]
"""A file's path under the root, and its stamp."""


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Section):
    """What a shard's own record says, and index.json repeats."""

    name: Annotated[str, Field(pattern=r"^shard_\d{5}\.json$")]
    image_size: Annotated[int, Field(ge=1, le=8192)]
    shape: Shape
    orientation: Literal["apply", "ignore"]
    classes: str
    """ClassMap.key of the masks."""
    sha256: dict[Kind, Digest]
    """Of the arrays."""
    sources: Annotated[list[dict[FileKey, Source]], Field(min_length=1)]
    contents: list[dict[FileKey, Digest]]
    """The SHA-256 of each of `sources`."""

    @model_validator(mode="after")
    def _every_source_has_its_content(self) -> Self:
        if [each.keys() for each in self.sources] != [each.keys() for each in self.contents]:
            raise ValueError("sources and contents are of different files")
        return self

    def array(self, kind: Kind) -> str:
        return f"{Path(self.name).stem}_{kind}.npy"

    def rows(self, kind: Kind) -> list[Source]:
        """The source of each row of an array."""
        return [source for sample in self.sources for key, source in sample.items() if _kind_of(key) == kind]


class Index(Section):
    format: int
    image_size: Annotated[int, Field(ge=1, le=8192)]
    shape: Shape
    orientation: Literal["apply", "ignore"]
    classes: str
    left_out: list[tuple[str, str, str]]
    """Id, file and reason of what was bad."""
    shards: list[Shard]


class _Keys(NamedTuple):
    """What decides a cache's pixels, beside the files."""

    image_size: int
    shape: Shape
    orientation: str
    classes: ClassMap

    @classmethod
    def of(cls, config: DataConfig) -> Self:
        return cls(config.image_size, config.shape, config.orientation, config.class_map)


class _Version(BaseModel):
    format: int


class PixelCache:
    """An open cache: its arrays are mapped, not read, so that the ranks of a machine share them."""

    def __init__(
        self, rows: dict[Path, NDArray[np.uint8]], digests: dict[Path, str], left_out: Sequence[Problem]
    ) -> None:
        self._rows = rows
        self.digests = digests
        """The SHA-256 of each file that the cache was made from."""
        self.left_out = left_out
        """What was bad when the cache was made."""

    def find(self, path: Path) -> NDArray[np.uint8] | None:
        """(S, S, 3) of an image or (S, S) of a mask; None for a file that the cache was not made from."""
        return self._rows.get(path)

    def check_holds(self, samples: Sequence[Sample], folder: Path) -> None:
        """Raises UserError where a file of `samples` is missing."""
        missing = [path for sample in samples for path in sample.files.values() if path not in self._rows]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise _refusal(folder, f"does not hold {missing[0]}{more}")


def write_cache(
    samples: Sequence[Sample], left_out: Sequence[Problem], config: DataConfig, folder: Path, threads: int
) -> tuple[int, int]:
    """Fill `folder` from the files of `samples`; returns how many shards were written and how many were kept.

    Raises BadFileError for a file that cannot be decoded, and UserError where `folder` holds something else, or the
    finished cache of other keys.
    """
    if config.shape == "crop":
        raise UserError(
            "--cache: holds images of one size, which crops are not; leave it out, or set another data.shape"
        )
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    foreign = [path for path in folder.iterdir() if not path.name.lstrip(".").startswith(("index.json", "shard_"))]
    if foreign:
        raise UserError(f"--cache {folder}: holds {foreign[0].name}, no part of a cache; choose an empty folder")
    if index.exists():
        _check_is_not_anothers(folder, _Keys.of(config))
        index.unlink()
    for part in folder.glob(".*.part"):  # of a run that was killed
        part.unlink()
    cuts = [samples[first : first + SHARD_SIZE] for first in range(0, len(samples), SHARD_SIZE)]
    shards, kept = [], 0
    with ThreadPoolExecutor(threads) as pool:
        for number, cut in enumerate(cuts):
            name = f"shard_{number:05d}.json"
            sources = [_sources(sample, config.root) for sample in cut]
            shard = _whole_shard(folder, name, sources, config)
            kept += shard is not None
            shards.append(shard or _write_shard(folder, name, cut, sources, config, pool))
    for stale in set(folder.glob("shard_*.json")) - {folder / shard.name for shard in shards}:
        for path in folder.glob(f"{stale.stem}*"):
            path.unlink()
    content = Index(
        format=FORMAT,
        image_size=config.image_size,
        shape=config.shape,
        orientation=config.orientation,
        classes=config.class_map.key,
        left_out=[(problem.id, problem.file, problem.reason) for problem in left_out],
        shards=shards,
    )
    write_atomically(index, content.model_dump_json())
    return len(shards) - kept, kept


def _check_is_not_anothers(folder: Path, keys: _Keys) -> None:
    """Raises UserError for a finished cache of other keys, which some run may still need."""
    try:
        other = _made_otherwise(_index(folder), keys)
    except UserError:  # of no use to any run
        return
    if other:
        raise UserError(f"--cache {folder}: holds a cache that {other}; choose an empty folder")


def open_cache(config: DataConfig) -> PixelCache | None:
    """The cache that `config.cache` names, or None where it names none.

    Raises UserError where it is missing, damaged, of another image size, shape, orientation or classes, or made from
    other files than are under `config.root` now. Checked once per process.
    """
    if config.cache is None:
        return None
    return _open(config.cache, config.root, _Keys.of(config))


def _index(folder: Path) -> Index:
    """What a finished cache says. Raises UserError where it is none, or another version's."""
    try:
        content = (folder / "index.json").read_bytes()
        if _Version.model_validate_json(content).format != FORMAT:
            raise _refusal(folder, "was written by another version")
        return Index.model_validate_json(content)
    except (OSError, ValueError):
        raise _refusal(folder, "is no finished cache") from None


def _made_otherwise(index: Index, keys: _Keys) -> str | None:
    """With which other keys the cache was made; None where with these."""
    if index.image_size != keys.image_size:
        return f"was made at data.image_size {index.image_size}, not {keys.image_size}"
    if index.shape != keys.shape:
        return f"was made with data.shape {index.shape}, not {keys.shape}"
    if index.orientation != keys.orientation:
        return f"was made with data.orientation {index.orientation}, not {keys.orientation}"
    if index.classes != keys.classes.key:
        return "was made with other data.classes, data.ignore or data.threshold"
    return None


@lru_cache(maxsize=2)
def _open(folder: Path, root: Path, keys: _Keys) -> PixelCache:
    index = _index(folder)
    if other := _made_otherwise(index, keys):
        raise _refusal(folder, other, _ANOTHER)
    rows: dict[Path, NDArray[np.uint8]] = {}
    digests: dict[Path, str] = {}
    for shard in index.shards:
        for kind, digest in shard.sha256.items():
            rows |= _map_array(folder, root, shard, kind, digest, len(keys.classes.names))
        for sources, contents in zip(shard.sources, shard.contents, strict=True):
            digests |= {root / name: contents[kind] for kind, (name, *_) in sources.items()}
    return PixelCache(rows, digests, [Problem(*row) for row in index.left_out])


def _map_array(
    folder: Path, root: Path, shard: Shard, kind: Kind, digest: str, class_count: int
) -> dict[Path, NDArray[np.uint8]]:
    """The rows of one array by the files that they were made from."""
    path = folder / shard.array(kind)
    pixels = None
    if path.is_file() and _sha256(path) == digest:
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            pixels = None
    sources = shard.rows(kind)
    shape = (len(sources), shard.image_size, shard.image_size, *((3,) if kind == "images" else ()))
    sound = pixels is not None and pixels.dtype == np.uint8 and pixels.shape == shape
    if pixels is None or not sound or (kind == "masks" and _holds_no_class(pixels, class_count)):
        raise _refusal(folder, f"is damaged: {path.name}")
    pixels = np.asarray(pixels)  # a memmap's rows are slow to take
    rows = {}
    for row, (name, *stamp) in zip(pixels, sources, strict=True):
        if leaves_root(name):
            raise _refusal(folder, f"is damaged: {shard.name}")
        source = root / name
        if _stamp(source) != tuple(stamp):
            raise _refusal(folder, f"is not of this data: {source} is missing or has changed")
        rows[source] = row
    return rows


def _holds_no_class(masks: NDArray[np.uint8], class_count: int) -> bool:
    return bool(((masks >= class_count) & (masks != IGNORE)).any())


def _write_shard(
    folder: Path,
    name: str,
    samples: Sequence[Sample],
    sources: list[dict[FileKey, Source]],
    config: DataConfig,
    pool: ThreadPoolExecutor,
) -> Shard:
    frame, digests = config.frame, {}
    for kind, read in _READERS.items():
        paths = [path for sample in samples for key, path in sample.files.items() if _kind_of(key) == kind]
        content = io.BytesIO()
        pixels = [pool.submit(read, path, frame, config.decoding) for path in paths]
        np.save(content, np.stack([row.result() for row in pixels]), allow_pickle=False)
        write_atomically(folder / f"{Path(name).stem}_{kind}.npy", content.getvalue())
        digests[kind] = hashlib.sha256(content.getvalue()).hexdigest()
    contents = [{kind: _sha256(path) for kind, path in sample.files.items()} for sample in samples]
    shard = Shard(
        name=name,
        image_size=config.image_size,
        shape=config.shape,
        orientation=config.orientation,
        classes=config.class_map.key,
        sha256=digests,
        sources=sources,
        contents=contents,
    )
    write_atomically(folder / name, shard.model_dump_json())
    return shard


def _kind_of(key: FileKey) -> Kind:
    return "images" if key == "image" else "masks"


def _whole_shard(folder: Path, name: str, sources: list[dict[FileKey, Source]], config: DataConfig) -> Shard | None:
    """What a record says, where its shard was made from these files with these keys and is undamaged."""
    try:
        shard = Shard.model_validate_json((folder / name).read_bytes())
        expected = (name, config.image_size, config.shape, config.orientation, config.class_map.key, sources)
        made = (shard.name, shard.image_size, shard.shape, shard.orientation, shard.classes, shard.sources) == expected
        whole = all(_sha256(folder / shard.array(kind)) == digest for kind, digest in shard.sha256.items())
        return shard if made and whole else None
    except (OSError, ValueError):
        return None


def _sources(sample: Sample, root: Path) -> dict[FileKey, Source]:
    return {key: (str(path.relative_to(root)), *_stamp_of(path)) for key, path in sample.files.items()}


def _stamp_of(path: Path) -> Stamp:
    """Raises BadFileError where the file is missing."""
    stamp = _stamp(path)
    if stamp is None:
        raise BadFileError(f"{path}: no such file")
    return stamp


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(folder: Path, what: str, mend: str = "") -> UserError:
    return UserError(f"data.cache {folder}: {what}; {mend or f'make it with launch/prepare.py --cache {folder}'}")
