"""PH2: IMD*/IMD*_Dermoscopic_Image/IMD*.bmp beside IMD*_lesion/IMD*_lesion.bmp."""

from pathlib import Path

from distseg.data.layouts.listing import Listing
from distseg.data.sample import Sample


def read(root: Path) -> Listing | None:
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
            return Listing(samples, [], frozenset({"train"}))
    return None
