"""Images in one folder, their masks in another: paired by their names."""

import re
from collections.abc import Iterable
from pathlib import Path

from distseg.data.sample import Problem, Sample
from distseg.errors import UserError

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_MASK_ENDING = re.compile(r"_(segmentation|mask)$", re.IGNORECASE)
_SUPERPIXELS = re.compile(r"_superpixels$")  # ISIC 2017 keeps such a PNG beside each image


def pair(split: str, image_folder: Path, mask_folder: Path) -> tuple[list[Sample], list[Problem]]:
    if not mask_folder.is_dir():
        raise UserError(f"{image_folder}: its masks are missing; expected them in {mask_folder}")
    images, same_images = _by_id(path for path in _image_files(image_folder) if not _SUPERPIXELS.search(path.stem))
    masks, same_masks = _by_id(_image_files(mask_folder))
    ambiguous = {problem.id for problem in same_masks}
    bare = [
        Problem(id, str(images[id]), f"has no mask in {mask_folder}")
        for id in sorted(images)
        if id not in masks and id not in ambiguous
    ]
    samples = [Sample(id, split, image, masks[id]) for id, image in images.items() if id in masks]
    return samples, [*same_images, *same_masks, *bare]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)


def _by_id(paths: Iterable[Path]) -> tuple[dict[str, Path], list[Problem]]:
    """The file of each id, and the ids that several files claim."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(_MASK_ENDING.sub("", path.stem), []).append(path)
    problems = [
        Problem(id, str(same[0].parent), f"{' and '.join(p.name for p in same)} have the same id {id}; keep one")
        for id, same in files.items()
        if len(same) > 1
    ]
    return {id: same[0] for id, same in files.items() if len(same) == 1}, problems
