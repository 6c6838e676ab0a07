"""The torch-facing operators, one name each: see reference.py for what they compute."""

from distseg.ops.reference import IGNORE, alignment, pixel_loss, valid_pixels, weighted_loss

__all__ = ["IGNORE", "alignment", "pixel_loss", "valid_pixels", "weighted_loss"]
