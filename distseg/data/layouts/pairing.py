"""Images in one folder, their masks in another: paired by their names, sub-folders included."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from distseg.data.sample import Problem, Sample, fault_of_id
from distseg.errors import UserError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_MASK_ENDING = re.compile(r"_(segmentation|mask)$", re.IGNORECASE)
_SUPERPIXELS = re.compile(r"_superpixels$")  # ISIC 2017 keeps such a PNG beside each image
_SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information"}


def pair(split: str, image_folder: Path, mask_folder: Path) -> tuple[list[Sample], list[Problem]]:
    """The samples of two folders, and what is wrong: images without a mask, ids that are no ids or occur twice."""
    if not mask_folder.is_dir():
        raise UserError(f"{image_folder}: its masks are missing; expected them in {mask_folder}")
    images, same_images = _by_id(path for path in image_files(image_folder) if not _SUPERPIXELS.search(path.stem))
    masks, same_masks = _by_id(image_files(mask_folder))
    ambiguous = {problem.id for problem in same_masks}
    bare = [
        Problem(id, str(images[id]), f"has no mask in {mask_folder}")
        for id in sorted(images)
        if id not in masks and id not in ambiguous
    ]
    unfit = [Problem(id, str(images[id]), fault) for id in sorted(images) if (fault := fault_of_id(id)) is not None]
    refused = {problem.id for problem in unfit}
    samples = [Sample(id, split, image, masks[id]) for id, image in images.items() if id in masks and id not in refused]
    return samples, [*same_images, *same_masks, *bare, *unfit]


def image_files(folder: Path) -> list[Path]:
    """The images under `folder` and its sub-folders, sorted; files of the operating system are none."""
    found, seen = [], set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_of_the_system(name))
        paths = (Path(current, name) for name in names if not _is_of_the_system(name))
        found += [path for path in paths if path.suffix.lower() in _IMAGE_SUFFIXES]
    return sorted(found)


def _is_of_the_system(name: str) -> bool:
    """Hidden files, such as macOS's ._NAME beside each file and .DS_Store, and folders that systems make."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _by_id(paths: Iterable[Path]) -> tuple[dict[str, Path], list[Problem]]:
    """The file of each id, and the ids that several files claim."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(_MASK_ENDING.sub("", path.stem), []).append(path)
    problems = [
        Problem(id, str(same[0].parent), f"{_names(same)} have the same id {id}; keep one")
        for id, same in files.items()
        if len(same) > 1
    ]
    return {id: same[0] for id, same in files.items() if len(same) == 1}, problems


def _names(paths: list[Path]) -> str:
    """Their names, or where they lie in several folders their places in the one that holds all."""
    top = Path(os.path.commonpath([path.parent for path in paths]))
    return " and ".join(str(path.relative_to(top)) for path in paths)
