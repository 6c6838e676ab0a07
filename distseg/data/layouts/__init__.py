"""How data sets lie in folders: one file a layout, with `read(root)`, and one line in `LAYOUTS`."""

from collections.abc import Callable
from pathlib import Path

from distseg.data.layouts import folders, ham10000, isic, manifest, ph2
from distseg.data.layouts.listing import Listing

LAYOUTS: dict[str, Callable[[Path], Listing | None]] = {
    "manifest": manifest.read,
    "isic": isic.read,
    "ph2": ph2.read,
    "ham10000": ham10000.read,
    "folders": folders.read,
}
"""`read` by the name for `data.layout`, in the order in which `auto` tries them; None where a root is of another
layout. A file that several layouts could read belongs to the first of them."""
