"""What other programs have written is read to the pixel; the masks are known from marked.py."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from marked import CLASSES, SIZES, SPLITS, draw_image, draw_mask
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from distseg.data.decode import PLAIN
from distseg.data.formats import FORMATS
from distseg.data.formats.brush import brush_to_mask, mask_to_brush
from distseg.data.formats.contents import Contents, Item, Source
from distseg.data.formats.shapes import labels_to_runs, polygons_to_mask, runs_to_mask
from distseg.errors import BadFileError

FILES = Path(__file__).with_name("files")
NAMES = {id: np.array(CLASSES)[draw_mask(id)] for id in SIZES}
"""(H, W) names of classes by id: files may number them in another order."""


def read(format: str, path: Path, role: str | None = "reference", images: Path | None = None) -> Contents:
    return FORMATS[format].read(Source(path, images, role, PLAIN))


def named(contents: Contents, item: Item, role: str = "reference") -> np.ndarray:
    return np.array([*contents.classes, *["?"] * 255])[item.masks[role]]


@pytest.mark.parametrize(("format", "path"), [("coco", "coco"), ("cvat", "cvat.zip")])
def test_datumaros_files_are_read_to_the_pixel(format: str, path: str) -> None:
    contents = read(format, FILES / path)
    items = {item.id: item for item in contents.items}
    assert items.keys() == SIZES.keys()
    assert set(contents.classes) == set(CLASSES)
    assert contents.classes[0] == "background"
    for id, item in items.items():
        np.testing.assert_array_equal(named(contents, item), NAMES[id])
        assert item.split == SPLITS[id]
        assert item.picture.size == SIZES[id][::-1]
        assert item.unmarked == (id == "empty")
    assert (contents.count, contents.unmarked) == (5, 1)


def test_label_studios_annotators_are_read_to_the_pixel() -> None:
    contents = read("label-studio", FILES / "label_studio/export.json", role=None)
    items = {item.id: item for item in contents.items}
    assert items.keys() == SIZES.keys()  # the names before the upload
    for id, item in items.items():
        # The skipped annotation of user 9 is none.
        assert item.masks.keys() == {"annotation:ann@example.org", "annotation:7", "reference"}
        for role, shift in (("annotation:ann@example.org", 0), ("annotation:7", 2), ("reference", 1)):
            np.testing.assert_array_equal(named(contents, item, role), np.array(CLASSES)[draw_mask(id, shift)])
    assert (contents.count, contents.unannotated) == (5, 1)


def test_outlines_are_filled_as_pycocotools_does() -> None:
    contents = read("coco", FILES / "coco_outlines")
    item = next(item for item in contents.items if item.id == "two words")
    peer = COCO(FILES / "coco_outlines/annotations/instances_val.json")
    expected = np.full(SIZES["two words"], "background", dtype=object)
    for annotation in peer.loadAnns(peer.getAnnIds()):  # in the file's order: the later covers the earlier
        expected[peer.annToMask(annotation) > 0] = peer.cats[annotation["category_id"]]["name"]
    np.testing.assert_array_equal(named(contents, item), expected)
    shapes = [peer.annToMask(annotation) for annotation in peer.loadAnns(peer.getAnnIds())]
    assert item.overlapping == int((shapes[0] & shapes[1]).sum()) > 0


def mask_to_runs(mask: np.ndarray) -> dict:
    return next(labels_to_runs(mask.astype(np.int32), 1))


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    mask = rng.random((height, width)) < rng.random()
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    assert mask_to_runs(mask) == {"size": [height, width], "counts": encoded["counts"].decode()}
    np.testing.assert_array_equal(runs_to_mask(encoded["counts"].decode(), (width, height), "x"), mask)


def test_each_label_has_its_runs() -> None:
    labels = np.random.default_rng(0).integers(0, 6, (29, 31)).astype(np.int32)
    for label, runs in enumerate(labels_to_runs(labels, 5), start=1):
        encoded = coco_mask.encode(np.asfortranarray(labels == label, np.uint8))
        assert runs == {"size": [29, 31], "counts": encoded["counts"].decode()}
    assert label == 5


@pytest.mark.parametrize("mask", [np.zeros((7, 11), bool), np.ones((7, 11), bool), np.ones((401, 397), bool)])
def test_run_lengths_of_flat_masks(mask: np.ndarray) -> None:
    size = mask.shape[::-1]
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
    np.testing.assert_array_equal(runs_to_mask(encoded, size, "x"), mask)
    np.testing.assert_array_equal(brush_to_mask(bytes(mask_to_brush(mask)), size, "x"), mask)


@pytest.mark.parametrize("seed", range(5))
def test_brush_masks_survive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 200, 2)) < rng.random()
    np.testing.assert_array_equal(brush_to_mask(bytes(mask_to_brush(mask)), mask.shape[::-1], "x"), mask)


def test_a_brush_mask_of_single_values_is_read() -> None:
    """As Label Studio's own encoder has them, in JavaScript: values in a row are stored as they are."""
    alpha = np.array([[0, 255, 0], [9, 0, 255]], np.uint8)
    values = np.stack([np.full_like(alpha, 7)] * 3 + [alpha], axis=-1).ravel()  # a colour too where alpha is 0
    bits = f"{values.size:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}" + "0" + "10" + f"{values.size - 1:08b}"
    bits += "".join(f"{value:08b}" for value in values)
    rle = bytes(int(bits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(bits), 8))
    np.testing.assert_array_equal(brush_to_mask(rle, (3, 2), "x"), alpha > 0)


