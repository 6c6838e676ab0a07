"""Reads what `prepare --export` writes by datumaro and Label Studio's converter, in the environment of make_files.py.

FILES=tests/data/formats/files CLASSES='data.classes={"background": 0, "skin lesion": 1, "hair - ruler": 2}'
python launch/prepare.py --import coco=$FILES/coco --as reference --unmarked empty --to OUT/data
for FORMAT in coco cvat label-studio; do
    python launch/prepare.py --config CONFIG data.root=OUT/data "$CLASSES" --export $FORMAT --to OUT/$FORMAT
done
python tests/data/formats/read_exports.py OUT          # in their environment: three lines, or an AssertionError
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from datumaro.components.annotation import AnnotationType, Mask
from datumaro.components.dataset import Dataset
from label_studio_sdk.converter.brush import decode_rle
from marked import SIZES, draw_mask

VALUES = {"background": 0, "skin lesion": 1, "hair - ruler": 2}


def check_datumaro(folder: Path, format: str) -> None:
    dataset = Dataset.import_from(str(folder), format)
    labels = [label.name for label in dataset.categories()[AnnotationType.label].items]
    assert {item.id for item in dataset} == SIZES.keys()
    for item in dataset:
        found = np.zeros(SIZES[item.id], np.uint8)
        for annotation in item.annotations:
            if isinstance(annotation, Mask):
                found[np.asarray(annotation.image, bool)] = VALUES[labels[annotation.label]]
        np.testing.assert_array_equal(found, draw_mask(item.id))
    print(f"{format}: {len(dataset)} images")


def check_label_studio(folder: Path) -> None:
    tasks = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    assert len(tasks) == len(SIZES)
    for task in tasks:
        id = Path(unquote(task["data"]["image"])).stem
        [annotation] = task["annotations"]
        assert annotation["ground_truth"]
        found = np.zeros(SIZES[id], np.uint8)
        for region in annotation["result"]:
            alpha = decode_rle(region["value"]["rle"]).reshape(*SIZES[id], 4)[..., 3]
            found[alpha > 0] = VALUES[region["value"]["brushlabels"][0]]
        np.testing.assert_array_equal(found, draw_mask(id))
    print(f"label-studio: {len(tasks)} images")


def main() -> None:
    folder = Path(sys.argv[1])
    check_datumaro(folder / "coco", "coco")
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(folder / "cvat") as archive:
        archive.extractall(unpacked)
        check_datumaro(Path(unpacked), "voc_segmentation")
    check_label_studio(folder / "label-studio")


if __name__ == "__main__":
    main()
