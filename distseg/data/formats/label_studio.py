"""Label Studio's JSON export: brush masks, outlines and boxes of several annotators.

An annotation with `ground_truth` is the reference; the others are annotations by `completed_by`. Regions are painted in
the order of the file. The names and the order of the classes are those of label_config.xml, where it lies beside the
JSON; else those that regions use, by name. A task that nobody has annotated is left out; one that was annotated with
nothing has an empty mask. Predictions and drafts are not read. No image is fetched: it is found by its name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from math import cos, radians, sin
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.decode import MAX_SIDE
from distseg.data.formats.brush import brush_to_mask, mask_to_brush
from distseg.data.formats.contents import (
    ANNOTATION,
    IGNORE,
    PROPOSAL,
    REFERENCE,
    Canvas,
    Contents,
    Item,
    Mask,
    Source,
    named_values,
    number_classes,
    written_names,
)
from distseg.data.formats.images import UPLOAD_PREFIX, ImageFolder, Picture, check_size, ids_of, without_suffix
from distseg.data.formats.json_file import Part, checked, read_json
from distseg.data.formats.palette import colour_of
from distseg.data.formats.shapes import polygons_to_mask
from distseg.data.sample import SPLITS
from distseg.errors import BadFileError, UserError
from distseg.files import read_regular

JSON = "annotations.json"
LABELS = "label_config.xml"
_WITHOUT_SHAPE = {"choices", "textarea", "rating", "number", "taxonomy", "datetime", "pairwise", "relation"}
_LABEL_TAGS = {"BrushLabels", "PolygonLabels", "RectangleLabels"}
_MOST_BYTES_OF_LABELS = 2**20
_Percent = Annotated[float, Field(ge=-1000, le=1000)]


class _Brush(Part):
    format: str
    rle: bytes


class _Polygon(Part):
    points: list[tuple[_Percent, _Percent]]


class _Rectangle(Part):
    x: _Percent
    y: _Percent
    width: _Percent
    height: _Percent
    rotation: float = 0.0


_SHAPES: dict[str, type[Part]] = {"brushlabels": _Brush, "polygonlabels": _Polygon, "rectanglelabels": _Rectangle}


class _Region(Part):
    type: str = ""
    value: dict[str, Any] = Field(default_factory=dict)
    original_width: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    original_height: Annotated[int, Field(ge=1, le=MAX_SIDE)] | None = None
    image_rotation: float = 0.0


class _User(Part):
    id: int | None = None
    email: str | None = None
    username: str | None = None


class _Annotation(Part):
    id: int | str | None = None
    completed_by: int | str | _User | None = None
    ground_truth: bool = False
    was_cancelled: bool = False
    result: list[_Region]

    @property
    def annotator(self) -> str:
        """Empty where nobody is named."""
        user = self.completed_by
        if isinstance(user, _User):
            return user.email or user.username or ("" if user.id is None else str(user.id))
        return "" if user is None else str(user)

    @property
    def role(self) -> str:
        if self.ground_truth:
            return REFERENCE
        return f"{ANNOTATION}:{self.annotator}" if self.annotator else ANNOTATION


class _Task(Part):
    id: int | str | None = None
    data: dict[str, Any]
    annotations: list[_Annotation]

    @property
    def image(self) -> str | None:
        """The path or address of its image: the field `image`, or else the only one that looks like one."""
        if isinstance(image := self.data.get("image"), str):
            return image
        images = [value for value in self.data.values() if isinstance(value, str) and _IMAGE.search(value)]
        return images[0] if len(images) == 1 else None


_NUMBER = re.compile("0|[1-9][0-9]{0,8}")
"""A user's number in Label Studio; any other name is an address."""
_IMAGE = re.compile(r"\.(jpe?g|png|bmp|tiff?)$", re.IGNORECASE)


