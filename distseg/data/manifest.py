"""Which images there are, which mask belongs to which, and who is in which split.

Image and mask are paired by id, never by the order in which a file system lists them. Every random choice orders the
samples by a hash of (seed, id), so that it depends on neither that order nor the presence of other samples.

Layouts (`data.layout`), in the order in which `auto` looks for them:

    manifest  manifest.csv with the columns id, split, image, mask and optionally noisy_mask; paths relative to the root
    isic      the challenge's own folders, as unpacked, of 2016, 2017 or 2018 (lesion segmentation)
    ph2       IMD*/IMD*_Dermoscopic_Image/IMD*.bmp beside IMD*_lesion/IMD*_lesion.bmp
    folders   images/ beside masks/: the same stem, the mask's optionally followed by _segmentation or _mask

No file outside the root is read: a manifest's paths are relative and without '..', and a symbolic link may not lead
out, unless `data.follow_links` allows it; the root may itself be a link. What the files hold is for checks.py.
"""

import csv
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from distseg.data.config import DataConfig
from distseg.data.seeding import stable_hash
from distseg.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    id: str
    split: str
    """train, val or test."""
    image: Path
    mask: Path
    """The true mask."""
    noisy_mask: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """What there is of image, mask and noisy_mask."""
        files = {"image": self.image, "mask": self.mask, "noisy_mask": self.noisy_mask}
        return {kind: path for kind, path in files.items() if path}


@dataclass(frozen=True)
class Problem:
    """Why a sample, or a row of the manifest, cannot be used."""

    id: str
    """Empty where a row has none."""
    file: str
    """The file, or the manifest's row."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


Listing = tuple[list[Sample], list[Problem]]


def read_samples(config: DataConfig, seed: int) -> list[Sample]:
    """`survey`'s samples; raises UserError for the first of its problems unless `config.on_bad` is `skip`."""
    samples, problems = survey(config, seed)
    if problems and config.on_bad == "refuse":
        raise UserError(first_of(problems))
    return samples


def survey(config: DataConfig, seed: int) -> tuple[list[Sample], list[Problem]]:
    """All sound samples under `config.root`, sorted by id, and what is wrong with the others.

    Problems are malformed rows of a manifest, an image without a mask, an id that occurs twice, an id or a file in two
    splits, and files outside the root; where several samples contradict each other, none of them is sound. A val or
    test split that the data does not bring is drawn by `seed` from its training images (`data.val_fraction`,
    `data.test_fraction`). Raises UserError where there is no data to be listed.
    """
    if not config.root.is_dir():
        raise UserError(f"data.root {config.root}: no such folder")
    layouts = _LAYOUTS if config.layout == "auto" else {config.layout: _LAYOUTS[config.layout]}
    for read in layouts.values():
        found = read(config.root)
        if found is not None:
            break
    else:
        raise UserError(
            f"data.root {config.root}: no data in the layout {' | '.join(layouts)} (manifest.csv; the ISIC challenge's "
            "…Training… folders; PH2's IMD* folders; images/ and masks/)"
        )
    samples, problems = found
    if not samples and not problems:
        raise UserError(f"data.root {config.root}: holds no images")
    samples = _draw_missing_splits(samples, config, seed)
    problems = [*problems, *_contradictions(samples)]
    if not config.follow_links:
        problems += _outside(samples, config.root)
    unsound = {problem.id for problem in problems}
    sound = sorted((sample for sample in samples if sample.id not in unsound), key=lambda sample: sample.id)
    return sound, sorted(problems, key=lambda problem: (problem.id, problem.file))


