"""A broken file of each format is refused by name in one line, and nothing is left of the import."""

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from distseg.data.decode import Decoding
from distseg.data.formats.contents import Source
from distseg.data.formats.convert import import_annotations
from distseg.errors import UserError

SMALL = Decoding(max_file_bytes=10_000)
DEEP = '{"a":' * 100_000


def png(width: int = 4, height: int = 3, value: int | tuple[int, int, int] = (0, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("L" if isinstance(value, int) else "RGB", (width, height), value).save(file, "PNG")
    return file.getvalue()


def png_of_few_rows() -> bytes:
    """4×3 by its header, one row by its stream, which is sound."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(13))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def refused(tmp_path: Path, format: str, path: Path, role: str | None = "reference", unmarked: str = "empty") -> str:
    """The line that the import of `path` ends with."""
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as caught:
        source = Source(path, tmp_path / "images", role, SMALL)
        import_annotations([(format, source)], tmp_path / "out", unmarked, lambda items, count: items)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))
    line = str(caught.value).replace(str(tmp_path), "")  # whose name is that of the case
    assert "\n" not in line
    assert len(line) < 700
    assert path.name in line
    return line


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A.png and B.png of 4×3 pixels."""
    (tmp_path / "images").mkdir()
    for name in ("A.png", "B.png"):
        (tmp_path / "images" / name).write_bytes(png())
    return tmp_path / "images"


def sound_coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": 1, "file_name": "A.png", "width": 4, "height": 3},
            {"id": 2, "file_name": "B.png", "width": 4, "height": 3},
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": {"size": [3, 4], "counts": [3, 4, 5]}},
            {"id": 2, "image_id": 2, "category_id": 2, "segmentation": [[0, 0, 3, 0, 3, 2]]},
        ],
    }


def put(content: dict[str, Any] | list[Any], keys: str, value: Any) -> str:
    """JSON of `content` with the value at the dotted `keys` replaced."""
    *path, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    part: Any = content
    for key in path:
        part = part[key]
    part[last] = value
    return json.dumps(content)


