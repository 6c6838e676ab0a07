"""Outlines and run lengths into pixels, by COCO's rules. The only importer of pycocotools."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distseg.errors import BadFileError, UserError

_COMPRESSED = re.compile(r"(?:[P-o]{0,6}[0-O])*")
"""Groups of five bits, the lowest first; all but a number's last have the bit 0x20; 48 is added (maskApi.c)."""


def polygons_to_mask(polygons: Sequence[Sequence[float]], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """The union (H, W) of outlines [x1, y1, x2, y2, …] in pixels of an image of `size` (width, height).

    The rule for pixels on an edge is that of pycocotools. Raises BadFileError that begins with `where`.
    """
    width, height = size
    for points in polygons:
        if len(points) < 6 or len(points) % 2:
            raise BadFileError(f"{where}: an outline has {len(points)} coordinates; it needs three points or more")
        x, y = np.asarray(points[::2]), np.asarray(points[1::2])
        if x.min() < -width or x.max() > 2 * width or y.min() < -height or y.max() > 2 * height:
            raise BadFileError(f"{where}: an outline lies far outside its image of {width}×{height}; draw it again")
    coco = _pycocotools()
    if not polygons:
        return np.zeros((height, width), bool)
    runs = coco.merge(coco.frPyObjects([list(map(float, points)) for points in polygons], height, width))
    return runs_to_mask(runs["counts"].decode("ascii"), size, where)


def runs_to_mask(counts: str | Sequence[int], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W) from COCO's run lengths, compressed or not, which begin with background and go down the columns.

    Not by pycocotools: it shows whatever was in memory where runs are too short. Raises BadFileError.
    """
    width, height = size
    lengths = _decompressed(counts, where) if isinstance(counts, str) else list(counts)
    if min(lengths, default=0) < 0 or sum(lengths) != width * height:
        raise BadFileError(
            f"{where}: its runs are of {sum(lengths):,} pixels, its image of {width}×{height} has {width * height:,}; "
            "export it again"
        )
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, np.asarray(lengths, np.int64)).reshape(width, height).T


def labels_to_runs(labels: NDArray[np.int32], count: int) -> Iterator[dict[str, Any]]:
    """{"size": [H, W], "counts": compressed} of each of the labels 1 to `count` of (H, W); each must occur.

    In one pass over the pixels, however many labels there are.
    """
    coco = _pycocotools()
    height, width = labels.shape
    flat = labels.ravel(order="F")
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ends = np.append(starts[1:], flat.size)
    order = np.argsort(flat[starts], kind="stable")
    places = np.searchsorted(flat[starts][order], np.arange(1, count + 2))
    for first, last in pairwise(places):
        runs = order[first:last]
        bounds = np.column_stack([starts[runs], ends[runs]]).ravel()
        lengths = np.diff(bounds, prepend=0, append=flat.size).tolist()
        packed = coco.frPyObjects(
            {"size": [height, width], "counts": lengths if lengths[-1] else lengths[:-1]}, height, width
        )
        yield {"size": [height, width], "counts": packed["counts"].decode("ascii")}


def _decompressed(text: str, where: str) -> list[int]:
    if not _COMPRESSED.fullmatch(text):
        raise BadFileError(f"{where}: its compressed runs are damaged; export it again")
    lengths: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths


def _pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError("outlines and COCO need pycocotools, which is not installed: pip install pycocotools") from None
    return mask
