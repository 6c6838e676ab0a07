"""Images in one folder, their masks in others: paired by their names, sub-folders included."""

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from distseg.data.sample import Annotation, Problem, Sample, fault_of_id
from distseg.errors import UserError
from distseg.text import for_terminal

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_MASK_ENDING = re.compile(r"_(segmentation|mask)$", re.IGNORECASE)
_SUPERPIXELS = re.compile(r"_superpixels$")  # ISIC 2017 keeps such a PNG beside each image
_SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information"}
_log = logging.getLogger(__name__)


@dataclass
class Masks:
    """The masks that were found for some images, by id."""

    references: dict[str, Path] = field(default_factory=dict)
    annotations: dict[str, list[Annotation]] = field(default_factory=lambda: defaultdict(list))
    problems: list[Problem] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    refused: frozenset[str] = frozenset()
    """Ids whose image is refused: their masks are no strangers."""


def pair(split: str, image_folder: Path, mask_folder: Path) -> tuple[list[Sample], list[Problem]]:
    """The samples of two folders, and what is wrong with the others. One mask an image is its reference.

    Several are annotations: a mask belongs to the image whose id it is named by, alone or with `_NAME` of an annotator.
    """
    if not mask_folder.is_dir():
        raise UserError(f"{image_folder}: its masks are missing; expected them in {mask_folder}")
    images, problems = images_by_id(image_folder)
    masks = Masks(refused=frozenset(problem.id for problem in problems))
    add_masks(masks, mask_folder, images, role=None)
    samples, bare = paired(split, images, masks)
    return samples, [*problems, *bare]


def images_by_id(folder: Path) -> tuple[dict[str, Path], list[Problem]]:
    """The image of each id, and ids that several files claim or that are no ids."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(folder):
        if not _SUPERPIXELS.search(path.stem):
            files[_MASK_ENDING.sub("", _composed(path.stem))].append(path)
    images, problems = {}, []
    for id, same in files.items():
        fault = fault_of_id(id)
        if len(same) > 1:
            problems.append(Problem(id, str(same[0].parent), f"{_names(same)} have the same id {id}; keep one"))
        elif fault is not None:
            problems.append(Problem(id, str(same[0]), fault))
        else:
            images[id] = same[0]
    return images, problems


def add_masks(masks: Masks, folder: Path, images: dict[str, Path], role: str | None, annotator: str = "") -> None:
    """Add what `folder` holds for `images`. `role` is reference or annotation, or None where nobody has said it.

    Then a single mask without an annotator's name is a reference, and masks with names are annotations. `annotator` is
    whose masks these are, where the folder says it.
    """
    masks.folders.append(folder)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    strangers = []
    for path in image_files(folder):
        owner = _owner(path.stem, images)
        if owner is None:
            if _owner(path.stem, masks.refused) is None:
                strangers.append(path)
        else:
            found[owner[0]][annotator or owner[1]].append(path)
    if strangers:
        first = for_terminal(strangers[0].name)
        _log.warning("%s: %d masks belong to no image, the first is %s", folder, len(strangers), first)
    for id, by_annotator in found.items():
        problem = _fault(by_annotator, role)
        if problem is not None:
            masks.problems.append(Problem(id, str(folder), problem.replace("{id}", id)))
        elif role == "reference" or (role is None and "" in by_annotator):
            masks.references[id] = by_annotator[""][0]
        else:
            masks.annotations[id] += [Annotation(name, path) for name, [path] in by_annotator.items()]


def paired(split: str, images: dict[str, Path], masks: Masks) -> tuple[list[Sample], list[Problem]]:
    """The samples of a split, and the images without a sound mask."""
    refused = {problem.id for problem in masks.problems}
    samples, problems = [], list(masks.problems)
    for id in sorted(images.keys() - refused):
        reference, annotations = masks.references.get(id), sorted(masks.annotations.get(id, []), key=_annotator)
        if reference is None and not annotations:
            places = " or ".join(str(folder) for folder in masks.folders)
            problems.append(Problem(id, str(images[id]), f"has no mask in {places}"))
        else:
            samples.append(Sample(id, split, images[id], reference, tuple(annotations)))
    return samples, problems


def image_files(folder: Path) -> list[Path]:
    """The images under `folder` and its sub-folders, sorted; files of the operating system are none."""
    found, seen = [], set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_of_the_system(name))
        paths = (Path(current, name) for name in names if not is_of_the_system(name))
        found += [path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES]
    return sorted(found)


def is_of_the_system(name: str) -> bool:
    """Hidden files, such as macOS's ._NAME beside each file and .DS_Store, and folders that systems make."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _owner(stem: str, images: Collection[str]) -> tuple[str, str] | None:
    """(id, annotator) of a mask's name: the longest id that it is, or begins with, before `_`."""
    plain = _MASK_ENDING.sub("", _composed(stem))
    if plain in images:
        return plain, ""
    parts = plain.split("_")
    for count in range(len(parts) - 1, 0, -1):
        id, rest = "_".join(parts[:count]), "_".join(parts[count:])
        if id in images:
            return id, re.sub(r"^(segmentation|mask)_", "", rest, flags=re.IGNORECASE)
    return None


def _composed(name: str) -> str:
    """With composed accents, so that files that were copied from one file system to another still pair."""
    return unicodedata.normalize("NFC", name)


def _fault(by_annotator: dict[str, list[Path]], role: str | None) -> str | None:
    for name, same in by_annotator.items():
        if len(same) > 1:
            return f"{_names(same)} have the same id {{id}}; keep one"
        if name and (fault := fault_of_id(name)) is not None:
            return fault.replace("id", "annotator", 1)
    files = _names([path for same in by_annotator.values() for path in same])
    if role == "reference" and by_annotator.keys() != {""}:
        return f"{files} are references of {{id}}; keep one, named by the id alone"
    if role is None and "" in by_annotator and len(by_annotator) > 1:
        return f"{files} are masks of {{id}}, and which is the expert's is not said; put it into a folder references/"
    return None


def _annotator(annotation: Annotation) -> str:
    return annotation.annotator


def _names(paths: Iterable[Path]) -> str:
    """Their names, or where they lie in several folders their places in the one that holds all."""
    paths = list(paths)
    top = Path(os.path.commonpath([path.parent for path in paths]))
    return " and ".join(str(path.relative_to(top)) for path in paths)