RUNS = "annotations.0.segmentation"
COCO: dict[str, tuple[Callable[[], str], str]] = {
    "empty": (lambda: "", "cannot be read as JSON"),
    "truncated": (lambda: json.dumps(sound_coco())[:-40], "cannot be read as JSON"),
    "nested": (lambda: DEEP[:9_000], "nested too deeply"),
    "large": (lambda: " " * 10_001 + "{}", "above data.max_file_bytes (10,000)"),
    "no object": (lambda: "[1, 2]", "input should be"),
    "without images": (lambda: put({"categories": [], "annotations": [], "x": 0}, "x", 1), "images"),
    "width of nothing": (lambda: put(sound_coco(), "images.0.width", 0), "images.0.width"),
    "width without bound": (lambda: put(sound_coco(), "images.0.width", 10**9), "images.0.width"),
    "width is infinite": (lambda: put(sound_coco(), "images.0.width", 7).replace("7", "1e999"), "images.0.width"),
    "not a number": (lambda: put(sound_coco(), "images.0.width", float("nan")), "images.0.width"),
    "digits": (lambda: put(sound_coco(), "images.0.id", 3).replace('"id": 3', f'"id": {"9" * 5000}'), "JSON"),
    "another size": (lambda: put(sound_coco(), "images.0.width", 5), "is for an image of 5×3, but"),
    "turned": (lambda: put(put_back("images.0.width", 3), "images.0.height", 4), "data.orientation"),
    "image missing": (lambda: put(sound_coco(), "images.0.file_name", "C.png"), "C.png is not in"),
    "path outside": (lambda: put(sound_coco(), "images.0.file_name", "../../etc/passwd"), "passwd is not in"),
    "image twice": (lambda: put(sound_coco(), "images.1.id", 1), "image id 1 twice"),
    "one file twice": (lambda: put(sound_coco(), "images.1.file_name", "A.png"), "image A twice"),
    "annotation twice": (lambda: put(sound_coco(), "annotations.1.id", 1), "annotation id 1 twice"),
    "category twice": (lambda: put(sound_coco(), "categories.1.id", 1), "category id 1 twice"),
    "category unknown": (lambda: put(sound_coco(), "annotations.1.category_id", 9), "no category 9"),
    "image unknown": (lambda: put(sound_coco(), "annotations.1.image_id", 9), "no image 9"),
    "class name": (lambda: put(sound_coco(), "categories.1.name", "a\nb"), "printable letters"),
    "runs too short": (lambda: put(sound_coco(), f"{RUNS}.counts", [3, 4]), "runs are of 7 pixels"),
    "runs too long": (lambda: put(sound_coco(), f"{RUNS}.counts", [3, 4, 6]), "runs are of 13 pixels"),
    "runs below zero": (lambda: put(sound_coco(), f"{RUNS}.counts", [3, -4, 13]), "greater than or equal to 0"),
    "runs without bound": (lambda: put(sound_coco(), f"{RUNS}.counts", [2**70]), "counts"),
    "no compressed runs": (lambda: put(sound_coco(), f"{RUNS}.counts", "é~"), "damaged"),
    "compressed runs end": (lambda: put(sound_coco(), f"{RUNS}.counts", "3P"), "damaged"),
    "compressed runs too short": (lambda: put(sound_coco(), f"{RUNS}.counts", "34"), "runs are of 7 pixels"),
    "runs of another size": (lambda: put(sound_coco(), f"{RUNS}.size", [4, 3]), "its runs are of 3×4"),
    "outline of two points": (lambda: put(sound_coco(), "annotations.1.segmentation", [[0, 0, 1, 1]]), "three points"),
    "odd outline": (lambda: put(sound_coco(), "annotations.1.segmentation", [[0, 0, 1, 1, 2, 2, 3]]), "coordinates"),
    "outline far away": (
        lambda: put(sound_coco(), "annotations.1.segmentation", [[0, 0, 1e30, 1, 2, 2]]),
        "far outside",
    ),
    "outline far to the left": (
        lambda: put(sound_coco(), "annotations.1.segmentation", [[0, 0, -1e30, 1, 2, 2]]),
        "far outside",
    ),
    "outline of NaN": (
        lambda: put(sound_coco(), "annotations.1.segmentation", [[0, 0, float("nan"), 1, 2, 2]]),
        "finite number",
    ),
    "outline of words": (lambda: put(sound_coco(), "annotations.1.segmentation", [["a"] * 6]), "annotations.1"),
    "a box only": (lambda: put(sound_coco(), "annotations.1.segmentation", []), "no segmentation"),
}


def put_back(keys: str, value: Any) -> Any:
    return json.loads(put(sound_coco(), keys, value))


@pytest.mark.parametrize("case", COCO)
def test_a_broken_coco_file(tmp_path: Path, images: Path, case: str) -> None:
    broken, reason = COCO[case]
    path = tmp_path / "instances.json"
    path.write_text(broken(), encoding="utf-8")
    assert reason in refused(tmp_path, "coco", path)


def test_what_the_cases_break_is_sound(tmp_path: Path, images: Path) -> None:
    """So that each of them is refused for what it breaks."""
    (tmp_path / "instances.json").write_text(json.dumps(sound_coco()))
    (tmp_path / "export.json").write_text(json.dumps(sound_tasks()))
    sound_cvat(tmp_path / "masks.zip")
    sound_nnunet(tmp_path / "Dataset001_x")
    for format, name, role in (
        ("coco", "instances.json", "reference"),
        ("label-studio", "export.json", None),
        ("cvat", "masks.zip", "reference"),
        ("nnunet", "Dataset001_x", "reference"),
    ):
        source = Source(tmp_path / name, images if format != "nnunet" else None, role, SMALL)
        done = import_annotations([(format, source)], tmp_path / f"out_{format}", None, lambda items, count: items)
        assert [sample.id for sample in done.samples] == ["A", "B"]


def sound_tasks() -> list[dict[str, Any]]:
    tasks = []
    for number, name in enumerate("AB", start=1):
        region = {
            "type": "rectanglelabels",
            "original_width": 4,
            "original_height": 3,
            "value": {"x": 0, "y": 0, "width": 50, "height": 50, "rectanglelabels": ["a"]},
        }
        annotation = {"id": number, "completed_by": 1, "result": [region]}
        tasks.append({"id": number, "data": {"image": f"{name}.png"}, "annotations": [annotation]})
    return tasks