def first_of(problems: list[Problem]) -> str:
    return str(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def split_clean(samples: list[Sample], clean_count: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the K clean training samples, the others), each sorted by id; a smaller K picks a subset of a larger one's.

    Raises UserError where K would leave the noisy stream without an image.
    """
    train = sorted(
        (sample for sample in samples if sample.split == "train"), key=lambda s: stable_hash(seed, "clean", s.id)
    )
    if clean_count >= len(train):
        raise UserError(
            f"data.clean_count {clean_count}: the training split has {len(train)} images and the noisy stream needs at "
            f"least one; set data.clean_count to at most {max(len(train) - 1, 0)}"
        )
    clean, noisy = train[:clean_count], train[clean_count:]
    return sorted(clean, key=lambda s: s.id), sorted(noisy, key=lambda s: s.id)


def _contradictions(samples: list[Sample]) -> list[Problem]:
    """Ids that occur twice, and files that are in two splits; each sample that takes part is named."""
    by_id: dict[str, list[Sample]] = {}
    by_file: dict[Path, list[tuple[Sample, Path]]] = {}
    for sample in samples:
        by_id.setdefault(sample.id, []).append(sample)
        for path in sample.files.values():
            by_file.setdefault(_resolved(path), []).append((sample, path))
    problems = []
    for id, same in by_id.items():
        if len(same) > 1:
            splits = {sample.split for sample in same}
            where = f"twice in {same[0].split}" if len(splits) == 1 else "in two splits"
            reason = f"the id {id} is {where}; ids must be unique"
            problems += [Problem(id, str(sample.image), reason) for sample in same]
    for (first, first_path), *others in by_file.values():
        for other, other_path in others:
            if other.split != first.split and other.id != first.id:
                reason = f"in the {first.split} split as {first.id} and in {other.split} as {other.id}; keep it in one"
                problems += [Problem(first.id, str(first_path), reason), Problem(other.id, str(other_path), reason)]
    return list(dict.fromkeys(problems))


def _outside(samples: list[Sample], root: Path) -> list[Problem]:
    inside = _resolved(root)
    return [
        Problem(
            sample.id,
            str(path),
            f"a symbolic link that leads out of data.root, to {target}; copy the file, or set data.follow_links=true",
        )
        for sample in samples
        for path in sample.files.values()
        if not (target := _resolved(path)).is_relative_to(inside)
    ]


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle, which reading the file will tell
        return path.absolute()


def _draw_missing_splits(samples: list[Sample], config: DataConfig, seed: int) -> list[Sample]:
    present = {sample.split for sample in samples}
    train = sorted((s for s in samples if s.split == "train"), key=lambda s: stable_hash(seed, "split", s.id))
    drawn: dict[str, str] = {}
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split not in present:
            first = len(drawn)
            drawn |= {sample.id: split for sample in train[first : first + round(fraction * len(train))]}
    return [replace(s, split=drawn[s.id]) if s.split == "train" and s.id in drawn else s for s in samples]


# --- manifest ---------------------------------------------------------------------------------------------------------

_COLUMNS = ("id", "split", "image", "mask")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")  # an id names files that are written, so it must not hold a path


def _read_manifest(root: Path) -> Listing | None:
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        return None
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
            columns = rows[0].keys() if rows else _COLUMNS
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest}: cannot be read as UTF-8 CSV: {error}") from None
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise UserError(f"{manifest}: lacks the column {missing[0]}; the header is {','.join(_COLUMNS)}[,noisy_mask]")
    parsed = [_parse_row(root, row, f"{manifest}, row {number}") for number, row in enumerate(rows, start=1)]
    return [row for row in parsed if isinstance(row, Sample)], [row for row in parsed if isinstance(row, Problem)]


def _parse_row(root: Path, row: dict[str, str | None], where: str) -> Sample | Problem:
    values = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, "noisy_mask")}
    empty = [column for column in _COLUMNS if not values[column]]
    if empty:
        return Problem(values["id"], where, f"{empty[0]} is empty")
    if not _ID.fullmatch(values["id"]):
        return Problem(values["id"], where, f"id {values['id']!r} must be letters, digits, '.', '_', '-' and blanks")
    if values["split"] not in SPLITS:
        return Problem(values["id"], where, f"split {values['split']!r} must be train, val or test")
    paths = {column: values[column] for column in ("image", "mask", "noisy_mask") if values[column]}
    for column, path in paths.items():
        if _leaves_root(path):
            reason = f"{column} {path!r} leaves the folder; paths are relative to it, without '..'"
            return Problem(values["id"], where, reason)
    return Sample(values["id"], values["split"], **{column: root / path for column, path in paths.items()})


def _leaves_root(path: str) -> bool:
    return any(".." in kind(path).parts or kind(path).anchor for kind in (PurePosixPath, PureWindowsPath))


# --- folders ----------------------------------------------------------------------------------------------------------

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_MASK_ENDING = re.compile(r"_(segmentation|mask)$", re.IGNORECASE)
_SUPERPIXELS = re.compile(r"_superpixels$")  # ISIC 2017 keeps such a PNG beside each image

_ISIC_FOLDERS = {
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
}
_ISIC_PARTS = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}


def _read_isic(root: Path) -> Listing | None:
    found = [
        [
            (split, root / images.format(part), root / masks.format(part))
            for part, split in _ISIC_PARTS.items()
            if (root / images.format(part)).is_dir()
        ]
        for images, masks in _ISIC_FOLDERS.values()
    ]
    challenges = [parts for parts in found if parts]
    if not challenges:
        return None
    if len(challenges) > 1:
        years = ", ".join(str(year) for year, parts in zip(_ISIC_FOLDERS, found, strict=True) if parts)
        raise UserError(f"data.root {root}: holds several ISIC challenges ({years}), which share images; keep one")
    pairs = [_pair(split, images, masks) for split, images, masks in challenges[0]]
    return [sample for samples, _ in pairs for sample in samples], [each for _, problems in pairs for each in problems]


def _read_ph2(root: Path) -> Listing | None:
    for folder in (root, root / "PH2 Dataset images", root / "PH2Dataset" / "PH2 Dataset images"):
        ids = [case.name for case in folder.glob("IMD*") if (case / f"{case.name}_Dermoscopic_Image").is_dir()]
        if ids:
            samples = [
                Sample(
                    id,
                    "train",
                    folder / id / f"{id}_Dermoscopic_Image" / f"{id}.bmp",
                    folder / id / f"{id}_lesion" / f"{id}_lesion.bmp",
                )
                for id in ids
            ]
            return samples, []
    return None


def _read_folders(root: Path) -> Listing | None:
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        return None
    return _pair("train", root / "images", root / "masks")


def _pair(split: str, image_folder: Path, mask_folder: Path) -> Listing:
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


_LAYOUTS: dict[str, Callable[[Path], Listing | None]] = {
    "manifest": _read_manifest,
    "isic": _read_isic,
    "ph2": _read_ph2,
    "folders": _read_folders,
}
