"""Label Studio's brush masks: RGBA pixels in run lengths of thi.ng/rle-pack, bit by bit.

The layout is that of `decode` in https://github.com/thi-ng/umbrella/blob/develop/packages/rle-pack/src/index.ts. First
32 bits for the number of values, 5 for the bits of a value less one, four times 4 for the bits of a count less one.
Then blocks: a bit (1 for one value repeated, 0 for values in a row), 2 bits that choose one of the four lengths, a
count less one, and the values.

label_studio_sdk has it too, but allocates what the first 32 bits say before anything is known about them.
"""

import numpy as np
from numpy.typing import NDArray

from distseg.errors import BadFileError

_CHANNELS = 4
_LENGTHS = (3, 4, 8, 16)
"""Bits of the four counts, as Label Studio writes them."""
_WORD = 8


def brush_to_mask(rle: bytes, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W), True where the brush is not transparent, of an image of `size` (width, height). Raises BadFileError."""
    width, height = size
    bits = _Bits(rle, where)
    count, word = bits.take(32), bits.take(5) + 1
    lengths = [bits.take(4) + 1 for _ in range(4)]
    if count != _CHANNELS * width * height:
        raise BadFileError(
            f"{where}: its rle is of {count:,} values, not of {_CHANNELS * width * height:,} as RGBA of "
            f"{width}×{height} has; export it again"
        )
    if word != _WORD:
        raise BadFileError(f"{where}: its rle has values of {word} bits, not {_WORD}; export it again")
    values = np.zeros(count, np.uint8)
    at = 0
    while at < count:
        repeated = bits.take(1)
        end = at + 1 + bits.take(lengths[bits.take(2)])
        if end > count:
            raise BadFileError(f"{where}: its rle is longer than its image; export it again")
        values[at:end] = bits.take(_WORD) if repeated else bits.take_bytes(end - at)
        at = end
    return values.reshape(height, width, _CHANNELS)[..., 3] > 0


def mask_to_brush(mask: NDArray[np.bool_]) -> list[int]:
    """The rle of (H, W): RGBA 255 where True, 0 elsewhere; all in repeated blocks."""
    flat = mask.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    runs = _CHANNELS * np.diff(np.concatenate([starts, [flat.size]]))
    most = 1 << _LENGTHS[-1]
    blocks = -(-runs // most)
    counts = np.full(blocks.sum(), most, np.int64)
    counts[np.cumsum(blocks) - 1] = runs - (blocks - 1) * most
    colours = np.repeat(np.where(flat[starts], 255, 0), blocks)
    # A block is 1, the number of its length, its count and its value: 27 bits with the longest count.
    packed = (0b111 << 24) | ((counts - 1) << _WORD) | colours
    bits = ((packed[:, None] >> np.arange(26, -1, -1)) & 1).astype(np.uint8).ravel()
    header = f"{_CHANNELS * flat.size:032b}{_WORD - 1:05b}" + "".join(f"{length - 1:04b}" for length in _LENGTHS)
    return np.packbits(np.concatenate([np.array(list(header), np.uint8), bits])).tolist()


class _Bits:
    """A stream of bits, the most significant first. Raises BadFileError at its end."""

    def __init__(self, content: bytes, where: str) -> None:
        self._content = content
        self._where = where
        self._at = 0

    def take(self, count: int) -> int:
        first, self._at = self._at, self._at + count
        if self._at > 8 * len(self._content):
            raise BadFileError(f"{self._where}: its rle ends too early; export it again")
        last = (self._at + 7) // 8
        chunk = int.from_bytes(self._content[first // 8 : last], "big")
        return (chunk >> (8 * last - self._at)) & ((1 << count) - 1)

    def take_bytes(self, count: int) -> NDArray[np.uint8]:
        first, self._at = self._at, self._at + 8 * count
        if self._at > 8 * len(self._content):
            raise BadFileError(f"{self._where}: its rle ends too early; export it again")
        chunk = np.frombuffer(self._content, np.uint8)[first // 8 : (self._at + 7) // 8]
        bits = np.unpackbits(chunk)[first % 8 : first % 8 + 8 * count]
        return np.packbits(bits)