def write_label_studio(folder: Path, *regions: dict, size: tuple[int, int] = (40, 20)) -> Path:
    """One image A.png of size (width, height), annotated by user 1."""
    Image.new("RGB", size).save(folder / "A.png")
    task = {"id": 1, "data": {"image": "s3://bucket/folder/A.png"}}
    path = folder / "export.json"
    path.write_text(json.dumps([task | {"annotations": [{"completed_by": 1, "result": list(regions)}]}]))
    return path


def region(kind: str, label: str, **value: object) -> dict:
    return {"type": kind, "original_width": 40, "original_height": 20, "value": {kind: [label], **value}}


def test_label_studios_outlines_and_boxes(tmp_path: Path) -> None:
    path = write_label_studio(
        tmp_path,
        region("polygonlabels", "a", points=[[10, 10], [60, 10], [60, 80], [10, 80]]),
        region("rectanglelabels", "b", x=50, y=50, width=25, height=25, rotation=0),
        region("rectanglelabels", "c", x=25, y=20, width=10, height=10, rotation=90),
        {"type": "choices", "value": {"choices": ["melanoma"]}},
    )
    contents = read("label-studio", path, role=None)
    [item] = contents.items
    expected = np.full((20, 40), "background", object)
    expected[2:16, 4:24] = "a"
    expected[10:15, 20:30] = "b"  # later, so above
    expected[4:8, 8:10] = "c"  # turned clockwise about its upper left corner, (10, 4): 4 long downwards, 2 to the left
    np.testing.assert_array_equal(named(contents, item, "annotation:1"), expected)
    assert item.overlapping == 5 * 4 + 4 * 2


def test_objects_of_one_class_may_overlap_untold(tmp_path: Path) -> None:
    boxes = [region("rectanglelabels", label, x=x, y=0, width=50, height=50) for label, x in (("a", 0), ("a", 25))]
    [item] = read("label-studio", write_label_studio(tmp_path, *boxes), role=None).items
    assert item.masks["annotation:1"].sum() == 30 * 10
    assert item.overlapping == 0


def test_label_studios_labels_have_the_order_of_the_project(tmp_path: Path) -> None:
    path = write_label_studio(tmp_path, region("rectanglelabels", "b", x=0, y=0, width=50, height=50))
    labels = '<View><BrushLabels name="x" toName="y"><Label value="z"/><Label value="b"/></BrushLabels></View>'
    (tmp_path / "label_config.xml").write_text(labels)
    assert read("label-studio", path, role=None).classes == ("background", "z", "b")


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("/data/upload/3/0123abcd-A.png", "0123abcd-A.png"),
        ("/data/upload/3/0123abcd-A.png", "A.png"),
        ("/data/local-files/?d=some/folder/A%20b%C3%A9.png", "some/folder/A bé.png"),
        ("https://example.org/x/A.png?signature=1", "x/A.png"),
        ("A.png", "deep/in/folders/A.png"),
        ("e\u0301.png", "\u00e9.png"),  # macOS stores é as two letters
        ("one/A.png", "one/A.png"),
    ],
)
def test_an_image_is_found_by_its_name(tmp_path: Path, address: str, stored: str) -> None:
    images = tmp_path / "images"
    (images / stored).parent.mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(images / stored)
    (images / "two").mkdir()
    if stored.startswith("one/"):
        Image.new("RGB", (30, 20)).save(images / "two/A.png")
    tasks = [{"data": {"image": address}, "annotations": [{"completed_by": 1, "result": []}]}]
    (tmp_path / "x.json").write_text(json.dumps(tasks))
    [item] = read("label-studio", tmp_path / "x.json", None, images).items
    assert item.picture.size == (3, 2)


