"""Makes files/, which the tests read: by the exporters of datumaro, which is CVAT's, and by Label Studio's converter.

They are committed, for the two packages need older versions of numpy, Pillow and OpenCV than this project has. In an
environment of their own:

    pip install datumaro==1.13.12 label-studio-sdk==2.1.2
    python tests/data/formats/make_files.py
"""

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from datumaro.components.annotation import Mask, Polygon
from datumaro.components.dataset import Dataset
from datumaro.components.dataset_base import DatasetItem
from datumaro.components.media import Image
from label_studio_sdk.converter.brush import image2annotation, mask2rle
from marked import CLASSES, SIZES, SPLITS, draw_image, draw_mask
from PIL import Image as PILImage

FILES = Path(__file__).with_name("files")
COLOURS = {"background": (0, 0, 0), "skin lesion": (250, 50, 83), "hair & ruler": (51, 221, 255)}


def items(shift: int = 0, outlines: bool = False) -> list[DatasetItem]:
    found = []
    for id in SIZES:
        mask = draw_mask(id, shift)
        annotations = [Mask(image=mask == value, label=value, group=value) for value in (1, 2) if (mask == value).any()]
        if outlines and id == "two words":
            annotations = [Polygon([3.5, 2, 18.25, 4, 15, 17.5, 6, 14], label=1), Polygon([1, 1, 9, 1, 9, 9], label=2)]
        media = Image.from_numpy(data=draw_image(id)[..., ::-1], ext=".png")
        found.append(DatasetItem(id=id, subset=SPLITS[id], media=media, annotations=annotations))
    return found


def write_coco(folder: Path, **options: bool) -> None:
    dataset = Dataset.from_iterable(items(**options), categories=list(CLASSES))
    dataset.export(str(folder), "coco_instances", save_media=True)


def write_cvat(path: Path) -> None:
    """As CVAT does: https://github.com/cvat-ai/cvat/blob/develop/cvat/apps/dataset_manager/formats/mask.py"""
    dataset = Dataset.from_iterable(items(), categories=list(CLASSES))
    label_map = {name: [COLOURS[name], [], []] for name in CLASSES}
    with tempfile.TemporaryDirectory() as folder:
        dataset.export(folder, "voc_segmentation", save_media=True, apply_colormap=True, label_map=label_map)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(Path(folder).rglob("*")):
                archive.write(file, file.relative_to(folder))


def write_label_studio(folder: Path) -> None:
    (folder / "media").mkdir(parents=True)
    tasks = []
    for number, id in enumerate(SIZES, start=1):
        PILImage.fromarray(draw_image(id)).save(folder / "media" / f"{number:08x}-{id}.png")
        annotations = [
            {"completed_by": by, "ground_truth": truth, "was_cancelled": False, "id": 10 * number + shift}
            | {"result": regions(id, shift)}
            for by, truth, shift in (({"id": 3, "email": "ann@example.org"}, False, 0), (7, False, 2), (1, True, 1))
        ]
        skipped = {"completed_by": 9, "ground_truth": False, "was_cancelled": True, "id": 10 * number + 9, "result": []}
        image = f"/data/upload/1/{number:08x}-{id}.png"
        tasks.append(
            {"id": number, "data": {"image": image}, "annotations": [*annotations, skipped], "predictions": []}
        )
    tasks.append({"id": 99, "data": {"image": "/data/upload/1/not_there.png"}, "annotations": []})
    (folder / "export.json").write_text(json.dumps(tasks))


def regions(id: str, shift: int) -> list[dict]:
    """One brush region a class; the first by way of an image file, as `label-studio-converter` imports masks."""
    found = []
    mask = draw_mask(id, shift)
    height, width = mask.shape
    for value in (1, 2):
        if not (mask == value).any():
            continue
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            PILImage.fromarray(np.where(mask == value, 255, 0).astype(np.uint8)).save(file.name)
            made = image2annotation(file.name, CLASSES[value], "tag", "image")["result"][0]
        if value == 2:
            made["value"]["rle"] = mask2rle((mask == value).astype(np.uint8))
        assert (made["original_width"], made["original_height"]) == (width, height)
        found.append(made)
    return found


def main() -> None:
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    write_coco(FILES / "coco")
    write_coco(FILES / "coco_outlines", outlines=True)
    write_cvat(FILES / "cvat.zip")
    write_label_studio(FILES / "label_studio")


if __name__ == "__main__":
    main()
