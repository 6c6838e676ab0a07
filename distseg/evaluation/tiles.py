"""Logits of images that are larger than the network's input: tile by tile, blended where tiles overlap."""

from collections.abc import Callable

import torch
from torch import Tensor

from distseg.data.geometry import tile_starts, tile_weights


def count_tiles(height: int, width: int, size: int, overlap: float) -> int:
    """How many tiles `predict_by_tiles` cuts an image into."""
    return len(tile_starts(height, size, overlap)) * len(tile_starts(width, size, overlap))


def predict_by_tiles(
    predict: Callable[[Tensor], Tensor], images: Tensor, size: int, overlap: float, batch_size: int
) -> Tensor:
    """The logits (1, C, H, W) of one image (1, 3, H, W), H and W ≥ `size`, by tiles of size×size.

    `predict` maps (B, 3, size, size), B ≤ `batch_size`, to logits (B, C, size, size). A pixel's logits are the mean of
    its tiles', each weighted by the pixel's distances from that tile's sides, row times column. Beside the result,
    memory is taken for the sums in float64 and for one batch of tiles. Where the tiles agree, the result is exact.
    """
    _, _, height, width = images.shape
    rows, columns = tile_starts(height, size, overlap), tile_starts(width, size, overlap)
    along = torch.from_numpy(tile_weights(size)).to(images.device)
    places = [(top, left) for top in rows for left in columns]
    total = None
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        logits = predict(torch.cat([images[..., top : top + size, left : left + size] for top, left in batch]))
        if total is None:
            total = torch.zeros(1, logits.shape[1], height, width, dtype=torch.float64, device=images.device)
        for (top, left), tile in zip(batch, logits, strict=True):
            total[0, :, top : top + size, left : left + size] += tile * along[:, None] * along
    if total is None:
        raise ValueError("an image has at least one tile")
    # Tiles lie on a grid, so that the sum of a pixel's weights is a product too.
    total /= _sums(rows, along, height)[:, None]
    total /= _sums(columns, along, width)
    return total.to(logits.dtype)


def _sums(starts: list[int], along: Tensor, length: int) -> Tensor:
    sums = torch.zeros(length, dtype=torch.float64, device=along.device)
    for start in starts:
        sums[start : start + len(along)] += along
    return sums
