"""A network with all that belongs to it as one module: a file's pixels in, its mask at the same size out.

It does to (B, H, W, 3) uint8 what `Predictor` does to a file: PIL's reduction, the place on the canvas (geometry.py),
normalisation, the network, the way back to the file's own size, the threshold. Resampling is a product with a matrix
on either side, so that one graph takes images of any size. Shapes: B images, C logits, H×W the file, S the side of the
network's input.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from distseg.data.augment import identity_transform
from distseg.data.geometry import Frame
from distseg.errors import UserError

Length = int | Tensor
"""Of a graph for any size, a tensor () int64."""


LARGEST_SIDE = 2**16


@dataclass(frozen=True)
class Side:
    """One axis of a file and its picture on the canvas."""

    given: int
    """Pixels that come in."""
    count: int
    own: Length
    """Pixels of the file and of the mask, the same number twice."""
    reduction: Length
    """Of the file to what comes in, which is own / reduction, rounded up."""
    first: Length
    """Where the picture begins, and how many pixels it has."""
    length: Length


class Deployable(nn.Module):
    """(B, H, W, 3) uint8 RGB → masks (B, H, W) uint8 class ids, and probabilities (B, C, H, W) float32.

    Of two classes there is the probability of the second alone, C = 1; of more, one of each.
    """

    factor: Tensor
    offset: Tensor
    """(3, 1, 1) of the normalisation."""
    fill: Tensor
    """(3, 1, 1) of padding, grey levels."""

    def __init__(self, network: nn.Module, frame: Frame, class_count: int, size: tuple[int, int] | None) -> None:
        """`size` is the (height, width) of every image, None for any.

        Raises UserError where the shape cuts such images into tiles, which is no graph.
        """
        super().__init__()
        self.network = network
        self._frame, self._class_count = frame, class_count
        self._fixed = None if size is None else _fixed_sides(frame, *size)
        if size is None and frame.shape == "crop":
            raise UserError(
                "data.shape crop: images of any size are cut into tiles, which a graph does not do; export at a fixed "
                f"size of one tile, --size {frame.size}x{frame.size}, or use distseg predict"
            )
        colour = torch.from_numpy(identity_transform(frame.size).colour)
        self.register_buffer("factor", colour[:, :3].diagonal()[:, None, None].clone(), persistent=False)
        self.register_buffer("offset", colour[:, 3][:, None, None].clone(), persistent=False)
        fill = torch.tensor(frame.image_fill, dtype=torch.float32)
        self.register_buffer("fill", fill[:, None, None], persistent=False)

    def forward(self, images: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`size` (2,) int64, of a graph for any size: the file's height and width, H and W.

        The pixels may be those of a JPEG that was decoded at 1/2, 1/4 or 1/8, as training and `predict` do.
        """
        rows, columns = self._sides(images, size)
        logits = self.network(self._canvas(images, rows, columns)).float()
        down, across = _enlarging(rows, self._frame.size), _enlarging(columns, self._frame.size)
        own = down @ (logits @ across.T)
        masks = own[:, 0] > 0 if own.shape[1] == 1 else own.argmax(dim=1)
        return masks.to(torch.uint8), probabilities_of(own, self._class_count)

    def _canvas(self, images: Tensor, rows: Side, columns: Side) -> Tensor:
        """(B, 3, S, S) float32, as the network learned to see it."""
        down, across = _reducing(rows, self._frame.size), _reducing(columns, self._frame.size)
        pixels = images.permute(0, 3, 1, 2).float()
        # PIL rounds after each of its two passes; of tall files it takes the rows first, to other bits.
        pixels = _rounded(*(pixels @ part.T for part in _parts(across)))
        pixels = _rounded(*(part @ pixels for part in _parts(down)))
        if self._frame.shape != "squash":
            inside = down.sum(dim=1)[:, None] * across.sum(dim=1)
            pixels = torch.where(inside > 0.5, pixels, self.fill)
        return pixels * self.factor + self.offset

    def _sides(self, images: Tensor, size: Tensor | None) -> tuple[Side, Side]:
        if self._fixed is not None:
            return self._fixed
        assert size is not None
        side = self._frame.size
        own = [size[0], size[1]]
        lengths: list[Length] = [side, side]
        if self._frame.shape == "letterbox":
            scale = side / torch.maximum(*own).double()  # float64, as in geometry.py: half a pixel may decide
            lengths = [(each.double() * scale - 0.5).ceil().clamp(min=1).long() for each in own]
        rows, columns = (
            Side(given, _bounded(each), each, (2 * each + given) // (2 * given), (side - length) // 2, length)
            for given, each, length in zip(images.shape[1:3], own, lengths, strict=True)
        )
        return rows, columns


def probabilities_of(logits: Tensor, class_count: int) -> Tensor:
    """Logits (B, C, H, W) to probabilities: (B, 1, H, W) of the second of two classes, (B, C, H, W) of more."""
    if logits.shape[1] == 1:
        return logits.sigmoid()
    each = logits.softmax(dim=1)
    return each if class_count > 2 else 1 - each[:, :1]


def _bounded(length: Tensor) -> int:
    """A side as a number that the graph may give tensors' shapes."""
    number = cast(int, length.item())
    torch._check(number >= 2)
    torch._check(number <= LARGEST_SIDE)
    return number


def _fixed_sides(frame: Frame, height: int, width: int) -> tuple[Side, Side]:
    place = frame.place(height, width)
    if place.canvas != (frame.size, frame.size):
        raise UserError(
            f"--size {height}x{width}: under data.shape crop this takes more than one tile; export one of "
            f"{frame.size}x{frame.size}, or use distseg predict"
        )
    rows, columns = (
        Side(height, height, height, 1, place.top, place.height),
        Side(width, width, width, 1, place.left, place.width),
    )
    return rows, columns


def _reducing(side: Side, size: int) -> Tensor:
    """(S, given) float64: what each pixel of the file counts in each of the canvas, 0 in all of the padding.

    PIL's: a triangle, as wide as the pixel that it is for (Resample.c). Distances between centres are counted in whole
    parts of a pixel that comes in, 1 / (2 · reduced).
    """
    own, length = torch.as_tensor(side.own), torch.as_tensor(side.length)
    reduced = length * side.reduction
    place = torch.arange(size)[:, None] - side.first
    distance = (2 * torch.arange(side.given) + 1) * reduced - (2 * place + 1) * own
    weights = (1 - distance.abs().double() / (2 * torch.maximum(own, reduced)).double()).clamp(min=0)
    weights = weights * ((place >= 0) & (place < length))
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=0.25)  # 0 / 0.25 in the padding; others are above