def brush(rle: list[Any] | str) -> str:
    tasks = sound_tasks()
    tasks[0]["annotations"][0]["result"][0] |= {
        "type": "brushlabels",
        "value": {"brushlabels": ["a"], "rle": rle, "format": "rle"},
    }
    return json.dumps(tasks)


HEADER = [0, 0, 0, 48, 0b00111001, 0b00011011, 0b11111100]
"""Of 48 values of 8 bits; counts of 3, 4, 8 and 16 bits; the last three bits are the first of a block."""
RESULT = "0.annotations.0.result.0"
LABEL_STUDIO: dict[str, tuple[Callable[[], str], str]] = {
    "truncated": (lambda: json.dumps(sound_tasks())[:-40], "cannot be read as JSON"),
    "nested": (lambda: DEEP[:9_000], "nested too deeply"),
    "another export": (lambda: '[{"id": 1, "image": "A.png", "label": []}]', "0."),
    "image missing": (lambda: put(sound_tasks(), "0.data.image", "C.png"), "C.png is not in"),
    "image unknown": (lambda: put(sound_tasks(), "0.data", {"one": "a.png", "two": "b.png"}), "which of its data"),
    "another size": (lambda: put(sound_tasks(), f"{RESULT}.original_width", 5), "is for an image of 5×3, but"),
    "another shape": (lambda: put(sound_tasks(), f"{RESULT}.type", "ellipselabels"), "ellipselabels is no shape"),
    "turned": (lambda: put(sound_tasks(), f"{RESULT}.image_rotation", 90), "turned image"),
    "no label": (lambda: put(sound_tasks(), f"{RESULT}.value.rectanglelabels", []), "one label"),
    "two labels": (lambda: put(sound_tasks(), f"{RESULT}.value.rectanglelabels", ["a", "b"]), "one label"),
    "a label of another kind": (lambda: put(sound_tasks(), f"{RESULT}.value.rectanglelabels", [{}]), "one label"),
    "side of words": (lambda: put(sound_tasks(), f"{RESULT}.value.width", "wide"), "width"),
    "side without bound": (lambda: put(sound_tasks(), f"{RESULT}.value.width", 1e9), "width"),
    "infinite": (lambda: put(sound_tasks(), f"{RESULT}.value.width", 77).replace("77", "1e999"), "width"),
    "annotator twice": (lambda: twice(ground_truth=False), "two annotations by 1"),
    "two references": (lambda: twice(ground_truth=True), "two ground truths"),
    "annotator's name": (lambda: put(sound_tasks(), "0.annotations.0.completed_by", "../x"), "annotator"),
    "rle of another length": (lambda: brush([0, 0, 0, 44, *HEADER[4:], 0, 0, 0]), "its rle is of 44 values"),
    "rle of 4 billion": (lambda: brush([255, 255, 255, 255, *HEADER[4:], 0, 0, 0]), "its rle is of 4,294,967,295"),
    "rle ends": (lambda: brush(HEADER), "ends too early"),
    "rle is empty": (lambda: brush([]), "ends too early"),
    "rle too long": (lambda: brush([*HEADER[:6], 0b11111111, 255, 255, 0, 0]), "longer than its image"),
    "rle of wide values": (lambda: brush([*HEADER[:4], 0b01111001, *HEADER[5:], 0, 0]), "values of 16 bits"),
    "rle of no bytes": (lambda: brush([1, 256]), "from 0 to 255"),
    "rle of words": (lambda: brush(["a"]), "from 0 to 255"),
}


def twice(ground_truth: bool) -> str:
    tasks = sound_tasks()
    annotation = tasks[0]["annotations"][0] | {"ground_truth": ground_truth}
    tasks[0]["annotations"] = [annotation, annotation]
    return json.dumps(tasks)


