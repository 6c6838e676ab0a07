"""The ISIC challenge's own folders, as unpacked, of 2016, 2017 or 2018 (lesion segmentation)."""

import logging
from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.layouts.pairing import image_files, pair
from distseg.errors import UserError

_ISIC_FOLDERS = {
    2016: ("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth"),
    2017: ("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth"),
    2018: ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
}
_ISIC_PARTS = {"Training": "train", "Validation": "val", "Test": "test", "Test_v2": "test"}
_log = logging.getLogger(__name__)


def read(root: Path) -> Listing | None:
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
    [parts] = challenges
    for split, images, masks in parts:
        if split != "train" and not masks.is_dir():  # the organisers keep the truth of some parts to themselves
            _log.warning("%s: left out its %d images, for there is no %s", images, len(image_files(images)), masks.name)
    parts = [part for part in parts if part[0] == "train" or part[2].is_dir()]
    pairs = [pair(split, images, masks) for split, images, masks in parts]
    return Listing(
        [sample for samples, _ in pairs for sample in samples],
        [problem for _, problems in pairs for problem in problems],
        frozenset(split for split, _, _ in parts),
    )
