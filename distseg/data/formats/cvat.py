"""CVAT's "Segmentation mask 1.1": a zip of coloured masks in Pascal VOC's layout, with labelmap.txt.

A file has one mask an image and does not say whose it is. Where it holds JPEGImages/ too, no folder of images is
needed. The classes are in the order of labelmap.txt.
"""

import zipfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.data.decode import Decoding
from distseg.data.formats.archive import Archive
from distseg.data.formats.contents import (
    BACKGROUND,
    IGNORE,
    Contents,
    Item,
    Mask,
    Source,
    named_values,
    number_classes,
    split_named,
    written_names,
)
from distseg.data.formats.images import ImageFolder, Picture, check_size, ids_of, opened_whole, picture
from distseg.data.formats.palette import colour_of
from distseg.errors import BadFileError, UserError
from distseg.text import for_terminal

LABELS = "labelmap.txt"
LISTS = "ImageSets/Segmentation/"
MASKS = "SegmentationClass/"
IMAGES = "JPEGImages/"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)
"""Of the members of a zip, so that the same masks are the same bytes."""


class _Colours:
    """The class of each colour of the masks."""

    def __init__(self, labels: list[tuple[str, int | None]], class_ids: dict[str, int]) -> None:
        self.by_line = np.array([class_ids[name] for name, _ in labels], np.uint8)
        known = sorted((colour, class_ids[name]) for name, colour in labels if colour is not None)
        self.codes = np.array([code for code, _ in known], np.int64)
        self.ids = np.array([id for _, id in known], np.uint8)


def read(source: Source) -> Contents:
    archive = Archive(source.path, source.decoding.max_file_bytes)
    labels = _labels(archive)
    classes, class_ids = number_classes([name for name, _ in labels], archive.place(LABELS))
    role = source.given_role
    colours = _Colours(labels, class_ids)
    splits = _listed(archive)
    ids = ids_of(splits, source.path)
    images = _images(archive, splits, source)

    def items() -> Iterator[Item]:
        for name, split in splits.items():
            found = images[name]
            if isinstance(found, str):
                shown = picture(archive.place(found), archive.read(found), source.decoding)
            else:
                shown = found[0].open(found[1])
            mask = _mask(archive, name, shown, colours, source.decoding)
            yield Item(ids[name], split, shown, {role: mask}, unmarked=_member(name) not in archive.names)

    return Contents(classes, items(), len(splits), sum(_member(name) not in archive.names for name in splits))


def write(items: Iterable[Item], classes: tuple[str, ...], path: Path) -> None:
    """labelmap.txt, a list for each split, the masks in colours, and the images as they are."""
    values = {BACKGROUND: 0} | named_values(classes)
    if broken := [name for name in values if ":" in name or name.startswith("#")]:
        raise UserError(f"data.classes: CVAT's labelmap.txt cannot hold the name {broken[0]!r}; choose one without ':'")
    palette = np.array([colour_of(value) for value in range(256)], np.uint8)
    lists: dict[str, list[str]] = {}
    with zipfile.ZipFile(path, "w") as file:
        ignored = False
        for item in items:
            lists.setdefault(item.split, []).append(item.id)
            [mask] = item.masks.values()
            coloured = palette[mask][..., ::-1]
            _add(file, f"{MASKS}{item.id}.png", cv2.imencode(".png", coloured)[1].tobytes(), zipfile.ZIP_STORED)
            _add(file, f"{IMAGES}{item.id}{item.picture.suffix}", item.picture.content, zipfile.ZIP_STORED)
            ignored |= bool((mask == IGNORE).any())
        names = written_names(values, ignored)
        lines = [f"{name}:{','.join(map(str, colour_of(values[name])))}::" for name in names]
        _add(file, LABELS, "\n".join(["# label:color_rgb:parts:actions", *lines, ""]).encode(), zipfile.ZIP_DEFLATED)
        for split, ids in lists.items():
            _add(file, f"{LISTS}{split}.txt", "".join(f"{id}\n" for id in ids).encode(), zipfile.ZIP_DEFLATED)


def _member(name: str) -> str:
    return f"{MASKS}{name}.png"


def _add(file: zipfile.ZipFile, name: str, content: bytes, compression: int) -> None:
    file.writestr(zipfile.ZipInfo(name, _FIRST_DATE), content, compression)