@pytest.mark.parametrize("case", LABEL_STUDIO)
def test_a_broken_label_studio_file(tmp_path: Path, images: Path, case: str) -> None:
    broken, reason = LABEL_STUDIO[case]
    path = tmp_path / "export.json"
    path.write_text(broken(), encoding="utf-8")
    line = refused(tmp_path, "label-studio", path, role=None)
    assert reason in line


def test_labels_that_name_other_files_are_refused(tmp_path: Path, images: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps(sound_tasks()))
    for text, encoding, reason in (
        ('<!DOCTYPE v [<!ENTITY e SYSTEM "file:///etc/passwd">]><View>&e;</View>', "utf-8", "declares a document"),
        ('<!DOCTYPE v [<!ENTITY e "x">]><View>&e;</View>', "utf-8", "declares a document"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE v [<!ENTITY e "x">]><View/>', "utf-16", "cannot be read"),
        ("<View><BrushLabels>", "utf-8", "cannot be read"),
    ):
        (tmp_path / "label_config.xml").write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=rf"label_config\.xml: {reason}"):
            source = Source(tmp_path / "export.json", images, None, SMALL)
            import_annotations([("label-studio", source)], tmp_path / "out", None, lambda items, count: items)


LABELMAP = b"# label:color_rgb:parts:actions\nbackground:0,0,0::\na:128,0,0::\n"


