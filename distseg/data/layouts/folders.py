"""images/ beside masks/: the same stem, the mask's optionally followed by _segmentation or _mask."""

from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.layouts.pairing import pair


def read(root: Path) -> Listing | None:
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        return None
    return Listing(*pair("train", root / "images", root / "masks"), frozenset({"train"}))
