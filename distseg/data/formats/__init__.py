"""What annotation tools write and read: one file a format, with `read` and `write`, and one line in `FORMATS`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from distseg.data.formats import coco, cvat, label_studio, nnunet
from distseg.data.formats.contents import Contents, Item, Source


@dataclass(frozen=True)
class Format:
    read: Callable[[Source], Contents]
    write: Callable[[Iterable[Item], tuple[str, ...], Path], None]
    """Of items with the masks that are wanted, and the names of the classes, into an empty folder or a new file."""
    is_file: bool = False
    """Whether it is written as one file."""
    all_roles: bool = False
    """Whether one file holds the masks of every role; else items have one mask."""
    needs_png: bool = False
    """Whether images must be RGB in PNG."""
    keeps_groups: bool = False


FORMATS: dict[str, Format] = {
    "label-studio": Format(label_studio.read, label_studio.write, all_roles=True, keeps_groups=True),
    "cvat": Format(cvat.read, cvat.write, is_file=True),
    "coco": Format(coco.read, coco.write, keeps_groups=True),
    "nnunet": Format(nnunet.read, nnunet.write, needs_png=True),
}
"""By the name for `prepare --import` and `--export`."""
