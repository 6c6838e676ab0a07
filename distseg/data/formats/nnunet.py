"""nnU-Net's raw data set: imagesTr/, labelsTr/, imagesTs/, labelsTs/ and dataset.json, of two-dimensional images.

It has one mask an image and does not say whose it is. Images are one RGB or grey file CASE_0000, or three grey ones;
files are PNG, BMP or TIFF, or NIfTI with one slice. The training cases are in the split train, but those that the first
fold of splits_final.json validates on, where that file lies beside them; the test cases are read if labelsTs/ is there.

See https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from distseg.data.decode import Decoding, content_of
from distseg.data.formats.contents import (
    BACKGROUND,
    IGNORE,
    IGNORED,
    Contents,
    Item,
    Mask,
    Source,
    named_values,
    number_classes,
)
from distseg.data.formats.images import Picture, check_size, ids_of, opened_whole, picture
from distseg.data.formats.json_file import Part, read_json
from distseg.data.formats.nifti import read_slice
from distseg.errors import BadFileError
from distseg.text import for_terminal

DESCRIPTION = "dataset.json"
SPLITS = "splits_final.json"
_PARTS = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}
_NIFTI = (".nii", ".nii.gz")
_ENDINGS = (".png", ".bmp", ".tif", ".tiff", *_NIFTI)
_Value = Annotated[int, Field(ge=0, le=65535)]


class _Description(Part):
    labels: Annotated[dict[str, _Value | list[_Value]], Field(min_length=1)]
    channel_names: dict[str, Any]
    file_ending: str


class _Fold(Part):
    val: list[str]


def read(source: Source) -> Contents:
    root, limit, role = source.path, source.decoding.max_file_bytes, source.given_role
    if not root.is_dir():
        raise BadFileError(f"{root}: is no folder; name the one with {DESCRIPTION}")
    description: _Description = read_json(root / DESCRIPTION, limit, _Description)
    ending = description.file_ending
    if ending not in _ENDINGS:
        raise BadFileError(
            f"{root / DESCRIPTION}: file_ending {ending[:20]!r} is not read; save the images as one of "
            f"{', '.join(_ENDINGS)}"
        )
    classes, values = _classes(description, root / DESCRIPTION)
    validated = _validated(root, limit)
    cases = [
        ("val" if split == "train" and case in validated else split, case, channels, label)
        for split in _PARTS
        for case, channels, label in _cases(root, split, ending, len(description.channel_names))
    ]
    ids = ids_of([case for _, case, _, _ in cases], root)

    def items() -> Iterator[Item]:
        for split, case, channels, label in cases:
            shown = _picture(channels, source.decoding)
            mask = _mask(label, shown, values, source.decoding)
            yield Item(ids[case], split, shown, {role: mask})

    return Contents(classes, items(), len(cases))


def write(items: Iterable[Item], classes: tuple[str, ...], folder: Path) -> None:
    """The images, which must be RGB in PNG, and labels as PNG; `ignore`, if a mask has it, comes after the classes."""
    labels = {BACKGROUND: 0} | {name: id for name, id in named_values(classes).items() if id != IGNORE}
    for name in (name for part in _PARTS.values() for name in part):
        (folder / name).mkdir()
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for item in items:
        splits[item.split].append(item.id)
        images, masks = _PARTS["test" if item.split == "test" else "train"]
        [mask] = item.masks.values()
        if (mask == IGNORE).any():
            labels[IGNORED] = len(classes)
        (folder / images / f"{item.id}_0000.png").write_bytes(item.picture.content)
        values = np.where(mask == IGNORE, len(classes), mask).astype(np.uint8)
        (folder / masks / f"{item.id}.png").write_bytes(_png(values))
    description = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": labels,
        "numTraining": len(splits["train"]) + len(splits["val"]),
        "file_ending": ".png",
    }
    if splits["val"]:
        fold = {"train": splits["train"], "val": splits["val"]}
        (folder / SPLITS).write_text(json.dumps([fold], ensure_ascii=False, indent=2), encoding="utf-8")
    (folder / DESCRIPTION).write_text(json.dumps(description, ensure_ascii=False, indent=2), encoding="utf-8")


def _classes(description: _Description, where: Path) -> tuple[tuple[str, ...], dict[int, int]]:
    """The names of the classes, and the class id of each value of the label files."""
    values: dict[int, str] = {}
    for name, value in description.labels.items():
        if isinstance(value, list):
            raise BadFileError(
                f"{where}: {for_terminal(name[:80])} is a region of several labels; give each label a name"
            )
        if value in values:
            raise BadFileError(f"{where}: has the label {value} twice; keep one")
        values[value] = name
    classes, class_ids = number_classes([values[value] for value in sorted(values)], where)
    return classes, {value: class_ids[name] for value, name in values.items()}


def _validated(root: Path, limit: int) -> set[str]:
    if not (root / SPLITS).exists():
        return set()
    folds: list[_Fold] = read_json(root / SPLITS, limit, list[_Fold])
    return set(folds[0].val) if folds else set()


def _cases(root: Path, split: str, ending: str, channels: int) -> list[tuple[str, list[Path], Path]]:
    """Each labelled case of a split: its id, the file of each channel, and that of the labels."""
    images, labels = (root / name for name in _PARTS[split])
    if split == "test" and not labels.is_dir():
        return []
    if not (images.is_dir() and labels.is_dir()):
        raise BadFileError(f"{root}: has no {images.name}/ beside {labels.name}/; name the folder with {DESCRIPTION}")
    files: dict[str, dict[int, Path]] = {}
    for path in sorted(images.glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        stem = path.name.removesuffix(ending)
        files.setdefault(stem[:-5], {})[int(stem[-4:])] = path
    labelled = {
        path.name.removesuffix(ending): path for path in sorted(labels.glob(f"*{ending}")) if path.name[0] != "."
    }
    if strays := sorted(files.keys() ^ labelled.keys()):
        case = strays[0]
        missing = f"{labels.name}/{case}{ending}" if case in files else f"{images.name}/{case}_0000{ending}"
        raise BadFileError(f"{root}: {for_terminal(missing)} is missing; each case needs its image and its labels")
    cases = []
    for case, label in labelled.items():
        # An RGB file is one file of three channels.
        numbers = sorted(files[case])
        if numbers not in ([0], [0, 1, 2]) or len(numbers) not in (1, channels):
            raise BadFileError(
                f"{root}: {for_terminal(case)} has the channels {numbers} of {channels}; one or three are read"
            )
        cases.append((case, [files[case][number] for number in numbers], label))
    return cases


def _picture(channels: list[Path], decoding: Decoding) -> Picture:
    first = channels[0]
    if len(channels) == 1 and not first.name.endswith(_NIFTI):
        return picture(str(first), content_of(first, decoding), decoding)
    planes = [_grey(path, decoding) for path in channels]
    for path, plane in zip(channels, planes, strict=True):
        if plane.shape != planes[0].shape:
            raise BadFileError(f"{path}: is not of the size of {first.name}")
    content = _png(planes[0] if len(planes) == 1 else np.stack(planes[::-1], axis=-1))
    return Picture(str(first), ".png", content, planes[0].shape[::-1])


def _grey(path: Path, decoding: Decoding) -> NDArray[np.uint8]:
    """(H, W) of one channel. Raises BadFileError unless its values are whole numbers from 0 to 255."""
    values = _values(path, decoding)
    if not _are_whole(values, 255):
        raise BadFileError(
            f"{path}: has values other than whole numbers from 0 to 255; choose a window and save as PNG"
        )
    return values.astype(np.uint8)


def _mask(path: Path, shown: Picture, ids: dict[int, int], decoding: Decoding) -> Mask:
    values = _values(path, decoding)
    check_size(shown, values.shape[::-1], str(path))
    if not _are_whole(values, 65535):
        raise BadFileError(f"{path}: has values other than whole numbers from 0 to 65535; labels are such")
    table = np.full(65536, -1, np.int16)
    table[list(ids)] = list(ids.values())
    mask = table[values.astype(np.int64)]
    if (mask < 0).any():
        raise BadFileError(f"{path}: has the label {int(values[mask < 0][0])}, which {DESCRIPTION} does not name")
    return mask.astype(np.uint8)


def _values(path: Path, decoding: Decoding) -> NDArray[Any]:
    """(H, W) as the file has them; of a palette the indices."""
    if path.name.endswith(_NIFTI):
        return read_slice(path, decoding)
    with opened_whole(path, decoding, content_of(path, decoding)) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "F"):
            raise BadFileError(f"{path}: its colours are {image.mode}; save one channel as grey")
        return np.asarray(image)


def _are_whole(values: NDArray[Any], most: int) -> bool:
    if values.dtype.kind not in "buif":
        return False
    return bool(((values >= 0) & (values <= most) & (values == np.floor(values))).all())


def _png(pixels: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()
