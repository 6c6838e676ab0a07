"""From a tool's files to ours, back, and once more: the same masks, bit for bit."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from marked import CLASSES, SIZES, SPLITS, draw_image, draw_mask
from PIL import Image

from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN, Decoding, read_mask
from distseg.data.formats import FORMATS
from distseg.data.formats.contents import Source
from distseg.data.formats.convert import Imported, export_annotations, import_annotations
from distseg.data.sample import Annotation, Sample
from distseg.data.survey import survey
from distseg.errors import UserError

FILES = Path(__file__).with_name("files")
WRITTEN = {
    "coco": (FILES / "coco", "reference"),
    "cvat": (FILES / "cvat.zip", "reference"),
    "label-studio": (FILES / "label_studio/export.json", None),
}
ONE_MASK = [format for format, kind in FORMATS.items() if not kind.all_roles]


def silent(items, count: int):
    return items


def imported(to: Path, *files: tuple[str, Path, str | None]) -> Imported:
    sources = [(format, Source(path, None, role, PLAIN)) for format, path, role in files]
    return import_annotations(sources, to, "empty", silent)


def masks_of(done: Imported) -> dict[tuple[str, str], np.ndarray]:
    """(H, W) class ids as the PNG has them, by id and role."""
    return {
        (sample.id, role): np.asarray(Image.open(path))
        for sample in done.samples
        for role, path in sample.files.items()
        if role != "image"
    }


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=str(key))


def surveyed(root: Path) -> list[Sample]:
    """What training would see of an imported folder."""
    samples, problems = survey(DataConfig(root=root))
    assert not problems
    return samples


def values(path: Path) -> np.ndarray:
    """The class ids of a mask, as an import writes them."""
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("format", WRITTEN)
def test_there_and_back_is_the_same(tmp_path: Path, format: str, to: str) -> None:
    """The files of other programs, to ours, to each format, to ours."""
    path, role = WRITTEN[format]
    first = imported(tmp_path / "first", (format, path, role))
    samples = surveyed(tmp_path / "first")
    assert [sample.id for sample in samples] == sorted(SIZES)
    role = None if FORMATS[to].all_roles else "reference"
    place = tmp_path / "exported"
    named = ("any name for the background", *first.classes[1:])
    done = export_annotations(samples, named, to, role, place, PLAIN, values, silent)
    assert (done.count, done.without) == (5, 0)
    second = imported(tmp_path / "second", (to, place, role))
    assert second.classes == first.classes
    kept = {key: mask for key, mask in masks_of(first).items() if role in (None, key[1])}
    assert_same(masks_of(second), kept)
    assert {s.id: s.split for s in second.samples} == {s.id: s.split for s in samples}
    for sample in second.samples:
        np.testing.assert_array_equal(np.asarray(Image.open(sample.image).convert("RGB")), draw_image(sample.id))


def every_annotator(root: Path) -> Imported:
    """A data set of three annotators and a reference, with ignored pixels, groups and a class that no mask has."""
    first = imported(root.with_name("label_studio"), ("label-studio", *WRITTEN["label-studio"]))
    for sample in first.samples:
        for path in (sample.reference, *(each.mask for each in sample.annotations)):
            assert path is not None
            mask = np.array(Image.open(path))
            mask[:2, :3] = 255
            Image.fromarray(mask).save(path)
    rows = ["id,split,image,reference,annotation:7,annotation:ann@example.org,group"]
    for sample in first.samples:
        paths = [path.relative_to(first.samples[0].image.parents[1]).as_posix() for path in sample.files.values()]
        rows.append(",".join([sample.id, SPLITS[sample.id], *paths, f"patient {SPLITS[sample.id]}"]))
    (root.with_name("label_studio") / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return first


@pytest.mark.parametrize("format", FORMATS)
def test_annotators_groups_and_ignored_pixels_survive(tmp_path: Path, format: str) -> None:
    first = every_annotator(tmp_path / "x")
    classes = (*first.classes, "seen nowhere")
    samples = surveyed(tmp_path / "label_studio")
    roles = [None] if FORMATS[format].all_roles else ["reference", "annotation:7", "annotation:ann@example.org"]
    files = []
    for number, role in enumerate(roles):
        done = export_annotations(samples, classes, format, role, tmp_path / f"export{number}", PLAIN, values, silent)
        assert done.lost == (() if FORMATS[format].keeps_groups else ("groups",))
        files.append((format, tmp_path / f"export{number}", role))
    second = imported(tmp_path / "second", *files)
    assert second.classes == classes
    assert second.ignored
    assert_same(masks_of(second), masks_of(first))
    assert {s.id: s.split for s in second.samples} == SPLITS
    if FORMATS[format].keeps_groups:
        assert {s.id: s.group for s in second.samples} == {id: f"patient {split}" for id, split in SPLITS.items()}


def test_files_of_several_formats_are_joined_by_id(tmp_path: Path) -> None:
    """Classes are joined by name: the two files number them in another order."""
    done = imported(
        tmp_path / "out", ("cvat", FILES / "cvat.zip", "reference"), ("coco", FILES / "coco", "annotation:ann")
    )
    assert done.classes == ("background", "hair & ruler", "skin lesion")
    masks = masks_of(done)
    for id in SIZES:
        np.testing.assert_array_equal(masks[id, "reference"], masks[id, "annotation:ann"])
        np.testing.assert_array_equal(np.array(done.classes)[masks[id, "reference"]], np.array(CLASSES)[draw_mask(id)])
    assert (tmp_path / "out/manifest.csv").read_text().splitlines()[0] == "id,split,image,reference,annotation:ann"


def test_a_second_mask_of_one_role_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a second mask as reference"):
        imported(tmp_path / "out", ("cvat", FILES / "cvat.zip", "reference"), ("coco", FILES / "coco", "reference"))
    assert not list(tmp_path.iterdir())


def test_two_images_of_one_id_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(FILES / "cvat.zip") as archive:
        archive.extractall(tmp_path / "cvat")
    Image.new("RGB", SIZES["holes"][::-1]).save(tmp_path / "cvat/JPEGImages/holes.png")
    files = ("coco", FILES / "coco", "reference"), ("cvat", tmp_path / "cvat", "annotation")
    with pytest.raises(UserError, match="are different images with the id holes"):
        imported(tmp_path / "out", *files)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    def written(root: Path) -> dict[str, bytes]:
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    for name in "ab":
        first = imported(tmp_path / name, ("coco", FILES / "coco", "reference"))
    assert written(tmp_path / "a") == written(tmp_path / "b")
    samples = surveyed(tmp_path / "a")
    for format in ONE_MASK:
        for name in "ab":
            place = tmp_path / name / format
            export_annotations(samples, first.classes, format, None, place, PLAIN, values, silent)
        one, other = tmp_path / "a" / format, tmp_path / "b" / format
        assert one.read_bytes() == other.read_bytes() if one.is_file() else written(one) == written(other)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        imported(tmp_path / "out", ("coco", FILES / "coco", "reference"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_nothing(tmp_path: Path, format: str) -> None:
    first = imported(tmp_path / "first", ("coco", FILES / "coco", "reference"))
    samples = surveyed(tmp_path / "first")
    assert samples[-1].reference is not None
    samples[-1].reference.write_bytes(samples[-1].reference.read_bytes()[:60])
    with pytest.raises(UserError, match=samples[-1].reference.name):
        export_annotations(samples, first.classes, format, "reference", tmp_path / "out", PLAIN, read_mask, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_annotations(samples, first.classes, format, "reference", tmp_path / "out", PLAIN, values, silent)


def test_a_mask_of_another_size_is_not_exported(tmp_path: Path) -> None:
    first = imported(tmp_path / "first", ("coco", FILES / "coco", "reference"))
    samples = surveyed(tmp_path / "first")
    assert samples[0].reference is not None
    Image.new("L", (5, 7)).save(samples[0].reference)
    with pytest.raises(UserError, match=r"references/.*is for an image of 5×7"):
        export_annotations(samples, first.classes, "cvat", None, tmp_path / "out", PLAIN, read_mask, silent)


def test_which_masks_to_export_must_be_said(tmp_path: Path) -> None:
    first = imported(tmp_path / "first", ("label-studio", *WRITTEN["label-studio"]))
    samples = surveyed(tmp_path / "first")
    for format in ONE_MASK:
        with pytest.raises(UserError, match=r"--as annotation:7 \| annotation:ann@example.org \| reference"):
            export_annotations(samples, first.classes, format, None, tmp_path / "out", PLAIN, values, silent)
    with pytest.raises(UserError, match="no image has such a mask"):
        export_annotations(samples, first.classes, "coco", "annotation:bob", tmp_path / "out", PLAIN, values, silent)


def test_names_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    imported(tmp_path / "first", ("coco", FILES / "coco", "reference"))
    samples = surveyed(tmp_path / "first")
    for format in ONE_MASK:
        with pytest.raises(UserError, match=r"data\.classes: the name Ignore"):
            export_annotations(
                samples, ("background", "a", "Ignore"), format, None, tmp_path / "x", PLAIN, values, silent
            )
    with pytest.raises(UserError, match="cannot hold the name 'a:b'"):
        export_annotations(samples, ("background", "a:b", "c"), "cvat", None, tmp_path / "x", PLAIN, values, silent)


def test_a_photo_that_is_turned_has_its_masks_as_displayed(tmp_path: Path) -> None:
    """And where the orientation is ignored, the exported image no longer has one."""
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "images/A.jpg", exif=exif)
    runs = {"size": [20, 10], "counts": [5, 10, 185]}
    content = {
        "images": [{"id": 1, "file_name": "A.jpg", "width": 10, "height": 20}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": runs}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    done = imported(tmp_path / "out", ("coco", tmp_path / "x.json", "reference"))
    assert masks_of(done)["A", "reference"].shape == (20, 10)
    ignoring = Decoding(orientation="ignore")
    source = Source(tmp_path / "x.json", tmp_path / "images", "reference", ignoring)
    with pytest.raises(UserError, match=r"has 20×10; .*data\.orientation"):
        import_annotations([("coco", source)], tmp_path / "other", None, silent)
    stored = replace(done.samples[0], split="train", reference=tmp_path / "stored.png")
    Image.new("L", (20, 10), 255).save(tmp_path / "stored.png")
    for format in ONE_MASK:
        place = tmp_path / format
        export_annotations([stored], ("background", "a"), format, None, place, ignoring, read_mask, silent)
        again = imported(tmp_path / f"{format}_again", (format, place, "reference"))
        assert Image.open(again.samples[0].image).size == (20, 10)
        assert not Image.open(again.samples[0].image).getexif().get(0x0112)


def write_coco(path: Path, **image: object) -> Path:
    """One image A.png of 4×3 pixels, beside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path.parent / "A.png")
    runs = {"size": [3, 4], "counts": [3, 4, 5]}
    content = {
        "images": [{"id": 1, "file_name": "A.png", "width": 4, "height": 3, **image}],
        "categories": [{"id": 0, "name": "Background"}, {"id": 7, "name": "a"}, {"id": 3, "name": "IGNORE"}],
        "annotations": [{"image_id": 1, "category_id": 7, "segmentation": runs, "iscrowd": 1}],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test/instances.json", ""),  # a folder's name says nothing
        ("instances_val2017.json", "val"),
        ("Validation.json", "val"),
        ("valid/_annotations.coco.json", "val"),
        ("latest.json", ""),
    ],
)
def test_the_split_is_what_the_file_is_called(tmp_path: Path, name: str, split: str) -> None:
    path = write_coco(tmp_path / name)
    [sample] = imported(tmp_path / "out", ("coco", path, "reference")).samples
    assert sample.split == split


