"""The method: how much each pixel's label is worth, by where its gradient points."""

from distseg.meta.reweighter import PixelReweighter
from distseg.meta.weights import WeightRule

__all__ = ["PixelReweighter", "WeightRule"]
