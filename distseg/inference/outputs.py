"""What is written of a prediction: mask, probabilities, outlines, an overlay, and a line of the table."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from distseg.data.classes import ClassMap
from distseg.data.decode import Decoding, read_canvas, read_mask
from distseg.data.formats.coco import parts
from distseg.data.geometry import Frame
from distseg.data.resize import resize_mask
from distseg.files import write_atomically
from distseg.inference.inputs import Item
from distseg.inference.predictor import Prediction, Probabilities
from distseg.text import for_csv

Contours = Literal["none", "geojson", "coco"]
_OVERLAY_SIDE = 1600
_LINE = (233, 180, 86)  # BGR of figures.py's colour of true masks
_RIM = (0, 0, 0)


@dataclass(frozen=True)
class Wanted:
    """What to write beside the masks."""

    probabilities: Probabilities = "none"
    contours: Contours = "none"
    overlays: bool = False


class Record(BaseModel):
    """What is kept of an image that is done: a row of the table, and of which file it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    file: str
    bytes: int
    mtime_ns: int
    height: int
    width: int
    areas: tuple[int, ...]
    components: tuple[int, ...]
    """8-connected regions of each class but background."""
    confidence: float
    seconds: float


class Outputs:
    """The files of a folder of predictions, by id."""

    def __init__(self, folder: Path, wanted: Wanted, decoding: Decoding) -> None:
        self.folder = folder
        self.wanted = wanted
        self._decoding = decoding

    @property
    def classes(self) -> ClassMap:
        return self._decoding.classes

    def mask(self, id: str) -> Path:
        return self.folder / "masks" / f"{id}.png"

    def probabilities(self, id: str) -> Path:
        kind = self.wanted.probabilities
        return self.folder / "probabilities" / f"{id}.{'npy' if kind == 'logits' else kind}"

    def files(self, id: str) -> list[Path]:
        files = [self.mask(id)]
        if self.wanted.probabilities != "none":
            files.append(self.probabilities(id))
        if self.wanted.contours == "geojson":
            files.append(self.folder / "contours" / f"{id}.geojson")
        if self.wanted.overlays:
            files.append(self.folder / "overlays" / f"{id}.jpg")
        return files

    def make_folders(self) -> None:
        for file in self.files("any"):
            file.parent.mkdir(exist_ok=True)

    def write(self, item: Item, prediction: Prediction, seconds: float) -> Record:
        """Write the files of one image; of what is written of it, `seconds` is no part. Raises StorageError."""
        status = item.path.stat()
        mask = prediction.mask
        contents: list[bytes | str] = [self.classes.encode(mask)]
        if prediction.probabilities is not None:
            contents.append(_probabilities(prediction.probabilities, self.wanted.probabilities, self.classes.names))
        if self.wanted.contours == "geojson":
            contents.append(_geojson(item.id, mask, self.classes.names))
        if self.wanted.overlays:
            contents.append(_overlay(item.path, mask, self._decoding))
        for path, content in zip(self.files(item.id), contents, strict=True):
            write_atomically(path, content, durable=False)
        return Record(
            id=item.id,
            file=str(item.path),
            bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            height=mask.shape[0],
            width=mask.shape[1],
            areas=prediction.areas,
            components=tuple(count_components(mask, id) for id in range(1, len(prediction.areas))),
            confidence=round(prediction.confidence, 6),
            seconds=round(seconds, 4),
        )

    def write_coco(self, records: Sequence[Record]) -> None:
        """contours.json of the masks that are there: run lengths, which hold a mask to the pixel."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        names = self.classes.names
        for number, record in enumerate(records, start=1):
            name = Path(record.file).name
            images.append({"id": number, "file_name": name, "width": record.width, "height": record.height})
            mask = read_mask(self.mask(record.id), self._decoding)
            for category in range(1, len(names)):
                for part in parts(mask == category):
                    place = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                    annotations.append(place | part)
        categories = [{"id": id, "name": name, "supercategory": ""} for id, name in enumerate(names) if id]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_atomically(self.folder / "contours.json", json.dumps(content, ensure_ascii=False))


def table(records: Sequence[Record], names: Sequence[str]) -> str:
    """CSV: a row an image. Areas are pixels of the file; `components` are 8-connected regions. Times come last.

    Of several classes there is an area and a number of components for each, beside those of all together.
    """
    several = len(names) > 2
    header = ["id", "file", "height", "width", "area", "share", "components"]
    if several:
        header += [f"{what}:{name}" for name in names[1:] for what in ("area", "components")]
    lines = [[*map(for_csv, header), "confidence", "seconds"]]
    for record in records:
        area = sum(record.areas[1:])
        row = [for_csv(record.id), for_csv(record.file), str(record.height), str(record.width), str(area)]
        row += [f"{area / (record.height * record.width):.6f}", str(sum(record.components))]
        if several:
            each = zip(record.areas[1:], record.components, strict=True)
            row += [str(number) for pair in each for number in pair]
        lines.append([*row, f"{record.confidence:.6f}", f"{record.seconds:.4f}"])
    return "".join(",".join(_quoted(cell) for cell in line) + "\n" for line in lines)


def record_line(record: Record) -> str:
    return json.dumps(record.model_dump(mode="json")) + "\n"  # in ASCII: a line of bytes that no kill cuts in a letter


def count_components(mask: NDArray[np.uint8], id: int) -> int:
    """8-connected regions of a class. By their outer outlines: labels would take four times the mask's memory."""
    _, hierarchy = cv2.findContours((mask == id).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return 0 if hierarchy is None else int((hierarchy[0, :, 3] < 0).sum())


def _quoted(cell: str) -> str:
    quoted = cell.replace('"', '""')
    return f'"{quoted}"' if set(cell) & set(',"') else cell


def _probabilities(values: NDArray[Any], kind: Probabilities, names: Sequence[str]) -> bytes:
    if kind == "png":
        return cv2.imencode(".png", values)[1].tobytes()
    content = io.BytesIO()
    if kind == "logits":
        np.save(content, values)
        return content.getvalue()
    np.savez_compressed(content, probabilities=values, classes=np.array(list(names)))
    return content.getvalue()


def _geojson(id: str, mask: NDArray[np.uint8], names: Sequence[str]) -> str:
    """A FeatureCollection with a polygon a region, holes included, in pixels: x to the right, y downwards.

    Outlines pass through the centres of a region's border pixels, the first of which is at (0, 0); regions that are too
    thin for that are boxes around them.
    """
    features = []
    for category in range(1, len(names)):
        outlines, hierarchy = cv2.findContours(
            (mask == category).view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
        )
        for number, outline in enumerate(outlines):
            if hierarchy[0, number, 3] >= 0:
                continue
            rings = [_ring(outline)]
            hole = hierarchy[0, number, 2]
            while hole >= 0:
                rings.append(_ring(outlines[hole]))
                hole = hierarchy[0, hole, 0]
            geometry = {"type": "Polygon", "coordinates": rings}
            properties = {"image": id, "class": names[category]}
            features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)


