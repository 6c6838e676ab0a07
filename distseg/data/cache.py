"""Images and masks at network resolution, written once and read in place of large originals.

A cache is a folder of shards of up to 256 samples, each two or three .npy files: `images` (n, S, S, 3) uint8 RGB,
`masks` (n, S, S) uint8 in {0, 1} and, where a sample has one, `noisy_masks` (n, S, S); and index.json, which says what
it was made from (of each source file its path under the root, its size and its time of change) and each .npy file's
SHA-256.

The pixels are those that the loaders would decode on the CPU, so that training from the cache is bit for bit training
from the originals. index.json is written last: without it there is no cache, only shards, which a restarted run keeps
where they are whole and their sources as they were.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distseg.data.config import DataConfig
from distseg.data.decode import read_resized_image, read_resized_mask
from distseg.data.sample import Problem, Sample
from distseg.errors import UserError
from distseg.files import write_atomically

FORMAT = 2
SHARD_SIZE = 256
_READERS: dict[str, Callable[[Path, int], NDArray[np.uint8]]] = {
    "image": read_resized_image,
    "mask": read_resized_mask,
    "noisy_mask": read_resized_mask,
}


class PixelCache:
    """An open cache: its arrays are mapped, not read, so that the ranks of a machine share them."""

    def __init__(self, rows: dict[Path, NDArray[np.uint8]], left_out: Sequence[Problem]) -> None:
        self._rows = rows
        self.left_out = left_out
        """What was bad when the cache was made."""

    def find(self, path: Path) -> NDArray[np.uint8] | None:
        """(S, S, 3) of an image or (S, S) of a mask; None for a file that the cache was not made from."""
        return self._rows.get(path)

    def check_holds(self, samples: Sequence[Sample], config: DataConfig) -> None:
        """Raises UserError where a file of `samples` is missing."""
        missing = [path for sample in samples for path in sample.files.values() if path not in self._rows]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise _refusal(config, f"does not hold {missing[0]}{more}")


def write_cache(
    samples: Sequence[Sample], left_out: Sequence[Problem], config: DataConfig, folder: Path, threads: int
) -> tuple[int, int]:
    """Fill `folder` from the files of `samples`; returns how many shards were written and how many were kept.

    Raises BadFileError for a file that cannot be decoded, and UserError where `folder` holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.json"
    foreign = [path for path in folder.iterdir() if not path.name.lstrip(".").startswith(("index.json", "shard_"))]
    if foreign:
        raise UserError(f"--cache {folder}: holds {foreign[0].name}, no part of a cache; choose an empty folder")
    index.unlink(missing_ok=True)
    for part in folder.glob(".*.part"):  # of a run that was killed
        part.unlink()
    cuts = [samples[first : first + SHARD_SIZE] for first in range(0, len(samples), SHARD_SIZE)]
    shards, kept = [], 0
    with ThreadPoolExecutor(threads) as pool:
        for number, cut in enumerate(cuts):
            stamps = [_stamps(sample, config.root) for sample in cut]
            record = folder / f"shard_{number:05d}.json"
            shard = _whole_shard(folder, record, stamps, config.image_size)
            kept += shard is not None
            shards.append(shard or _write_shard(folder, record, cut, stamps, config.image_size, pool))
    for stale in set(folder.glob("shard_*.json")) - {folder / shard["name"] for shard in shards}:
        for path in folder.glob(f"{stale.stem}*"):
            path.unlink()
    bad = [[problem.id, problem.file, problem.reason] for problem in left_out]
    content = {"format": FORMAT, "image_size": config.image_size, "left_out": bad, "shards": shards}
    write_atomically(index, json.dumps(content))
    return len(shards) - kept, kept


def open_cache(config: DataConfig) -> PixelCache | None:
    """The cache that `config.cache` names, or None where it names none.

    Raises UserError where it is missing, damaged, of another image size, or made from other files than are under
    `config.root` now. Checked once per process.
    """
    return None if config.cache is None else _open(config.cache, config.root, config.image_size)


@lru_cache(maxsize=2)
def _open(folder: Path, root: Path, image_size: int) -> PixelCache:
    config = DataConfig(root=root, image_size=image_size, cache=folder)
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["format"] != FORMAT:
            raise _refusal(config, "was written by another version")
        if index["image_size"] != image_size:
            raise _refusal(config, f"was made at data.image_size {index['image_size']}, not {image_size}")
        rows: dict[Path, NDArray[np.uint8]] = {}
        for shard in index["shards"]:
            rows |= _map_shard(shard, config)
        return PixelCache(rows, [Problem(*row) for row in index["left_out"]])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise _refusal(config, "is no finished cache") from None


def _map_shard(shard: dict[str, Any], config: DataConfig) -> dict[Path, NDArray[np.uint8]]:
    rows = {}
    for kind, digest in shard["sha256"].items():
        array = config.cache / f"{Path(shard['name']).stem}_{kind}s.npy"
        if not array.is_file() or _sha256(array) != digest:
            raise _refusal(config, f"is damaged: {array.name}")
        pixels = np.asarray(np.load(array, mmap_mode="r", allow_pickle=False))  # a memmap's rows are slow to take
        for row, stamps in enumerate(shard["sources"]):
            if kind in stamps:
                name, *stamp = stamps[kind]
                source = config.root / name
                if _stamp(source) != stamp:
                    raise _refusal(config, f"is not of this data: {source} is missing or has changed")
                rows[source] = pixels[row]
    return rows


def _write_shard(
    folder: Path, record: Path, samples: Sequence[Sample], stamps: list[dict], size: int, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    digests = {}
    for kind, read in _READERS.items():
        paths = [sample.files.get(kind) for sample in samples]
        if any(paths):
            channels = (3,) if kind == "image" else ()
            blank = np.zeros((size, size, *channels), np.uint8)
            pixels = list(pool.map(lambda path: read(path, size) if path else blank, paths))  # noqa: B023
            content = io.BytesIO()
            np.save(content, np.stack(pixels), allow_pickle=False)
            write_atomically(folder / f"{record.stem}_{kind}s.npy", content.getvalue())
            digests[kind] = hashlib.sha256(content.getvalue()).hexdigest()
    shard = {"name": record.name, "image_size": size, "sha256": digests, "sources": stamps}
    write_atomically(record, json.dumps(shard))
    return shard


def _whole_shard(folder: Path, record: Path, stamps: list[dict], size: int) -> dict[str, Any] | None:
    """What `record` says, where its shard was made from these files at this size and is undamaged."""
    try:
        shard = json.loads(record.read_bytes())
        made = shard["image_size"] == size and shard["sources"] == stamps
        arrays = {folder / f"{record.stem}_{kind}s.npy": digest for kind, digest in shard["sha256"].items()}
        return shard if made and all(_sha256(array) == digest for array, digest in arrays.items()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stamps(sample: Sample, root: Path) -> dict[str, list]:
    return {kind: [str(path.relative_to(root)), *(_stamp(path) or ())] for kind, path in sample.files.items()}


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(config: DataConfig, what: str) -> UserError:
    return UserError(f"data.cache {config.cache}: {what}; make it with launch/prepare.py --cache {config.cache}")