def _parts(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in PIL's fixed point, 22 bits, as a sum of two float32 tensors of 11 bits each.

    A sum over pixels of 8 bits is exact in each of them, and in one would not be: whether 127.5 becomes 127 or 128 is
    then as in PIL, and halves are not rare where a side is reduced by a simple ratio.
    """
    fixed = (weights * 2**22 + 0.5).floor()
    high = (fixed / 2**11 + 0.5).floor()
    return (high / 2**11).float(), ((fixed - high * 2**11) / 2**22).float()


def _rounded(high: Tensor, low: Tensor) -> Tensor:
    """The whole number nearest to high + low, halves up, of sums that float32 holds only apart."""
    high = high + 0.5
    whole = high.floor()
    return whole + (high - whole + low).floor()


def _enlarging(side: Side, size: int) -> Tensor:
    """(own, S) float32: bilinear weights from the picture on the canvas to the file, as in torch's interpolate."""
    own, length = torch.as_tensor(side.own), torch.as_tensor(side.length)
    position = (2 * torch.arange(side.count)[:, None] + 1) * length - own  # in 1 / (2 · own)
    position = torch.minimum(position.clamp(min=0), 2 * own * (length - 1))
    distance = position - 2 * own * (torch.arange(size) - side.first)
    return (1 - distance.abs().float() / (2 * own).float()).clamp(min=0)
