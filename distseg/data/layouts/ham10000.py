"""HAM10000 as unpacked: HAM10000_images_part_*/ISIC_*.jpg, HAM10000_segmentations_lesion_*/ISIC_*_segmentation.png.

HAM10000_metadata.csv says which images show the same lesion; they are a group. See Tschandl, Rosendahl and Kittler, The
HAM10000 dataset, Scientific Data 5, 2018; https://doi.org/10.7910/DVN/DBW86T.
"""

import csv
import logging
from dataclasses import replace
from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.layouts.pairing import Masks, add_masks, images_by_id, paired
from distseg.data.sample import Problem
from distseg.errors import UserError
from distseg.files import read_regular

_IMAGES = "HAM10000_images*"
_MASKS = "HAM10000_segmentations*"
_METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")
_MOST_BYTES = 2**26
_log = logging.getLogger(__name__)


def read(root: Path) -> Listing | None:
    parts = sorted(path for path in root.glob(_IMAGES) if path.is_dir())
    if not parts:
        return None
    folders = sorted(path for path in root.glob(_MASKS) if path.is_dir())
    if len(folders) != 1:
        found = f"there are {' and '.join(path.name for path in folders)}; keep one" if folders else "they are missing"
        raise UserError(
            f"{root}: the masks of HAM10000 are expected in HAM10000_segmentations_lesion_tschandl/; {found}"
        )
    images, problems = dict[str, Path](), list[Problem]()
    for part in parts:
        found_images, odd = images_by_id(part)
        doubled = images.keys() & found_images.keys()
        problems += [*odd, *(Problem(id, str(found_images[id]), f"is in {images[id].parent} too") for id in doubled)]
        images |= found_images
    masks = Masks()
    add_masks(masks, folders[0], images, "reference")
    samples, bare = paired("train", images, masks)
    lesions = _lesions(root)
    samples = [replace(sample, group=lesions.get(sample.id, "")) for sample in samples]
    return Listing(samples, [*problems, *bare], frozenset({"train"}))


def _lesions(root: Path) -> dict[str, str]:
    """The lesion of each image."""
    table = next((root / name for name in _METADATA if (root / name).is_file()), None)
    if table is None:
        _log.warning("%s: has no %s, without which images of one lesion may be in two splits", root, _METADATA[0])
        return {}
    try:
        lines = read_regular(table, _MOST_BYTES).decode("utf-8-sig").splitlines()
        rows = csv.DictReader(lines, delimiter=max(",\t;", key=lines[0].count) if lines else ",", strict=True)
        return {row["image_id"].strip(): row["lesion_id"].strip() for row in rows}
    except KeyError as error:
        raise UserError(f"{table}: lacks the column {error.args[0]}; fetch it again") from None
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise UserError(f"{table}: cannot be read as a table: {error}; fetch it again") from None