def sound_cvat(path: Path, **others: bytes | None) -> Path:
    """A zip of A and B; `others` are put in, or with None left out."""
    files: dict[str, bytes | None] = {
        "labelmap.txt": LABELMAP,
        "ImageSets/Segmentation/default.txt": b"A\nB\n",
        "SegmentationClass/A.png": png(value=(128, 0, 0)),
        "SegmentationClass/B.png": png(),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (files | others).items():
            if content is not None:
                archive.writestr(name, content)
    return path


CVAT: dict[str, tuple[dict[str, bytes | None], str]] = {
    "without labels": ({"labelmap.txt": None}, "labelmap.txt: is missing"),
    "colour of words": ({"labelmap.txt": b"a:red::\n"}, "three numbers"),
    "colour too large": ({"labelmap.txt": b"a:256,0,0::\n"}, "three numbers"),
    "one colour twice": ({"labelmap.txt": LABELMAP + b"b:128,0,0::\n"}, "have one colour"),
    "labels are no text": ({"labelmap.txt": b"\xff\xfe\xff"}, "is no UTF-8"),
    "colour unknown": ({"SegmentationClass/A.png": png(value=(1, 2, 3))}, "has the colour 1,2,3"),
    "line unknown": ({"SegmentationClass/A.png": png(value=7)}, "has the value 7"),
    "another size": ({"SegmentationClass/A.png": png(5, 3)}, "is for an image of 5×3, but"),
    "mask truncated": ({"SegmentationClass/A.png": png()[:50]}, "SegmentationClass/A.png: cannot be decoded"),
    "mask of few rows": ({"SegmentationClass/A.png": png_of_few_rows()}, "has fewer rows"),
    "mask is text": ({"SegmentationClass/A.png": b"hello"}, "SegmentationClass/A.png: cannot be decoded"),
    "image missing": ({"ImageSets/Segmentation/default.txt": b"A\nC\n"}, "C is not in"),
    "image twice": ({"ImageSets/Segmentation/default.txt": b"A\nA\n"}, "lists A, which"),
    "climbs out": ({"../x": b""}, "../x: leaves the archive"),
    "climbs out in the middle": ({"a/../../x": b""}, "leaves the archive"),
    "absolute": ({"/etc/x": b""}, "/etc/x: leaves the archive"),
    "another drive": ({"C:\\x": b""}, "leaves the archive"),
    "a bomb": ({"SegmentationClass/A.png": bytes(10**7)}, "10,000,000 bytes"),
}


@pytest.mark.parametrize("case", CVAT)
def test_a_broken_cvat_file(tmp_path: Path, images: Path, case: str) -> None:
    others, reason = CVAT[case]
    path = sound_cvat(tmp_path / "masks.zip", **others)
    assert reason in refused(tmp_path, "cvat", path)


def test_a_cvat_list_that_climbs_out_finds_what_is_in_the_folder(tmp_path: Path, images: Path) -> None:
    """The name is only looked up: no path of the archive is opened."""
    path = sound_cvat(tmp_path / "masks.zip", **{"ImageSets/Segmentation/default.txt": b"../../etc/passwd\n"})
    assert "etc/passwd is not in" in refused(tmp_path, "cvat", path)


@pytest.mark.parametrize("cut", [10, 200, -30])
def test_a_truncated_zip(tmp_path: Path, images: Path, cut: int) -> None:
    path = sound_cvat(tmp_path / "masks.zip")
    path.write_bytes(path.read_bytes()[:cut])
    assert "cannot be read as a zip archive" in refused(tmp_path, "cvat", path)


def test_a_damaged_zip(tmp_path: Path, images: Path) -> None:
    path = sound_cvat(tmp_path / "masks.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"SegmentationClass/A.png") + 30] ^= 0xFF  # in the deflated bytes of the mask
    path.write_bytes(content)
    assert "SegmentationClass/A.png: cannot be read" in refused(tmp_path, "cvat", path)


def test_a_zip_with_an_empty_name(tmp_path: Path, images: Path) -> None:
    """Which Python's own ZipInfo.is_dir cannot bear."""
    path = sound_cvat(tmp_path / "masks.zip", x=b"1")
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist[-1].filename = ""
        archive._didModify = True
    assert "leaves the archive" in refused(tmp_path, "cvat", path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_a_name_twice(tmp_path: Path, images: Path) -> None:
    path = sound_cvat(tmp_path / "masks.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("SegmentationClass/A.png", png())
    assert "SegmentationClass/A.png: is twice" in refused(tmp_path, "cvat", path)


def sound_nnunet(root: Path) -> Path:
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in "AB":
        (root / f"imagesTr/{case}_0000.png").write_bytes(png())
        (root / f"labelsTr/{case}.png").write_bytes(png(value=1))
    (root / "dataset.json").write_text(json.dumps(sound_description()))
    return root


def sound_description() -> dict[str, Any]:
    names = {"0": "R", "1": "G", "2": "B"}
    return {"channel_names": names, "labels": {"background": 0, "a": 1}, "file_ending": ".png", "numTraining": 2}


DESCRIPTION: dict[str, tuple[Callable[[], str], str]] = {
    "truncated": (lambda: json.dumps(sound_description())[:-5], "dataset.json: cannot be read as JSON"),
    "without labels": (lambda: put(sound_description(), "labels", {}), "labels"),
    "regions": (lambda: put(sound_description(), "labels.b", [1, 2]), "region of several labels"),
    "one label twice": (lambda: put(sound_description(), "labels.b", 1), "label 1 twice"),
    "label of words": (lambda: put(sound_description(), "labels.a", "one"), "labels.a"),
    "label below zero": (lambda: put(sound_description(), "labels.a", -1), "labels.a"),
    "ending": (lambda: put(sound_description(), "file_ending", ".mha"), "file_ending '.mha'"),
    "ending that is a path": (lambda: put(sound_description(), "file_ending", "/../../x"), "file_ending"),
    "label unknown": (lambda: put(sound_description(), "labels", {"background": 0}), "has the label 1"),
}


@pytest.mark.parametrize("case", DESCRIPTION)
def test_a_broken_description_of_nnunet(tmp_path: Path, case: str) -> None:
    broken, reason = DESCRIPTION[case]
    root = sound_nnunet(tmp_path / "Dataset001_x")
    (root / "dataset.json").write_text(broken())
    assert reason in refused(tmp_path, "nnunet", root)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("labelsTr/A.png", png(5, 3, 1), "is for an image of 5×3, but"),
        ("labelsTr/A.png", png(value=(1, 1, 1)), "save one channel as grey"),
        ("labelsTr/A.png", png(value=1)[:50], "cannot be decoded"),
        ("labelsTr/C.png", png(value=1), "imagesTr/C_0000.png is missing"),
        ("imagesTr/C_0000.png", png(), "labelsTr/C.png is missing"),
        ("imagesTr/A_0001.png", png(value=0), "has the channels [0, 1] of 3"),
        ("imagesTr/A_0000.png", b"", "the file is empty"),
    ],
)
def test_a_broken_case_of_nnunet(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    root = sound_nnunet(tmp_path / "Dataset001_x")
    (root / name).write_bytes(content)
    assert reason in refused(tmp_path, "nnunet", root)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((4, 3, 2), np.uint8), "is a volume of (4, 3, 2)"),
        (np.zeros((4, 1, 3), np.uint8), "is a volume of (4, 1, 3)"),
        (np.full((4, 3), 0.5, np.float32), "whole numbers"),
        (np.full((4, 3), np.nan, np.float32), "whole numbers"),
        (np.full((4, 3), -1, np.int16), "whole numbers"),
        (np.full((4, 3), 9, np.uint8), "has the label 9"),
        (np.zeros((9000, 9000), np.uint8), "max_file_bytes"),
        (None, "cannot be read as NIfTI"),
    ],
)
def test_a_broken_slice_of_nifti(tmp_path: Path, values: np.ndarray | None, reason: str) -> None:
    root = tmp_path / "Dataset001_x"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 3), np.uint8), np.eye(4)), root / "imagesTr/A_0000.nii.gz")
    if values is None:
        (root / "labelsTr/A.nii.gz").write_bytes((root / "imagesTr/A_0000.nii.gz").read_bytes()[:40])
    else:
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / "labelsTr/A.nii.gz")
        (tmp_path / "x").unlink(missing_ok=True)
    description = sound_description() | {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    assert reason in refused(tmp_path, "nnunet", root)


@pytest.mark.parametrize("format", ["coco", "label-studio", "cvat", "nnunet"])
def test_a_file_that_is_not_there(tmp_path: Path, images: Path, format: str) -> None:
    role = None if format == "label-studio" else "reference"
    line = refused(tmp_path, format, tmp_path / "nowhere.x", role)
    assert "no such file" in line or "is no folder" in line


def test_images_that_nobody_may_have_annotated_are_not_taken_for_empty(tmp_path: Path, images: Path) -> None:
    content = sound_coco()
    del content["annotations"][1]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    source = Source(path, images, "reference", SMALL)
    with pytest.raises(UserError, match="nothing for 1 of 2 images: add --unmarked empty"):
        import_annotations([("coco", source)], tmp_path / "out", None, lambda items, count: items)
    for unmarked, ids in (("empty", ["A", "B"]), ("skip", ["A"])):
        done = import_annotations([("coco", source)], tmp_path / unmarked, unmarked, lambda items, count: items)
        assert [sample.id for sample in done.samples] == ids


def test_a_file_that_does_not_say_whose_masks_it_holds_is_refused(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(sound_coco()))
    assert "--as reference" in refused(tmp_path, "coco", path, role=None)


@pytest.mark.parametrize("format", ["coco", "label-studio", "cvat", "nnunet"])
def test_files_damaged_at_random_are_read_or_refused(
    tmp_path: Path, images: Path, counted: Callable[[str, int], None], format: str
) -> None:
    """Whatever the damage, one line or a data set: no other exception."""
    (tmp_path / "coco").write_text(json.dumps(sound_coco()))
    (tmp_path / "label-studio").write_text(brush([*HEADER[:6], 0b11111111, 0, 12, 0, 0, 0b01100000, 9, 255, 255]))
    sound_cvat(tmp_path / "cvat")
    damaged = sound_nnunet(tmp_path / "nnunet") / "dataset.json" if format == "nnunet" else tmp_path / format
    sound, rng, refusals = damaged.read_bytes(), random.Random(0), 0
    source = Source(tmp_path / format, images, None if format == "label-studio" else "reference", SMALL)
    for number in range(60):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 4)] = rng.choice([b"", b"9", b"[", b'"', b"-", rng.randbytes(3)])
        damaged.write_bytes(content)
        try:
            import_annotations([(format, source)], tmp_path / f"out{number}", "empty", lambda items, count: items)
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error)
            assert not (tmp_path / f"out{number}").exists()
    assert refusals > 10
    counted("damaged files of annotation tools", 60)