def _ring(outline: NDArray[np.int32]) -> list[list[float]]:
    points = outline[:, 0].astype(float)
    if len(points) < 3:
        (left, top), (right, bottom) = points.min(axis=0) - 0.5, points.max(axis=0) + 0.5
        points = np.array([(left, top), (left, bottom), (right, bottom), (right, top)])
    return [[float(x), float(y)] for x, y in [*points, points[0]]]


def _overlay(path: Path, mask: NDArray[np.uint8], decoding: Decoding) -> bytes:
    """A JPEG of the image with outlines drawn on it, of at most 1600 pixels a side."""
    frame = Frame(min(_OVERLAY_SIDE, max(mask.shape)), "letterbox")
    canvas, size = read_canvas(path, frame, decoding)
    place = frame.place(*size)
    shown = np.ascontiguousarray(canvas[place.picture][..., ::-1])
    small = resize_mask(mask, place.height, place.width)
    for category in np.unique(small[small > 0]).tolist():
        outlines, _ = cv2.findContours((small == category).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        for colour, width in ((_RIM, 4), (_LINE, 2)):
            cv2.drawContours(shown, outlines, -1, colour, width, cv2.LINE_AA)
    return cv2.imencode(".jpg", shown, (cv2.IMWRITE_JPEG_QUALITY, 90))[1].tobytes()
