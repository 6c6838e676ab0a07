"""COCO instances JSON: outlines and run lengths of objects, in categories.

A file has one mask an image and does not say whose it is. Several files, one a split, may lie in a folder. Objects are
painted in the order of the file. A crowd region (`iscrowd`) is painted as its class, for tools write plain brush masks
so (datumaro and CVAT do). A mask's objects are written as its connected parts.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.decode import MAX_SIDE
from distseg.data.formats.contents import (
    IGNORE,
    Canvas,
    Contents,
    Item,
    Source,
    named_values,
    number_classes,
    split_named,
    written_names,
)
from distseg.data.formats.images import ImageFolder, check_size, ids_of, without_suffix
from distseg.data.formats.json_file import Part, read_json
from distseg.data.formats.shapes import labels_to_runs, polygons_to_mask, runs_to_mask
from distseg.errors import BadFileError

ROBOFLOW = "_annotations.coco.json"
Id = Annotated[int, Field(ge=-(2**63), lt=2**63)] | str
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class _Image(Part):
    id: Id
    file_name: Annotated[str, Field(min_length=1)]
    width: _Side
    height: _Side
    group: Any = None
    """Ours: a text; other tools may have other things under this name."""


class _Category(Part):
    id: Id
    name: str


class _Runs(Part):
    size: tuple[_Side, _Side]
    counts: str | list[Annotated[int, Field(ge=0, le=MAX_SIDE**2)]]


class _Annotation(Part):
    id: Id | None = None
    image_id: Id
    category_id: Id
    segmentation: _Runs | list[list[float]] | None = None


class _Content(Part):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _File:
    """One JSON file, whose ids are known to be unique and to lead somewhere."""

    def __init__(self, path: Path, limit: int) -> None:
        content: _Content = read_json(path, limit, _Content)
        self.path = path
        self.images = content.images
        for kind, ids in (
            ("image", [image.id for image in content.images]),
            ("category", [category.id for category in content.categories]),
            ("annotation", [annotation.id for annotation in content.annotations if annotation.id is not None]),
        ):
            if doubled := [id for id, count in Counter(ids).items() if count > 1]:
                raise BadFileError(f"{path}: has the {kind} id {doubled[0]!r} twice; keep one")
        self.categories = {category.id: category.name for category in content.categories}
        self._annotations: dict[Id, list[_Annotation]] = {image.id: [] for image in content.images}
        for annotation in content.annotations:
            if annotation.image_id not in self._annotations:
                raise BadFileError(
                    f"{self.place(annotation)}: there is no image {annotation.image_id!r}; export it again"
                )
            if annotation.category_id not in self.categories:
                raise BadFileError(
                    f"{self.place(annotation)}: there is no category {annotation.category_id!r}; export it again"
                )
            self._annotations[annotation.image_id].append(annotation)

    def annotations_of(self, image: _Image) -> list[_Annotation]:
        return self._annotations[image.id]

    def place(self, entry: _Image | _Annotation) -> str:
        kind = "image" if isinstance(entry, _Image) else f"annotation of image {entry.image_id!r}:"
        return f"{self.path}: {kind} {entry.id!r}"

    @property
    def split(self) -> str:
        """From instances_val2017.json, or from the folder of valid/_annotations.coco.json."""
        words = re.split(r"[^a-z0-9]+", self.path.stem.casefold())
        if self.path.name == ROBOFLOW:
            words.append(self.path.parent.name)
        return next((split for word in words if (split := split_named(word))), "")


def read(source: Source) -> Contents:
    role = source.given_role
    files = [_File(path, source.decoding.max_file_bytes) for path in _json_files(source.path)]
    names = [name for file in files for _, name in sorted(file.categories.items(), key=_by_number)]
    classes, class_ids = number_classes(names, source.path)
    folder = ImageFolder(source.images_folder, source.decoding)
    entries = [
        (file, image, folder.find(image.file_name, file.place(image))) for file in files for image in file.images
    ]
    ids = ids_of([without_suffix(folder.relative(path)) for *_, path in entries], source.path)

    def items() -> Iterator[Item]:
        for file, image, path in entries:
            shown = folder.open(path)
            check_size(shown, (image.width, image.height), file.place(image))
            canvas = Canvas(shown.size)
            for annotation in file.annotations_of(image):
                shape = _shape(annotation, shown.size, file.place(annotation))
                canvas.paint(shape, class_ids[file.categories[annotation.category_id]])
            id = ids[without_suffix(folder.relative(path))]
            yield Item(
                id,
                file.split,
                shown,
                {role: canvas.mask},
                image.group if isinstance(image.group, str) else "",
                canvas.overlapping,
                unmarked=not file.annotations_of(image),
            )

    unmarked = sum(not file.annotations_of(image) for file, image, _ in entries)
    return Contents(classes, items(), len(entries), unmarked)


def write(items: Iterable[Item], classes: tuple[str, ...], folder: Path) -> None:
    """images/ and annotations/instances_SPLIT.json, with run lengths, which hold a mask to the pixel."""
    values = named_values(classes)
    ignored = False
    content: dict[str, dict[str, list[dict[str, Any]]]] = {}
    annotation_ids = count(1)
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for image_id, item in enumerate(items, start=1):
        file = content.setdefault(item.split, {"images": [], "annotations": []})
        name = f"{item.id}{item.picture.suffix}"
        (folder / "images" / name).write_bytes(item.picture.content)
        width, height = item.picture.size
        group = {"group": item.group} if item.group else {}
        file["images"].append({"id": image_id, "file_name": name, "width": width, "height": height, **group})
        [mask] = item.masks.values()
        for category_id, value in enumerate(values.values(), start=1):
            for part in parts(mask == value):
                file["annotations"].append(
                    {"id": next(annotation_ids), "image_id": image_id, "category_id": category_id, "iscrowd": 0, **part}
                )
        ignored |= bool((mask == IGNORE).any())
    names = written_names(values, ignored)
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in enumerate(names, start=1)]
    for split, file in content.items():
        text = json.dumps(file | {"categories": categories}, ensure_ascii=False)
        (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def _json_files(path: Path) -> list[Path]:
    """The file itself; of a folder those that COCO's and Roboflow's layouts have."""
    if not path.is_dir():
        return [path]
    for pattern in ("annotations/*.json", "*.json", f"*/{ROBOFLOW}"):
        if found := sorted(path.glob(pattern)):
            return found
    raise BadFileError(f"{path}: holds no annotations/*.json, *.json or */{ROBOFLOW}; name the file")


def _by_number(category: tuple[Id, str]) -> tuple[bool, Id]:
    return isinstance(category[0], str), category[0]


def _shape(annotation: _Annotation, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W), True on the object."""
    segmentation = annotation.segmentation
    if not segmentation:
        raise BadFileError(f"{where}: has no segmentation, perhaps a box only; draw its outline, or take it out")
    if isinstance(segmentation, list):
        return polygons_to_mask(segmentation, size, where)
    height, width = segmentation.size
    if (width, height) != size:
        raise BadFileError(
            f"{where}: its runs are of {width}×{height}, its image of {size[0]}×{size[1]}; export it again"
        )
    return runs_to_mask(segmentation.counts, size, where)


def parts(mask: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Segmentation, area and box of each 8-connected part of (H, W)."""
    number, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    for runs, (left, top, width, height, area) in zip(
        labels_to_runs(np.asarray(labels, np.int32), number - 1), stats[1:].tolist(), strict=True
    ):
        yield {"segmentation": runs, "area": area, "bbox": [left, top, width, height]}
