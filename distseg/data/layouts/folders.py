"""images/ beside folders of masks, for all data or in a folder a split.

    images/ID.jpg
    references/ID.png              the experts' masks
    annotations/ID.png             cheap masks: of nobody by name, as here,
    annotations/NAME/ID.png        or of several annotators, a folder each
    annotations/ID_NAME.png        or by the ends of their names
    masks/ID.png                   masks of which nobody has said what they are

Ids may be followed by _segmentation or _mask. Beside references, `masks` are annotations, and beside annotations they
are references. Other names that are known for each folder are listed below.
"""

from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.layouts.pairing import Masks, add_masks, image_files, images_by_id, is_of_the_system, paired
from distseg.data.sample import Problem, Sample
from distseg.errors import UserError

IMAGES = ("images", "image", "imgs", "img")
REFERENCES = ("references", "reference", "experts", "expert", "ground_truth", "groundtruth", "gold")
ANNOTATIONS = ("annotations", "annotation", "cheap", "noisy", "noisy_masks", "crowd")
MASKS = ("masks", "mask", "labels", "label", "segmentations")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read(root: Path) -> Listing | None:
    whole = _folder(root, IMAGES)
    if whole is not None:
        splits = _inside(whole)
        if splits:
            return _listing([(split, path, root, path.name) for split, path in splits.items()])
        return _listing([("train", whole, root, "")])
    parts = [(split, images, path, "") for split, path in _inside(root).items() if (images := _folder(path, IMAGES))]
    return _listing(parts) if parts else None


def _listing(parts: list[tuple[str, Path, Path, str]]) -> Listing | None:
    """parts: (split, folder of images, folder in which those of masks lie, their sub-folder of this split)."""
    if not any(_folder(beside, REFERENCES + ANNOTATIONS + MASKS) for _, _, beside, _ in parts):
        return None
    samples: list[Sample] = []
    problems: list[Problem] = []
    for split, folder, beside, inner in parts:
        images, odd = images_by_id(folder)
        masks = Masks(refused=frozenset(problem.id for problem in odd))
        _add_all_masks(masks, beside, inner, images)
        found, bare = paired(split, images, masks)
        samples += found
        problems += [*odd, *bare]
    return Listing(samples, problems, frozenset(split for split, *_ in parts))


def _add_all_masks(masks: Masks, beside: Path, inner: str, images: dict[str, Path]) -> None:
    references, annotations, unsaid = (_folder(beside, names) for names in (REFERENCES, ANNOTATIONS, MASKS))
    if references and annotations and unsaid:
        raise UserError(
            f"{unsaid}: are these references or annotations? There are {references.name}/ and {annotations.name}/ "
            f"already; move {unsaid.name}/ away, or list the files in a manifest.csv"
        )
    references, annotations = (
        references or (unsaid if annotations else None),
        annotations or (unsaid if references else None),
    )
    if references:
        add_masks(masks, references / inner, images, "reference")
    if annotations:
        for annotator, folder in _annotators(annotations / inner).items():
            add_masks(masks, folder, images, "annotation", annotator)
    if not masks.folders and unsaid:
        add_masks(masks, unsaid / inner, images, None)


def _annotators(folder: Path) -> dict[str, Path]:
    """The folder of each annotator; under an empty name `folder` itself where it has masks of its own or no folder."""
    inside = [path for path in sorted(folder.iterdir()) if not is_of_the_system(path.name)] if folder.is_dir() else []
    folders = {path.name: path for path in inside if path.is_dir() and image_files(path)}
    return folders if folders and not any(path.parent == folder for path in image_files(folder)) else {"": folder}


def _folder(beside: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the folders of these names, in any case of letters."""
    there = {path.name.lower(): path for path in sorted(beside.iterdir(), reverse=True) if path.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _inside(folder: Path) -> dict[str, Path]:
    """The splits that `folder` has a sub-folder for, if those of the training images are among them."""
    found = {split: path for split, names in SPLIT_FOLDERS.items() if (path := _folder(folder, names)) is not None}
    return found if "train" in found else {}
