"""Logits of images that are larger than the network's input: tile by tile, blended where tiles overlap."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distseg.data.geometry import tile_starts, tile_weights

_ROWS = 64
"""Of a band at most."""


def count_tiles(height: int, width: int, size: int, overlap: float) -> int:
    """How many tiles `predict_by_tiles` cuts an image into."""
    return len(tile_starts(height, size, overlap)) * len(tile_starts(width, size, overlap))


def predict_by_tiles(
    predict: Callable[[Tensor], Tensor], images: Tensor, size: int, overlap: float, batch_size: int
) -> Tensor:
    """The logits (1, C, H, W) of one image (1, 3, H, W), H and W ≥ `size`, by tiles of size×size: `predict_bands`."""
    _, _, height, width = images.shape

    def tile(top: int, left: int) -> Tensor:
        return images[0, :, top : top + size, left : left + size]

    return torch.cat([*predict_bands(predict, tile, height, width, size, overlap, batch_size)], dim=1)[None]


def predict_bands(
    predict: Callable[[Tensor], Tensor],
    tile: Callable[[int, int], Tensor],
    height: int,
    width: int,
    size: int,
    overlap: float,
    batch_size: int,
) -> Iterator[Tensor]:
    """The logits (C, rows, width) of an image of height×width, both ≥ `size`, from top to bottom in bands.

    `tile` gives the (3, size, size) at a first row and column, and `predict` maps (B, 3, size, size), B ≤ `batch_size`,
    to logits (B, C, size, size). A pixel's logits are the mean of its tiles', each weighted by the pixel's distances
    from that tile's sides, row times column. Memory is taken for the sums in float64 over one row of tiles, and for one
    batch of tiles. Where the tiles agree, the result is exact.
    """
    rows, columns = tile_starts(height, size, overlap), tile_starts(width, size, overlap)
    places = [(top, left) for top in rows for left in columns]
    sums: Tensor | None = None  # of the rows from `first` on
    first = 0
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        logits = predict(torch.stack([tile(top, left) for top, left in batch]))
        if sums is None:
            along = torch.from_numpy(tile_weights(size)).to(logits.device)
            # Tiles lie on a grid, so that the sum of a pixel's weights is a product too.
            down, across = _sums(rows, along, height)[:, None], _sums(columns, along, width)
            sums = torch.zeros(logits.shape[1], size, width, dtype=torch.float64, device=logits.device)
        for (top, left), each in zip(batch, logits, strict=True):
            if top > first:
                yield from _blended(sums, top - first, down[first:top], across, logits.dtype)
                _move_up(sums, top - first)
                first = top
            sums[:, :, left : left + size] += each * along[:, None] * along
    if sums is None:
        raise ValueError("an image has at least one tile")
    yield from _blended(sums, size, down[first:], across, logits.dtype)


def _blended(sums: Tensor, count: int, down: Tensor, across: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The first `count` rows, a few at a time: each is a copy or two of what it holds."""
    for start in range(0, count, _ROWS):
        rows = slice(start, min(start + _ROWS, count))
        yield (sums[:, rows] / down[rows] / across).to(dtype)


def _move_up(sums: Tensor, count: int) -> None:
    """Drop the first `count` rows; those at the end are 0 then."""
    left = sums.shape[1] - count
    for start in range(0, left, _ROWS):
        rows = min(_ROWS, left - start)
        sums[:, start : start + rows] = sums[:, start + count : start + count + rows].clone()
    sums[:, left:] = 0


def _sums(starts: list[int], along: Tensor, length: int) -> Tensor:
    sums = torch.zeros(length, dtype=torch.float64, device=along.device)
    for start in starts:
        sums[start : start + len(along)] += along
    return sums
