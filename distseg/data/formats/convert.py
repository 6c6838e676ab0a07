"""From annotation tools' files into a data set with manifest.csv, and back. Nothing is left of what fails."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from distseg.data.decode import Decoding, content_of, opened, orientation_of, read_image, read_mask
from distseg.data.formats import FORMATS, Format
from distseg.data.formats.contents import (
    ANNOTATION,
    IGNORE,
    PROPOSAL,
    REFERENCE,
    Contents,
    Item,
    Mask,
    Source,
    number_classes,
)
from distseg.data.formats.images import Picture, check_size, picture
from distseg.data.manifest_file import write_manifest
from distseg.data.sample import Annotation, Sample, fault_of_id
from distseg.errors import BadFileError, UserError
from distseg.files import folder_written_atomically, written_atomically

Progress = Callable[[Iterable[Item], int], Iterable[Item]]
"""Items as they are, shown as they pass; the number is how many there will be."""


@dataclass
class Imported:
    """What was written, for the user to look at."""

    classes: tuple[str, ...]
    """As the files name them."""
    samples: list[Sample] = field(default_factory=list)
    """In the order of the files, under the new folder."""
    overlapping: int = 0
    unannotated: int = 0
    ignored: bool = False
    """Whether masks have pixels to be ignored."""

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of `data` that read the masks."""
        names = {name: id for id, name in enumerate(_plain(self.classes))}
        return {"classes": names} | ({"ignore": [IGNORE]} if self.ignored else {})


def check_role(role: str) -> None:
    """Raises UserError unless it is reference, annotation or annotation:NAME."""
    kind, colon, annotator = role.partition(":")
    if kind not in (REFERENCE, ANNOTATION) or (colon and (kind == REFERENCE or fault_of_id(annotator) is not None)):
        fault = fault_of_id(annotator) if kind == ANNOTATION and annotator else None
        raise UserError(f"--as {role}: must be reference, annotation or annotation:NAME{f'; {fault}' if fault else ''}")


def import_annotations(
    sources: Sequence[tuple[str, Source]], to: Path, unmarked: str | None, progress: Progress
) -> Imported:
    """Write the data set of one or several files into a new folder: images as they are, masks as PNG of class ids.

    Args:
        sources: Each file with its format's name. Samples of several files are joined by id; the masks of each file
            are of other roles than those of the files before, or of other images.
        to: Gets manifest.csv, classes.yaml, images/, references/ and annotations/[NAME/].
        unmarked: What to do about images for which a file has nothing: `empty` or `skip`. None: refuse them.
        progress: Shows how far it is.

    Raises BadFileError or UserError, one line, and leaves no folder, if anything is wrong.
    """
    with folder_written_atomically(to) as folder:
        read = [(source, FORMATS[format].read(source)) for format, source in sources]
        for source, contents in read:
            check_unmarked(source, contents, unmarked)
        names = list(dict.fromkeys(name for _, contents in read for name in contents.classes))
        classes, ids = number_classes(names, to)
        result = Imported(classes, unannotated=sum(contents.unannotated for _, contents in read))
        joined = _Joined(folder)
        for source, contents in read:
            table = np.full(256, IGNORE, np.uint8)
            table[: len(contents.classes)] = [ids[name] for name in contents.classes]
            for item in progress(contents.items, contents.count):
                if item.unmarked and unmarked == "skip":
                    continue
                joined.add(replace(item, masks={role: table[mask] for role, mask in item.masks.items()}), source.path)
                result.overlapping += item.overlapping
                result.ignored |= any((mask == IGNORE).any() for mask in item.masks.values())
        if not joined.samples:
            raise UserError(f"{sources[0][1].path}: holds no annotated images")
        result.samples = [_moved(sample, folder, to) for sample in joined.samples.values()]
        (folder / "classes.yaml").write_text(_classes_yaml(result), encoding="utf-8")
        write_manifest(folder, list(joined.samples.values()))
    return result


