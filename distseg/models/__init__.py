"""Single-device networks."""

from distseg.models.registry import build_model
from distseg.models.unet import UNet

__all__ = ["UNet", "build_model"]
