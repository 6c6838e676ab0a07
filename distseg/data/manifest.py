"""Which images there are, which mask belongs to which, and who is in which split.

Image and mask are paired by id, never by the order in which a file system lists them. Every random choice orders the
samples by a hash of (seed, id), so that it depends on neither that order nor the presence of other samples.

Layouts (`data.layout`), in the order in which `auto` looks for them:

    manifest  manifest.csv with the columns id, split, image, mask and optionally noisy_mask; paths relative to the root
    isic      the challenge's own folders, as unpacked, of 2016, 2017 or 2018 (lesion segmentation)
    ph2       IMD*/IMD*_Dermoscopic_Image/IMD*.bmp beside IMD*_lesion/IMD*_lesion.bmp
    folders   images/ beside masks/: the same stem, the mask's optionally followed by _segmentation or _mask
"""

import csv
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from distseg.config import DataConfig
from distseg.data.decode import check_image, check_mask
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


def read_samples(config: DataConfig, seed: int) -> list[Sample]:
    """All samples under `config.root`, sorted by id.

    A val or test split that the data does not bring is drawn by `seed` from its training images
    (`data.val_fraction`, `data.test_fraction`). Raises UserError for an unknown layout, a malformed manifest, an image
    without a mask, an id that occurs twice and an id or a file in two splits; `check_samples` looks into the files.
    """
    if not config.root.is_dir():
        raise UserError(f"data.root {config.root}: no such folder")
    layouts = _LAYOUTS if config.layout == "auto" else {config.layout: _LAYOUTS[config.layout]}
    for read in layouts.values():
        samples = read(config.root)
        if samples is not None:
            break
    else:
        raise UserError(
            f"data.root {config.root}: no data in the layout {' | '.join(layouts)} (manifest.csv; the ISIC challenge's "
            "…Training… folders; PH2's IMD* folders; images/ and masks/)"
        )
    if not samples:
        raise UserError(f"data.root {config.root}: holds no images")
    samples = _draw_missing_splits(samples, config, seed)
    _check_identities(samples)
    return sorted(samples, key=lambda sample: sample.id)


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


def check_samples(samples: list[Sample], threads: int) -> None:
    """Decode every file, so that a bad one is found before training and not during it.

    Raises UserError, one line, for an empty split, an id that occurs twice, an id or a file in two splits, and for the
    first file (by id) that is missing, empty, truncated, no image, not of its image's size or not binary; the others
    are counted.
    """
    _check_identities(samples)
    for split in SPLITS:
        if not any(sample.split == split for sample in samples):
            key = "rows of that split" if split == "train" else f"rows of that split, or a larger data.{split}_fraction"
            raise UserError(f"data: the {split} split is empty; it needs {key}")
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(_find_problem, sorted(samples, key=lambda sample: sample.id))
        problems = [problem for problem in found if problem]
    if problems:
        raise UserError(_first_of(problems))


def _find_problem(sample: Sample) -> str | None:
    try:
        size = check_image(sample.image)
        for mask in filter(None, (sample.mask, sample.noisy_mask)):
            mask_size = check_mask(mask)
            if mask_size != size:
                return (
                    f"{mask}: mask is {mask_size[0]}×{mask_size[1]} and its image {sample.image.name} "
                    f"{size[0]}×{size[1]}; resample the mask, nearest neighbour"
                )
    except UserError as error:
        return str(error)
    return None


def _check_identities(samples: list[Sample]) -> None:
    ids: dict[str, str] = {}
    files: dict[Path, Sample] = {}
    for sample in samples:
        if sample.id in ids:
            where = f"twice in {sample.split}" if ids[sample.id] == sample.split else "in two splits"
            raise UserError(f"data: the id {sample.id} is {where}; ids must be unique")
        ids[sample.id] = sample.split
        for path in filter(None, (sample.image, sample.mask, sample.noisy_mask)):
            other = files.setdefault(path.resolve(), sample)
            if other.split != sample.split:
                raise UserError(
                    f"{path}: in the {other.split} split as {other.id} and in {sample.split} as {sample.id}; "
                    "keep it in one of them"
                )


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


def _read_manifest(root: Path) -> list[Sample] | None:
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
    return [_parse_row(root, row, f"{manifest}, row {number}") for number, row in enumerate(rows, start=1)]


def _parse_row(root: Path, row: dict[str, str | None], where: str) -> Sample:
    values = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, "noisy_mask")}
    empty = [column for column in _COLUMNS if not values[column]]
    if empty:
        raise UserError(f"{where}: {empty[0]} is empty")
    if not _ID.fullmatch(values["id"]):
        raise UserError(f"{where}: id {values['id']!r} must be letters, digits, '.', '_', '-' and blanks")
    if values["split"] not in SPLITS:
        raise UserError(f"{where}: split {values['split']!r} must be train, val or test")
    paths = {column: values[column] for column in ("image", "mask", "noisy_mask") if values[column]}
    for column, path in paths.items():
        if _leaves_root(path):
            raise UserError(f"{where}: {column} {path!r} leaves the folder; paths are relative to it, without '..'")
    return Sample(values["id"], values["split"], **{column: root / path for column, path in paths.items()})


def _leaves_root(path: str) -> bool:
    # Read as text, so that a data folder may itself be made of symbolic links.
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


def _read_isic(root: Path) -> list[Sample] | None:
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
    return [sample for split, images, masks in challenges[0] for sample in _pair(split, images, masks)]


def _read_ph2(root: Path) -> list[Sample] | None:
    for folder in (root, root / "PH2 Dataset images", root / "PH2Dataset" / "PH2 Dataset images"):
        ids = [case.name for case in folder.glob("IMD*") if (case / f"{case.name}_Dermoscopic_Image").is_dir()]
        if ids:
            return [
                Sample(
                    id,
                    "train",
                    folder / id / f"{id}_Dermoscopic_Image" / f"{id}.bmp",
                    folder / id / f"{id}_lesion" / f"{id}_lesion.bmp",
                )
                for id in ids
            ]
    return None


def _read_folders(root: Path) -> list[Sample] | None:
    if not ((root / "images").is_dir() and (root / "masks").is_dir()):
        return None
    return _pair("train", root / "images", root / "masks")


def _pair(split: str, image_folder: Path, mask_folder: Path) -> list[Sample]:
    if not mask_folder.is_dir():
        raise UserError(f"{image_folder}: its masks are missing; expected them in {mask_folder}")
    images = _by_id(path for path in _image_files(image_folder) if not _SUPERPIXELS.search(path.stem))
    masks = _by_id(_image_files(mask_folder))
    bare = [f"{images[id]}: has no mask in {mask_folder}" for id in sorted(images) if id not in masks]
    if bare:
        raise UserError(_first_of(bare))
    return [Sample(id, split, image, masks[id]) for id, image in images.items()]


def _image_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES]


def _by_id(paths: Iterable[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        id = _MASK_ENDING.sub("", path.stem)
        if id in files:
            first, second = sorted((files[id].name, path.name))
            raise UserError(f"{path.parent}: {first} and {second} have the same id {id}; keep one of them")
        files[id] = path
    return files


def _first_of(problems: list[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


_LAYOUTS: dict[str, Callable[[Path], list[Sample] | None]] = {
    "manifest": _read_manifest,
    "isic": _read_isic,
    "ph2": _read_ph2,
    "folders": _read_folders,
}