def read(source: Source) -> Contents:
    if source.role is not None:
        raise UserError(f"--as {source.role}: Label Studio says itself whose masks are which; leave it out")
    path = source.path / JSON if source.path.is_dir() else source.path
    tasks: list[_Task] = read_json(path, source.decoding.max_file_bytes, list[_Task])
    folder = ImageFolder(source.images_folder, source.decoding)
    annotated = []
    for number, task in enumerate(tasks, start=1):
        where = f"{path}: task {number if task.id is None else task.id}"
        marked = _annotations_by_role(task, where)
        if marked:
            if task.image is None:
                raise BadFileError(f"{where}: which of its data is the image cannot be told; call it image")
            annotated.append((where, task, marked, folder.find(_name_of(task.image), where)))
    names = [_without_prefix(without_suffix(folder.relative(found)), task.image) for _, task, _, found in annotated]
    ids = ids_of(names, path)
    classes, class_ids = _classes(path, [marked for _, _, marked, _ in annotated])

    def items() -> Iterator[Item]:
        for name, (where, task, marked, found) in zip(names, annotated, strict=True):
            shown = folder.open(found)
            masks, overlapping = {}, 0
            for role, annotation in marked.items():
                canvas = _painted(annotation, shown, class_ids, f"{where}, annotation {annotation.id}")
                masks[role] = canvas.mask
                overlapping += canvas.overlapping
            split, group = task.data.get("split"), task.data.get("group")
            yield Item(
                ids[name],
                split if isinstance(split, str) and split in SPLITS else "",
                shown,
                masks,
                str(group) if isinstance(group, str | int) else "",
                overlapping,
            )

    return Contents(classes, items(), len(annotated), unannotated=len(tasks) - len(annotated))


def write(items: Iterable[Item], classes: tuple[str, ...], folder: Path) -> None:
    """images/, annotations.json with every annotator's masks, and label_config.xml for the project's settings.

    A proposal is a prediction there, which an annotator opens, corrects and submits.
    """
    values = named_values(classes)
    ignored = False
    (folder / "images").mkdir()
    numbers = count(1)
    with (folder / JSON).open("w", encoding="utf-8") as file:
        for number, item in enumerate(items):
            name = f"{item.id}{item.picture.suffix}"
            (folder / "images" / name).write_bytes(item.picture.content)
            data = {"image": f"/data/local-files/?d={quote(f'{folder.name}/images/{name}')}", "split": item.split}
            drawn = {key: mask for key, mask in item.masks.items() if key != PROPOSAL}
            task = {
                "data": data | ({"group": item.group} if item.group else {}),
                "annotations": [_annotation(key, mask, values, next(numbers)) for key, mask in drawn.items()],
            }
            if PROPOSAL in item.masks:
                regions = _regions(item.masks[PROPOSAL], values, next(numbers))
                task["predictions"] = [{"model_version": PROPOSAL, "result": regions}]
            ignored |= any((mask == IGNORE).any() for mask in item.masks.values())
            file.write(",\n" if number else "[\n")
            json.dump(task, file, ensure_ascii=False)
        file.write("\n]\n")
    named = {name: values[name] for name in written_names(values, ignored)}
    (folder / LABELS).write_text(_label_config(named), encoding="utf-8")


def _annotations_by_role(task: _Task, where: str) -> dict[str, _Annotation]:
    marked: dict[str, _Annotation] = {}
    for annotation in task.annotations:
        if annotation.was_cancelled:
            continue
        if annotation.role in marked:
            whose = "ground truths" if annotation.ground_truth else f"annotations by {annotation.annotator or 'nobody'}"
            raise BadFileError(f"{where}: has two {whose}; keep one")
        marked[annotation.role] = annotation
    return marked


def _classes(path: Path, annotated: list[dict[str, _Annotation]]) -> tuple[tuple[str, ...], dict[str, int]]:
    used = {
        label
        for marked in annotated
        for annotation in marked.values()
        for region in annotation.result
        if region.type in _SHAPES and isinstance(labels := region.value.get(region.type), list)
        for label in labels
        if isinstance(label, str)
    }
    known = _known_labels(path.with_name(LABELS))
    return number_classes([*known, *sorted(used - set(known))], path)


def _known_labels(path: Path) -> list[str]:
    """The labels of a project's settings, in their order; none where the file is not there."""
    if not path.exists():
        return []
    try:
        content = read_regular(path, _MOST_BYTES_OF_LABELS).decode("utf-8-sig")
        if "<!" in content:  # entities may grow without bound, and name other files
            raise BadFileError(f"{path}: declares a document type; save the labelling interface without it")
        root = ElementTree.fromstring(content)
    except (OSError, ElementTree.ParseError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path}: cannot be read as XML: {error}; save it again, or take it away") from None
    groups = [element for element in root.iter() if element.tag in _LABEL_TAGS]
    return list(dict.fromkeys(label.get("value", "") for group in groups for label in group.iter("Label")))