def write_nnunet(folder: Path, ending: str, labels: dict[str, int], channels: int = 1) -> Path:
    """As its documentation says: imagesTr/CASE_0000 beside labelsTr/CASE."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for id in SIZES:
        for channel in range(channels):
            image = draw_image(id) if channels == 1 and ending == ".png" else draw_image(id)[..., channel]
            save_slice(folder / f"imagesTr/{id}_{channel:04d}{ending}", image)
        save_slice(folder / f"labelsTr/{id}{ending}", draw_mask(id))
    names = {str(channel): "x" for channel in range(3 if ending == ".png" else channels)}
    description = {"channel_names": names, "labels": labels, "numTraining": 5, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def save_slice(path: Path, values: np.ndarray) -> None:
    if path.name.endswith(".png"):
        Image.fromarray(values).save(path)
    else:  # SimpleITK, which nnU-Net reads with, has the axes the other way round
        nibabel.save(nibabel.Nifti1Image(values.T[..., None], np.eye(4)), path)


LABELS = {name: value for value, name in enumerate(CLASSES)}


@pytest.mark.parametrize(("ending", "channels"), [(".png", 1), (".png", 3), (".nii.gz", 1), (".nii", 3)])
def test_nnunets_raw_folder(tmp_path: Path, ending: str, channels: int) -> None:
    contents = read("nnunet", write_nnunet(tmp_path / "Dataset001_x", ending, LABELS, channels))
    assert contents.classes == CLASSES
    items = {item.id: item for item in contents.items}
    assert items.keys() == SIZES.keys()
    for id, item in items.items():
        np.testing.assert_array_equal(named(contents, item), NAMES[id])
        assert item.split == "train"
        (tmp_path / "image.png").write_bytes(item.picture.content)
        shown = np.asarray(Image.open(tmp_path / "image.png").convert("RGB"))
        planes = [0, 1, 2] if (ending, channels) == (".png", 1) or channels == 3 else [0, 0, 0]
        np.testing.assert_array_equal(shown, draw_image(id)[..., planes])


def test_nnunets_ignore_label_is_ignored(tmp_path: Path) -> None:
    labels = {"background": 0, "skin lesion": 1, "ignore": 2}
    contents = read("nnunet", write_nnunet(tmp_path / "Dataset001_x", ".png", labels))
    assert contents.classes == ("background", "skin lesion")
    for item in contents.items:
        np.testing.assert_array_equal(item.masks["reference"] == 255, NAMES[item.id] == "hair & ruler")


def test_an_outline_needs_three_points() -> None:
    with pytest.raises(BadFileError, match="three points"):
        polygons_to_mask([[1, 1, 2, 2]], (10, 10), "x")  # which pycocotools takes for a box


def test_cvats_grey_masks_hold_lines_of_the_label_map(tmp_path: Path) -> None:
    for folder in ("SegmentationClass", "JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    values = np.array([[0, 1], [2, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "SegmentationClass/a.b.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "JPEGImages/a.b.jpg")
    (tmp_path / "ImageSets/Segmentation/default.txt").write_text("a.b\n")
    (tmp_path / "labelmap.txt").write_text("q:0,128,0::\nbackground:0,0,0::\nz\n")
    contents = read("cvat", tmp_path)
    [item] = contents.items
    assert (item.id, item.split, contents.classes) == ("a.b", "", ("background", "q", "z"))
    np.testing.assert_array_equal(named(contents, item), [["q", "background"], ["z", "q"]])


def test_bits_past_a_byte_are_read() -> None:
    """A row of values that begins in the middle of a byte."""
    header = f"{8:032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}"
    bits = header + "1" + "00" + f"{3:03b}" + f"{0:08b}" + "0" + "00" + f"{3:03b}" + f"{200:08b}" * 4
    rle = bytes(int(bits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(bits), 8))
    np.testing.assert_array_equal(brush_to_mask(rle, (2, 1), "x"), [[False, True]])
