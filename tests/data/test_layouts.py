"""What people's folders and tables hold beside data: read, or refused by name."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distseg.data.config import DataConfig
from distseg.data.survey import read_samples, survey
from distseg.errors import UserError


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write_pairs(root: Path, ids: list[str], images: str = "images", masks: str = "masks") -> None:
    for id in ids:
        touch(root / images / f"{id}.jpg")
        touch(root / masks / f"{id}.png")


def ids(root: Path, **keys) -> list[str]:
    return [sample.id for sample in read_samples(DataConfig(root=root, **keys))]


# --- folders ----------------------------------------------------------------------------------------------------------


def test_files_of_the_operating_system_are_no_data(tmp_path):
    write_pairs(tmp_path, ["a", "b", "c"])
    for folder in ("images", "masks"):
        for path in [*(tmp_path / folder).iterdir()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png", "__MACOSX/a.jpg", "@eaDir/readme.txt"):
            touch(tmp_path / folder / name)
    assert survey(DataConfig(root=tmp_path))[1] == []
    assert ids(tmp_path) == ["a", "b", "c"]


def test_images_in_sub_folders_are_read(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    write_pairs(tmp_path, ["c"], "images/batch2", "masks/batch2")
    write_pairs(tmp_path, ["d"], "images/batch2/deep", "masks")
    assert ids(tmp_path) == ["a", "b", "c", "d"]
    inner = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
    for id in ("x", "y"):
        touch(tmp_path / "isic" / inner[0] / inner[0] / f"{id}.jpg")  # unzipped into a folder of the archive's name
        touch(tmp_path / "isic" / inner[1] / inner[1] / f"{id}_segmentation.png")
    assert ids(tmp_path / "isic") == ["x", "y"]


def test_the_same_name_in_two_sub_folders_is_named(tmp_path):
    write_pairs(tmp_path, ["a"], "images/one", "masks/one")
    write_pairs(tmp_path, ["a"], "images/two", "masks/two")
    write_pairs(tmp_path, ["b"])
    with pytest.raises(UserError, match=r"one/a\.jpg and two/a\.jpg have the same id a; keep one"):
        ids(tmp_path)
    assert ids(tmp_path, on_bad="skip") == ["b"]


def test_linked_folders_are_followed_once_and_only_inside_the_root(tmp_path):
    root = tmp_path / "data"
    write_pairs(root, ["a"])
    write_pairs(tmp_path / "outside", ["x"])
    (root / "images" / "circle").symlink_to(root / "images")
    assert ids(root) == ["a"]
    (root / "images" / "link").symlink_to(tmp_path / "outside" / "images")
    (root / "masks" / "link").symlink_to(tmp_path / "outside" / "masks")
    with pytest.raises(UserError, match=r"a symbolic link that leads out of data\.root"):
        ids(root)
    assert ids(root, follow_links=True) == ["a", "x"]


UNFIT = {
    "two\nlines": r"two\nlines",
    "\x1b[31mred": r"\x1b[31mred",
    "=HYPERLINK(1)": "=HYPERLINK(1)",
    "+1": "+1",
    "-1": "-1",
    "@a": "@a",
    os.fsdecode(b"l\xe4sion"): r"l\xe4sion",
    "a\u202eb": r"a\u202eb",
    "a:b": "a:b",
    "long" * 55: "longlong",
}


@pytest.mark.parametrize("id", UNFIT)
def test_one_rule_for_ids_of_folders_and_manifests(tmp_path, id):
    (tmp_path / "folders").mkdir()
    write_pairs(tmp_path / "folders", [id, "good"])
    samples, problems = survey(DataConfig(root=tmp_path / "folders"))
    assert [sample.id for sample in samples] == ["good"]
    (tmp_path / "table").mkdir()
    if id.isprintable() or id == "two\nlines":  # other bytes are no UTF-8 table
        (tmp_path / "table" / "manifest.csv").write_text(f'id,split,image,mask\n"{id}",train,i.jpg,m.png\n')
        problems += survey(DataConfig(root=tmp_path / "table"))[1]
    for problem in problems:
        text = str(problem)
        assert UNFIT[id] in text and text.isprintable() and text.encode()
        assert "id " in problem.reason


@pytest.mark.parametrize("id", ["IMG (1)", "Läsion_3", "ISIC_0000001", "a.b-c d", "0", "病変"])
def test_names_as_people_have_them_are_ids(tmp_path, id):
    write_pairs(tmp_path, [id])
    assert ids(tmp_path) == [id]


def test_a_part_of_a_challenge_without_masks_is_left_out_and_its_split_drawn(tmp_path, caplog):
    for number in range(40):
        touch(tmp_path / "ISIC2018_Task1-2_Training_Input" / f"t{number}.jpg")
        touch(tmp_path / "ISIC2018_Task1_Training_GroundTruth" / f"t{number}_segmentation.png")
        touch(tmp_path / "ISIC2018_Task1-2_Validation_Input" / f"v{number % 5}.jpg")
        touch(tmp_path / "ISIC2018_Task1-2_Test_Input" / f"e{number}.jpg")
        touch(tmp_path / "ISIC2018_Task1_Test_GroundTruth" / f"e{number}_segmentation.png")
    samples = read_samples(DataConfig(root=tmp_path))
    [said] = caplog.messages
    assert "ISIC2018_Task1-2_Validation_Input: left out its 5 images" in said and "Validation_GroundTruth" in said
    assert {s.id[0] for s in samples if s.split == "val"} == {"t"}
    assert {s.id[0] for s in samples if s.split == "test"} == {"e"}


# --- tables -----------------------------------------------------------------------------------------------------------

TABLE = "id,split,image,mask\na,train,images/a.jpg,masks/a.png\nb,val,images/b.jpg,masks/b.png\n"
TABLES = {
    "commas": TABLE.encode(),
    "semicolons": TABLE.replace(",", ";").encode(),
    "semicolons and a byte order mark": b"\xef\xbb\xbf" + TABLE.replace(",", ";").encode(),
    "tabs": TABLE.replace(",", "\t").encode(),
    "UTF-16, as Excel's Unicode text": TABLE.replace(",", "\t").encode("utf-16"),
    "its separator named": ("sep=;\r\n" + TABLE.replace(",", ";")).encode(),
    "backslashes": TABLE.replace("/", "\\").encode(),
    "Windows' line ends": TABLE.replace("\n", "\r\n").encode(),
    "empty rows": (TABLE + ",,,\n\n,,,\n").encode(),
    "capitals and blanks": TABLE.replace("id,split,image,mask", "ID, Split ,Image,MASK").encode(),
    "quotes": TABLE.replace("images/a.jpg", '"images/a.jpg"').encode(),
    "an empty column": TABLE.replace("\n", ",\n").encode(),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_spreadsheets_save_them_are_read(tmp_path, kind):
    (tmp_path / "manifest.csv").write_bytes(TABLES[kind])
    samples, problems = survey(DataConfig(root=tmp_path, test_fraction=0))
    assert problems == []
    assert [(s.id, s.split, s.image, s.truth) for s in samples] == [
        ("a", "train", tmp_path / "images/a.jpg", tmp_path / "masks/a.png"),
        ("b", "val", tmp_path / "images/b.jpg", tmp_path / "masks/b.png"),
    ]


def test_a_file_with_a_backslash_in_its_name_is_that_file(tmp_path):
    (tmp_path / "manifest.csv").write_text("id,split,image,mask\na,train,i\\a.jpg,m\\a.png\n")
    touch(tmp_path / "i\\a.jpg")
    [sample] = read_samples(DataConfig(root=tmp_path, test_fraction=0, val_fraction=0))
    assert (sample.image, sample.truth) == (tmp_path / "i\\a.jpg", tmp_path / "m" / "a.png")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere.csv"), "a link to a file that does not exist"),
        (lambda path: path.symlink_to(path.name), "links"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.write_bytes(b'id,split,image,mask\n"a,train,i,m\n'), "cannot be read as CSV"),
        (lambda path: path.write_bytes(b"\xff\xfe\0"), "cannot be read as text"),
        (lambda path: path.write_bytes(b"id,split,image,mask\nl\xe4\0,train,i,m\n"), "cannot be read as text"),
        (lambda path: path.write_text("id,split,image,image,mask\n"), "has the column image twice"),
        (lambda path: path.write_text("a,train,i,m\n"), "lacks the column id"),
        (lambda path: path.write_text(""), "its manifest.csv lists no images"),
    ],
)
def test_a_manifest_that_exists_is_read_or_refused_and_never_skipped(tmp_path, make, said):
    """Were it skipped, another layout would be read, with other splits."""
    write_pairs(tmp_path, [f"s{n}" for n in range(9)])
    make(tmp_path / "manifest.csv")
    with pytest.raises(UserError, match=said) as raised:
        read_samples(DataConfig(root=tmp_path))
    assert "\n" not in str(raised.value)
    assert len(ids(tmp_path, layout="folders")) == 9


def test_a_table_of_windows_code_page_is_read(tmp_path):
    (tmp_path / "manifest.csv").write_bytes("id;image;mask\nLäsion_é;i/ä.jpg;m/ä.png\n".encode("cp1252"))
    [sample] = read_samples(DataConfig(root=tmp_path, test_fraction=0, val_fraction=0))
    assert (sample.id, sample.image.name) == ("Läsion_é", "ä.jpg")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("other", ["NFC", "NFD"])
def test_accents_composed_or_not_are_the_same_name(tmp_path, form, other):
    name, same = unicodedata.normalize(form, "Läsion é"), unicodedata.normalize(other, "Läsion é")
    touch(tmp_path / "folders" / "images" / f"{name}.jpg")
    touch(tmp_path / "folders" / "masks" / f"{same}.png")
    assert ids(tmp_path / "folders") == [unicodedata.normalize("NFC", name)]
    touch(tmp_path / "table" / "i" / f"{name}.jpg")
    (tmp_path / "table" / "manifest.csv").write_text(f"id,image,mask\n{same},i/{same}.jpg,m.png\n", encoding="utf-8")
    [sample] = read_samples(DataConfig(root=tmp_path / "table"))
    assert sample.image.exists() and sample.id == unicodedata.normalize("NFC", name)


# --- root -------------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DataConfig(root="~/data", cache="~/cache")
    assert (config.root, config.cache) == (tmp_path / "data", tmp_path / "cache")
    with pytest.raises(ValueError, match="no such user"):
        DataConfig(root="~nobody-of-this-name/data")


def test_a_root_of_no_layout_says_what_was_looked_for_and_what_is_there(tmp_path):
    for name in ("labels", "pictures"):
        (tmp_path / name).mkdir()
    touch(tmp_path / "read\nme.txt")
    with pytest.raises(UserError, match=r"references/ and annotations/\); it holds labels/, pictures/, read\\nme.txt"):
        read_samples(DataConfig(root=tmp_path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"memory": 1e300}, "less than or equal"),
        ({"device_memory": 1e300}, "less than or equal"),
        ({"threads": 10**9}, "less than or equal"),
        ({"image_size": 10**6}, "less than or equal"),
        ({"max_pixels": 2**40}, "less than or equal"),
        ({"max_file_bytes": 0}, "greater than or equal"),
        ({"layout": "coco"}, r"must be auto \| manifest \| isic \| ph2 \| ham10000 \| folders"),
        ({"orientation": "turn"}, "'apply' or 'ignore'"),
    ],
)
def test_values_have_bounds(tmp_path, keys, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(root=tmp_path, **keys)


def test_bounds_on_files_are_keys(tmp_path):
    from distseg.data.checks import inspect_files

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        mask = np.zeros((20, 20), np.uint8)
        mask[5:9, 5 + number : 12] = 255
        Image.fromarray(mask).convert("RGB").save(tmp_path / "images" / f"{number}.jpg", progressive=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    for keys, said, refused in (
        ({}, None, 0),
        ({"max_pixels": 399}, "data.max_pixels", 6),
        ({"max_file_bytes": 50}, "data.max_file", 6),
        ({"max_scans": 5}, "scans, above data.max_scans (5)", 3),  # PIL writes a progressive JPEG of ten
    ):
        config = DataConfig(root=tmp_path, **keys)
        problems = inspect_files(read_samples(config), config.decoding, threads=1).problems
        assert len(problems) == refused
        assert all(said in problem.reason for problem in problems if said)