def _labels(archive: Archive) -> list[tuple[str, int | None]]:
    """Names and colours (24 bits) by line; None where a line has a name only."""
    if LABELS not in archive.names:
        raise BadFileError(f"{archive.place(LABELS)}: is missing; export the task as Segmentation mask 1.1")
    labels: list[tuple[str, int | None]] = []
    for line in archive.text(LABELS).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, *fields = line.strip().rsplit(":", 3) if line.count(":") >= 3 else (line.strip(), "")
        try:
            parts = [int(part) for part in fields[0].split(",")] if fields[0].strip() else None
        except ValueError:
            parts = []
        if parts is not None and (len(parts) != 3 or not all(0 <= part <= 255 for part in parts)):
            raise BadFileError(
                f"{archive.place(LABELS)}: the colour {for_terminal(fields[0][:40])} of {for_terminal(name[:80])} must "
                "be three numbers from 0 to 255"
            )
        labels.append((name, None if parts is None else parts[0] << 16 | parts[1] << 8 | parts[2]))
    known = sorted((colour, name) for name, colour in labels if colour is not None)
    for (one, first), (other, second) in pairwise(known):
        if one == other:
            raise BadFileError(f"{archive.place(LABELS)}: {first} and {second} have one colour; give each its own")
    return labels


def _listed(archive: Archive) -> dict[str, str]:
    """The images by name with their splits: what the lists say, or if there are none every mask."""
    lists = sorted(
        name for name in archive.names if name.startswith(LISTS) and name.endswith(".txt") and "trainval" not in name
    )
    splits: dict[str, str] = {}
    for name in lists:
        for line in filter(None, map(str.strip, archive.text(name).splitlines())):
            if line in splits:
                raise BadFileError(
                    f"{archive.place(name)}: lists {for_terminal(line)}, which is listed before; keep one"
                )
            splits[line] = split_named(PurePosixPath(name).stem)
    masks = (name for name in archive.names if name.startswith(MASKS) and name.endswith(".png"))
    return splits or {name.removeprefix(MASKS).removesuffix(".png"): "" for name in sorted(masks)}


def _images(archive: Archive, names: Iterable[str], source: Source) -> dict[str, str | tuple[ImageFolder, Path]]:
    """Where each image is: a file of the archive, or one in a folder."""
    inside = (
        {}
        if source.images
        else {
            str(PurePosixPath(name.removeprefix(IMAGES)).with_suffix("")): name
            for name in archive.names
            if name.startswith(IMAGES) and PurePosixPath(name).suffix
        }
    )
    folder = None
    found: dict[str, str | tuple[ImageFolder, Path]] = {}
    for name in names:
        if name in inside:
            found[name] = inside[name]
            continue
        folder = folder or ImageFolder(source.images_folder, source.decoding)
        found[name] = (folder, folder.find_stem(name, str(source.path)))
    return found


def _mask(archive: Archive, name: str, shown: Picture, colours: _Colours, decoding: Decoding) -> Mask:
    """Class ids (H, W); all background where the archive has no mask."""
    member = _member(name)
    if member not in archive.names:
        return np.zeros(shown.size[::-1], np.uint8)
    where = Path(archive.place(member))
    with opened_whole(where, decoding, archive.read(member)) as image:
        check_size(shown, image.size, str(where))
        if image.mode == "L":  # CVAT's form without colours: a value is a line of labelmap.txt
            return _by_line(np.asarray(image), colours, where)
        pixels = np.asarray(image.convert("RGB"))
    codes = (pixels.astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(axis=2)
    used, where_used = np.unique(codes, return_inverse=True)
    known = np.isin(used, colours.codes)
    if not known.all():
        code = int(used[~known][0])
        raise BadFileError(
            f"{where}: has the colour {code >> 16},{code >> 8 & 255},{code & 255}, which {LABELS} does not name; "
            "export it again"
        )
    return colours.ids[np.searchsorted(colours.codes, used)][where_used].reshape(codes.shape)


def _by_line(values: NDArray[np.uint8], colours: _Colours, where: Path) -> Mask:
    if values.max(initial=0) >= len(colours.by_line):
        raise BadFileError(f"{where}: has the value {values.max()}, and {LABELS} has {len(colours.by_line)} lines")
    return colours.by_line[values]
