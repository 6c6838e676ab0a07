"""distseg: train segmentation networks from many unreliable masks and a few expert ones.

from distseg import PixelReweighter, weighted_loss
"""

import importlib
from typing import Any

_PUBLIC = {"PixelReweighter": "distseg.meta", "weighted_loss": "distseg.meta.loss", "pixel_loss": "distseg.ops"}
__all__ = ["PixelReweighter", "pixel_loss", "weighted_loss"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import distseg` (and the config, and --help) does not pay for torch.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