def _name_of(image: str) -> str:
    """The path in an address: /data/local-files/?d=PATH, s3://BUCKET/PATH, https://HOST/PATH, or a path as it is."""
    try:
        address = urlsplit(image)
    except ValueError:
        return image
    if local := parse_qs(address.query).get("d"):
        return local[0]
    return unquote(address.path) if address.scheme or address.query or "%" in image else image


def _without_prefix(name: str, image: str | None) -> str:
    """The name that an image had before it was uploaded."""
    folders, slash, last = name.rpartition("/")
    return folders + slash + UPLOAD_PREFIX.sub("", last) if image and "/upload/" in image else name


def _painted(annotation: _Annotation, shown: Picture, class_ids: dict[str, int], where: str) -> Canvas:
    canvas = Canvas(shown.size)
    for number, region in enumerate(annotation.result, start=1):
        at = f"{where}, region {number}"
        if region.type in _WITHOUT_SHAPE:
            continue
        if region.type not in _SHAPES:
            known = ", ".join(_SHAPES)
            raise BadFileError(
                f"{at}: {region.type[:40] or 'no type'} is no shape that is read ({known}); draw it as one"
            )
        if region.image_rotation:
            raise BadFileError(f"{at}: was drawn on a turned image; turn it back in Label Studio, or turn the file")
        if region.original_width and region.original_height:
            check_size(shown, (region.original_width, region.original_height), at)
        labels = region.value.get(region.type)
        if not (isinstance(labels, list) and len(labels) == 1 and isinstance(labels[0], str)):
            raise BadFileError(f"{at}: must have one label")
        canvas.paint(_shape(region, shown.size, at), class_ids[labels[0]])
    return canvas


def _shape(region: _Region, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W), True in the region; coordinates are percent of the image's sides."""
    shape: Part = checked(region.value, where, _SHAPES[region.type])
    if isinstance(shape, _Brush):
        if shape.format != "rle":
            raise BadFileError(f"{where}: its format is {shape.format[:40]!r}, not rle; export it again")
        return brush_to_mask(shape.rle, size, where)
    scale = np.array(size) / 100
    if isinstance(shape, _Polygon):
        corners = np.array(shape.points).reshape(-1, 2) * scale
    else:
        assert isinstance(shape, _Rectangle)
        corners = _corners(shape, scale)
    return polygons_to_mask([corners.ravel().tolist()], size, where)


def _corners(box: _Rectangle, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 2) pixels; a box is turned clockwise about its upper left corner, in degrees."""
    start, sides = np.array([box.x, box.y]) * scale, np.array([box.width, box.height]) * scale
    cosine, sine = cos(radians(box.rotation)), sin(radians(box.rotation))
    turn = np.array([[cosine, -sine], [sine, cosine]])
    return start + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * sides @ turn.T


def _regions(mask: Mask, values: dict[str, int], number: int) -> list[dict[str, Any]]:
    height, width = mask.shape
    return [
        {
            "id": f"r{number}_{value}",
            "from_name": "label",
            "to_name": "image",
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": mask_to_brush(mask == value), "brushlabels": [name]},
        }
        for name, value in values.items()
        if (mask == value).any()
    ]


def _annotation(role: str, mask: Mask, values: dict[str, int], number: int) -> dict[str, Any]:
    annotator = role.partition(":")[2]
    by = {"completed_by": int(annotator) if _NUMBER.fullmatch(annotator) else {"email": annotator}} if annotator else {}
    result = _regions(mask, values, number)
    return {"id": number, "ground_truth": role == REFERENCE, "was_cancelled": False, "result": result, **by}


def _label_config(values: dict[str, int]) -> str:
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="#{bytes(colour_of(value)).hex()}"/>'
        for name, value in values.items()
    )
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <BrushLabels name="label" toName="image">\n{labels}\n  </BrushLabels>\n</View>\n'
    )