def test_a_folder_of_a_file_a_split_is_read_whole(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_coco(tmp_path / f"in/{split}/_annotations.coco.json", file_name=f"{split}.png")
        (tmp_path / f"in/{split}/A.png").rename(tmp_path / f"in/{split}/{split}.png")
    done = imported(tmp_path / "out", ("coco", tmp_path / "in", "reference"))
    assert {sample.id: sample.split for sample in done.samples} == {"train": "train", "valid": "val"}


def test_images_of_one_name_in_two_folders_have_ids_of_their_whole_paths(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_coco(tmp_path / f"in/{split}/_annotations.coco.json", file_name=f"{split}/A.png")
    done = imported(tmp_path / "out", ("coco", tmp_path / "in", "reference"))
    assert {sample.id: sample.split for sample in done.samples} == {"train__A": "train", "valid__A": "val"}


def test_crowds_are_painted_and_two_names_mean_what_they_say(tmp_path: Path) -> None:
    """Background is 0 and ignore no class, wherever they are among the categories; group may be another tool's."""
    done = imported(tmp_path / "out", ("coco", write_coco(tmp_path / "x.json", group=17), "reference"))
    assert done.classes == ("background", "a")
    assert masks_of(done)["A", "reference"].tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert done.samples[0].group == ""
    assert (tmp_path / "out/classes.yaml").read_text().splitlines()[1:] == [
        "data:",
        '  classes: {"background": 0, "a": 1}',
    ]


def test_names_of_classes_that_a_config_may_not_have_are_made_plain() -> None:
    names = ("background", "hair & ruler", "a:b", "a/b", "a-b", "$${x}", "Läsion é", "x" * 99)
    keys = Imported(names, ignored=True).keys
    assert list(keys["classes"].items()) == [
        ("background", 0),
        ("hair - ruler", 1),
        ("class 2", 2),  # a-b is taken
        ("class 3", 3),
        ("a-b", 4),
        ("x", 5),
        ("Läsion é", 6),
        ("x" * 64, 7),
    ]
    assert keys["ignore"] == [255]


def test_a_link_out_of_an_unpacked_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(FILES / "cvat.zip") as archive:
        archive.extractall(tmp_path / "cvat")
    (tmp_path / "secret.png").write_bytes((tmp_path / "cvat/JPEGImages/holes.png").read_bytes())
    (tmp_path / "cvat/JPEGImages/holes.png").unlink()
    (tmp_path / "cvat/JPEGImages/holes.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"holes\.png: a link that leads out"):
        imported(tmp_path / "out", ("cvat", tmp_path / "cvat", "reference"))


@pytest.mark.data
@pytest.mark.skipif("DISTSEG_DATA" not in os.environ, reason="DISTSEG_DATA does not name the folder of samples")
@pytest.mark.parametrize("format", FORMATS)
def test_a_crowds_masks_survive(tmp_path: Path, format: str) -> None:
    """Thirty microscopy images of BU-BIL with seven crowd workers and the experts, in JPEG."""
    data = Path(os.environ["DISTSEG_DATA"]) / "bubil_crowd"
    listed, _ = survey(DataConfig(root=data))
    samples = [
        replace(s, annotations=tuple(Annotation(f"w{n}", data / f"crowd/{s.id}_w{n}.png") for n in range(1, 8)))
        for s in listed[::9]
    ]
    roles = [None] if FORMATS[format].all_roles else ["reference", "annotation:w1", "annotation:w7"]
    files = []
    for number, role in enumerate(roles):
        place = tmp_path / f"export{number}"
        export_annotations(samples, ("background", "cell"), format, role, place, PLAIN, read_mask, silent)
        files.append((format, place, role))
    found = masks_of(imported(tmp_path / "back", *files))
    assert len(found) == 30 * (8 if roles == [None] else 3)
    for sample in samples:
        for role in (role for id, role in found if id == sample.id):
            np.testing.assert_array_equal(found[sample.id, role], read_mask(sample.files[role]))