@dataclass(frozen=True)
class Exported:
    count: int
    without: int
    """Samples that have no mask of the role, and were left out."""
    lost: tuple[str, ...]
    """What the format has no place for."""


def export_annotations(
    samples: Sequence[Sample],
    classes: tuple[str, ...],
    format: str,
    role: str | None,
    to: Path,
    decoding: Decoding,
    read: Callable[[Path], Mask],
    progress: Progress,
) -> Exported:
    """Write a data set as an annotation tool reads it: images as they are, and the masks of `role`.

    `role` may be None where there is but one, and where the format holds those of all. `read` gives the class ids of a
    mask's file. Raises UserError or BadFileError, and leaves nothing, if anything is wrong.
    """
    kind = FORMATS[format]
    role = _chosen(role, samples, kind, format)
    with_masks = [sample for sample in samples if role is None or role in sample.files]
    if not with_masks:
        raise UserError(f"--as {role}: no image has such a mask; there are {', '.join(_roles(samples))}")
    items = progress(_items(with_masks, role, kind, decoding, read), len(with_masks))
    with _new_place(to, kind) as place:
        kind.write(items, classes, place)
    lost = ("groups",) if any(sample.group for sample in with_masks) and not kind.keeps_groups else ()
    return Exported(len(with_masks), len(samples) - len(with_masks), lost)


def export_proposals(
    samples: Sequence[Sample],
    proposals: Sequence[Path],
    classes: tuple[str, ...],
    format: str,
    to: Path,
    decoding: Decoding,
) -> None:
    """Write images with a mask each that is to be corrected, in the order given, as an annotation tool opens them.

    Raises UserError or BadFileError, and leaves nothing, if anything is wrong.
    """
    kind = FORMATS[format]

    def items() -> Iterator[Item]:
        for sample, path in zip(samples, proposals, strict=True):
            shown = _picture(sample.image, kind.needs_png, decoding)
            mask = read_mask(path, decoding)
            check_size(shown, mask.shape[::-1], str(path))
            yield Item(sample.id, sample.split, shown, {PROPOSAL: mask}, sample.group)

    with _new_place(to, kind) as place:
        kind.write(items(), classes, place)


class _Joined:
    """Samples by id, written as they come."""

    def __init__(self, folder: Path) -> None:
        self.samples: dict[str, Sample] = {}
        self._folder = folder
        self._images: dict[str, tuple[bytes, str]] = {}

    def add(self, item: Item, where: Path) -> None:
        """Raises BadFileError for another image of the same id, and for a second mask of one role."""
        id, content = item.id, item.picture.content
        digest = hashlib.sha256(content).digest()
        if id not in self.samples:
            image = self._folder / "images" / f"{id}{item.picture.suffix}"
            _write(image, content)
            self._images[id] = digest, item.picture.name
            self.samples[id] = Sample(id, item.split, image, group=item.group)
        known = self.samples[id]
        if self._images[id][0] != digest:
            raise BadFileError(
                f"{where}: {item.picture.name} and {self._images[id][1]} are different images with the id {id}; "
                "rename one"
            )
        for kind, old, new in (("split", known.split, item.split), ("group", known.group, item.group)):
            if old and new and old != new:
                raise BadFileError(f"{where}: {id} is of the {kind} {new}, and of {old} in a file before; choose one")
        known = replace(known, split=known.split or item.split, group=known.group or item.group)
        for role, mask in item.masks.items():
            if role in known.files:
                raise BadFileError(f"{where}: {id} has a second mask as {role}; keep one, or say whose it is with --as")
            annotator = role.partition(":")[2]
            if annotator and (fault := fault_of_id(annotator)) is not None:
                raise BadFileError(f"{where}: {id}: an annotator's {fault}")
            if role == REFERENCE:
                known = self._with_reference(known, mask)
            else:
                known = self._with_annotation(known, annotator, mask)
        self.samples[id] = known

    def _with_reference(self, sample: Sample, mask: Mask) -> Sample:
        return replace(sample, reference=self._written(f"references/{sample.id}.png", mask))

    def _with_annotation(self, sample: Sample, annotator: str, mask: Mask) -> Sample:
        path = self._written(f"annotations/{annotator}/{sample.id}.png", mask)
        annotations = (*sample.annotations, Annotation(annotator, path))
        return replace(sample, annotations=tuple(sorted(annotations, key=lambda each: each.annotator)))

    def _written(self, name: str, mask: Mask) -> Path:
        path = self._folder / name
        _write(path, _png(mask))
        return path


def check_unmarked(source: Source, contents: Contents, unmarked: str | None) -> None:
    """Raises UserError where nobody has said what images mean for which a file has nothing."""
    if contents.unmarked and unmarked is None:
        raise UserError(
            f"{source.path}: has nothing for {contents.unmarked} of {contents.count} images: add --unmarked empty if "
            "they show nothing, or --unmarked skip if nobody has annotated them"
        )


def _plain(classes: tuple[str, ...]) -> list[str]:
    """Names that a config may have: of letters, digits, blanks, `.`, `_` and `-`, at most 64, and each once."""
    names: list[str] = []
    for id, name in enumerate(classes):
        plain = re.sub(r"[^\w. -]", "-", name)[:64].strip(". -") or f"class {id}"
        names.append(plain if plain not in (*names, *classes[:id], *classes[id + 1 :]) else f"class {id}")
    return names


def _classes_yaml(result: Imported) -> str:
    """A part of a config; JSON is YAML."""
    lines = [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in result.keys.items()]
    return "\n".join(["# For the config that trains on this folder.", "data:", *lines, ""])


def _moved(sample: Sample, before: Path, after: Path) -> Sample:
    def moved(path: Path) -> Path:
        return after / path.relative_to(before)

    return replace(
        sample,
        image=moved(sample.image),
        reference=sample.reference and moved(sample.reference),
        annotations=tuple(Annotation(each.annotator, moved(each.mask)) for each in sample.annotations),
    )


def _roles(samples: Iterable[Sample]) -> list[str]:
    return sorted({key for sample in samples for key in sample.files} - {"image"})


def _chosen(role: str | None, samples: Sequence[Sample], kind: Format, format: str) -> str | None:
    if role is not None or kind.all_roles:
        return role
    roles = _roles(samples)
    if len(roles) != 1:
        raise UserError(f"--export {format}: holds one mask an image; choose with --as {' | '.join(roles)}")
    return roles[0]


def _items(
    samples: Iterable[Sample], role: str | None, kind: Format, decoding: Decoding, read: Callable[[Path], Mask]
) -> Iterator[Item]:
    for sample in samples:
        shown = _picture(sample.image, kind.needs_png, decoding)
        masks = {}
        for key, path in sample.files.items():
            if key == "image" or role not in (None, key):
                continue
            masks[key] = read(path)
            check_size(shown, masks[key].shape[::-1], str(path))
        yield Item(sample.id, sample.split, shown, masks, sample.group)


def _picture(path: Path, as_png: bool, decoding: Decoding) -> Picture:
    """The file as it is, unless it must be PNG, or tools would turn it where the masks are not turned."""
    content = content_of(path, decoding)
    with opened(path, decoding, content) as image:
        turned = decoding.orientation == "ignore" and orientation_of(image) != 1
    if not (as_png or turned):
        return picture(str(path), content, decoding)
    pixels = read_image(path, decoding)
    height, width = pixels.shape[:2]
    return Picture(str(path), ".png", _png(pixels[..., ::-1]), (width, height))


def _new_place(to: Path, kind: Format) -> AbstractContextManager[Path]:
    if not kind.is_file:
        return folder_written_atomically(to)
    if to.exists():
        raise UserError(f"{to}: is there already; choose a new file, or move it away")
    return written_atomically(to)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()
