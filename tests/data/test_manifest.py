from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from distseg.data.checks import check_splits, inspect_files, usable_samples
from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN
from distseg.data.manifest_file import write_manifest
from distseg.data.sample import Annotation, Sample
from distseg.data.splits import split_clean
from distseg.data.survey import read_samples
from distseg.errors import UserError


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def pairs(samples: list[Sample], root: Path) -> dict[str, tuple[str, str, str]]:
    return {s.id: (s.split, str(s.image.relative_to(root)), str(s.truth.relative_to(root))) for s in samples}


def no_drawn_splits(root: Path, **changes) -> DataConfig:
    return DataConfig(root=root, val_fraction=0, test_fraction=0, **changes)


# --- layouts and pairing ----------------------------------------------------------------------------------------------


def test_manifest_reads_splits_noisy_masks_and_ignores_extra_columns(tmp_path):
    (tmp_path / "manifest.csv").write_text(
        "width,id,split,image,mask,noisy_mask\n9,b,val,i/b.jpg,m/b.png,\n9,a,train,i/a.jpg,m/a.png,n/a.png\n"
        "9,c,test,i/c.jpg,m/c.png,\n"
    )
    samples = read_samples(DataConfig(root=tmp_path))
    assert [s.id for s in samples] == ["a", "b", "c"]
    assert samples[0] == Sample(
        "a", "train", tmp_path / "i/a.jpg", tmp_path / "m/a.png", (Annotation("", tmp_path / "n/a.png"),)
    )
    assert samples[1] == Sample("b", "val", tmp_path / "i/b.jpg", tmp_path / "m/b.png")


@pytest.mark.parametrize(
    ("folders", "image_names", "mask_names"),
    [
        pytest.param(
            {
                "train": ("ISBI2016_ISIC_Part1_Training_Data", "ISBI2016_ISIC_Part1_Training_GroundTruth"),
                "test": ("ISBI2016_ISIC_Part1_Test_Data", "ISBI2016_ISIC_Part1_Test_GroundTruth"),
            },
            "{}.jpg",
            "{}_Segmentation.png",
            id="2016",
        ),
        pytest.param(
            {
                "train": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
                "val": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
                "test": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
            },
            "{}.jpg",
            "{}_segmentation.png",
            id="2017",
        ),
        pytest.param(
            {
                "train": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
                "val": ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
                "test": ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
            },
            "{}.jpg",
            "{}_segmentation.png",
            id="2018",
        ),
    ],
)
def test_isic_challenge_folders(tmp_path, folders, image_names, mask_names):
    expected = {}
    for number, (split, (images, masks)) in enumerate(folders.items()):
        for item in range(2):
            id = f"ISIC_{number}{item:06d}"
            image, mask = Path(images, image_names.format(id)), Path(masks, mask_names.format(id))
            touch(tmp_path / image)
            touch(tmp_path / mask)
            touch(tmp_path / images / f"{id}_superpixels.png")
            expected[id] = (split, str(image), str(mask))
        touch(tmp_path / images / "LICENSE.txt")
    assert pairs(read_samples(no_drawn_splits(tmp_path)), tmp_path) == expected


def test_isic_refuses_two_challenges_and_images_without_ground_truth(tmp_path):
    touch(tmp_path / "ISIC-2017_Training_Data/ISIC_1.jpg")
    with pytest.raises(UserError, match="ISIC-2017_Training_Part1_GroundTruth"):
        read_samples(DataConfig(root=tmp_path))
    touch(tmp_path / "ISIC2018_Task1-2_Training_Input/ISIC_1.jpg")
    with pytest.raises(UserError, match="2017, 2018"):
        read_samples(DataConfig(root=tmp_path))


@pytest.mark.parametrize("root", ["", "PH2 Dataset images", "PH2Dataset/PH2 Dataset images"])
def test_ph2(tmp_path, root):
    for id in ("IMD003", "IMD002"):
        touch(tmp_path / root / id / f"{id}_Dermoscopic_Image" / f"{id}.bmp")
        touch(tmp_path / root / id / f"{id}_lesion" / f"{id}_lesion.bmp")
    samples = read_samples(no_drawn_splits(tmp_path))
    assert [s.id for s in samples] == ["IMD002", "IMD003"]
    assert all(s.image.is_file() and s.truth.is_file() and s.id in s.truth.name for s in samples)


def test_folders_pair_by_stem_with_or_without_an_ending(tmp_path):
    for image, mask in [("a.jpg", "a.png"), ("b.JPG", "b_mask.png"), ("c.png", "c_Segmentation.PNG")]:
        touch(tmp_path / "images" / image)
        touch(tmp_path / "masks" / mask)
    assert pairs(read_samples(no_drawn_splits(tmp_path)), tmp_path) == {
        "a": ("train", "images/a.jpg", "masks/a.png"),
        "b": ("train", "images/b.JPG", "masks/b_mask.png"),
        "c": ("train", "images/c.png", "masks/c_Segmentation.PNG"),
    }


def test_nothing_depends_on_the_order_of_a_listing(tmp_path, monkeypatch):
    for number in range(40):
        touch(tmp_path / "images" / f"{number}.jpg")
        touch(tmp_path / "masks" / f"{number}_mask.png")
    config = DataConfig(root=tmp_path, val_fraction=0.2, test_fraction=0.3)
    expected = read_samples(config)
    listing = Path.iterdir
    for shuffle in range(3):
        rng = np.random.default_rng(shuffle)
        monkeypatch.setattr(Path, "iterdir", lambda path, rng=rng: iter(rng.permutation(sorted(listing(path)))))
        assert read_samples(config) == expected
    assert all(s.truth.name == f"{s.image.stem}_mask.png" for s in expected)


def write_folders(root: Path, ids: list[str]) -> None:
    for id in ids:
        touch(root / "images" / f"{id}.jpg")
        touch(root / "masks" / f"{id}.png")


def test_missing_splits_are_drawn_by_the_seed_of_the_data(tmp_path):
    write_folders(tmp_path, [str(number) for number in range(1000)])
    splits = [{s.id: s.split for s in read_samples(DataConfig(root=tmp_path, split_seed=seed))} for seed in (0, 0, 1)]
    for drawn in splits:
        for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
            deviation = (1000 * share * (1 - share)) ** 0.5
            assert abs(list(drawn.values()).count(split) - 1000 * share) < 4 * deviation
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("spoil", ["remove", "bare", "damage", "add", "clash"])
def test_no_sample_and_no_bad_file_moves_another_to_another_split(tmp_path, spoil):
    write_folders(tmp_path, [f"s{number}" for number in range(100)])
    config = DataConfig(root=tmp_path, on_bad="skip")
    before = {s.id: s.split for s in read_samples(config)}
    for number in range(0, 60, 3):
        mask = tmp_path / "masks" / f"s{number}.png"
        if spoil in ("remove", "bare"):
            mask.unlink()
        if spoil == "remove":
            (tmp_path / "images" / f"s{number}.jpg").unlink()
        if spoil == "damage":
            mask.write_bytes(b"no mask")
        if spoil == "add":
            write_folders(tmp_path, [f"new{number}"])
        if spoil == "clash":
            touch(tmp_path / "images" / f"s{number}.png")
    after = {s.id: s.split for s in read_samples(config)}
    assert len(before.keys() & after.keys()) >= 80
    assert all(after[id] == before[id] for id in before.keys() & after.keys())


def test_picked_images_are_not_scored_on(tmp_path):
    rows = [f"{number},i{number}.jpg,m{number}.png,{number % 2},{number // 4}" for number in range(80)]
    (tmp_path / "manifest.csv").write_text("id,image,reference,picked,group\n" + "\n".join(rows))
    samples = read_samples(DataConfig(root=tmp_path, val_fraction=0.2, test_fraction=0.2))
    scored = [sample for sample in samples if sample.split != "train"]
    assert scored and not any(sample.picked for sample in scored)
    assert sum(sample.picked for sample in samples) == 40 - len(scored), "they are left out with their groups"
    (tmp_path / "manifest.csv").write_text(
        "id,image,reference,picked\n" + "\n".join(r.rpartition(",")[0] for r in rows)
    )
    samples = read_samples(DataConfig(root=tmp_path, val_fraction=0.2, test_fraction=0.2))
    assert len(samples) == 80 and not any(sample.picked for sample in samples if sample.split != "train")


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("seed", range(12))
def test_small_data_has_an_image_in_every_split(tmp_path, count, seed):
    write_folders(tmp_path, [str(number) for number in range(count)])
    config = DataConfig(root=tmp_path, val_fraction=0.3, test_fraction=0.6, split_seed=seed)
    assert {s.split for s in read_samples(config)} == {"train", "val", "test"}


def test_fractions_leave_something_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="val_fraction \\+ test_fraction must be below 1"):
        DataConfig(root=tmp_path, val_fraction=0.5, test_fraction=0.5)


def test_a_split_that_the_data_brings_is_kept(tmp_path):
    rows = [f"t{n},train,i/t{n},m/t{n}" for n in range(20)] + [f"e{n},test,i/e{n},m/e{n}" for n in range(3)]
    (tmp_path / "manifest.csv").write_text("\n".join(["id,split,image,mask", *rows]))
    samples = read_samples(DataConfig(root=tmp_path, val_fraction=0.25))
    assert {s.id for s in samples if s.split == "test"} == {"e0", "e1", "e2"}
    assert {s.id for s in samples if s.split == "val"} == {"t10", "t11", "t18", "t19"}


def test_a_split_that_the_data_brings_stays_its_own_where_none_of_it_can_be_used(tmp_path):
    rows = [f"t{n},train,i/t{n},m/t{n}" for n in range(20)] + ["e0,test,i/e0,"]
    (tmp_path / "manifest.csv").write_text("\n".join(["id,split,image,mask", *rows]))
    samples = read_samples(DataConfig(root=tmp_path, on_bad="skip"))
    assert not [s for s in samples if s.split == "test"]  # and no training image is tested on in its place


def test_a_reference_may_be_of_an_image_that_was_picked(tmp_path):
    rows = "a,train,a.jpg,a.png,1\nb,val,b.jpg,b.png,0\nc,test,c.jpg,c.png,\n"
    (tmp_path / "manifest.csv").write_text(f"id,split,image,reference,picked\n{rows}")
    samples = read_samples(DataConfig(root=tmp_path))
    assert [sample.picked for sample in samples] == [True, False, False]
    write_manifest(tmp_path, samples)
    assert (tmp_path / "manifest.csv").read_text() == "id,split,image,reference,picked\n" + rows.replace(",0", ",")
    (tmp_path / "manifest.csv").write_text("id,split,image,reference,picked\na,train,a.jpg,a.png,yes\n")
    with pytest.raises(UserError, match="row 1: picked 'yes' must be 1, 0 or empty"):
        read_samples(DataConfig(root=tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,train,../a.jpg,m.png", "leaves the folder"),
        ("a,train,/etc/a.jpg,m.png", "leaves the folder"),
        ("a,train,a.jpg,x/../../m.png", "leaves the folder"),
        ("a,train,a.jpg,C:\\m.png", "leaves the folder"),
        ("../a,train,a.jpg,m.png", "id '../a'"),
        ("a,training,a.jpg,m.png", "split 'training'"),
        ("a,train,a.jpg,", "has neither a reference nor an annotation"),
        ("a,train,a.jpg,m.png\na,train,b.jpg,n.png", "id a is twice in train"),
        ("a,train,a.jpg,m.png\na,test,b.jpg,n.png", "id a is in two splits"),
        ("a,train,a.jpg,m.png\nb,test,a.jpg,n.png", "a.jpg: in the train split as a and in test as b"),
        ("a,train,a.jpg,m.png\nb,val,b.jpg,m.png", "m.png: in the train split as a and in val as b"),
    ],
)
def test_bad_manifest_rows(tmp_path, row, message):
    (tmp_path / "manifest.csv").write_text(f"id,split,image,mask\n{row}\n")
    with pytest.raises(UserError) as raised:
        read_samples(DataConfig(root=tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_samples(DataConfig(root=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no data in the layout manifest \| isic \| ph2 \| ham10000 \| folders"):
        read_samples(DataConfig(root=tmp_path))
    (tmp_path / "manifest.csv").write_text("id,image,split\na,a.jpg,train\n")
    with pytest.raises(UserError, match="lacks the column reference"):
        read_samples(DataConfig(root=tmp_path))
    for name in ("images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/a.png"):
        touch(tmp_path / name)
    with pytest.raises(UserError, match=r"b\.jpg: has no mask in .*masks \(and 1 more\)"):
        read_samples(DataConfig(root=tmp_path, layout="folders"))
    for name in ("masks/b.png", "masks/c.png", "masks/a_mask.png"):
        touch(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.png and a_mask\.png have the same id a"):
        read_samples(DataConfig(root=tmp_path, layout="folders"))


# --- clean and noisy --------------------------------------------------------------------------------------------------


def test_clean_noisy_val_and_test_are_disjoint_and_cover_everything(make_dataset):
    samples = read_samples(DataConfig(root=make_dataset(train=20)))
    clean, noisy = split_clean(samples, 6, seed=1)
    groups = [clean, noisy, [s for s in samples if s.split == "val"], [s for s in samples if s.split == "test"]]
    assert [len(group) for group in groups] == [6, 14, 2, 3]
    ids = [s.id for group in groups for s in group]
    assert len(ids) == len(set(ids)) == len(samples)
    assert {s.split for s in clean + noisy} == {"train"}


def test_clean_choice_depends_on_the_seed_not_the_order_and_grows_with_k(make_dataset):
    samples = read_samples(DataConfig(root=make_dataset(train=20)))
    clean, noisy = split_clean(samples, 6, seed=1)
    assert split_clean(samples[::-1], 6, seed=1) == (clean, noisy)
    assert split_clean(samples, 6, seed=2)[0] != clean
    assert set(clean) < set(split_clean(samples, 9, seed=1)[0])


def test_clean_count_bounds(make_dataset):
    samples = read_samples(DataConfig(root=make_dataset(train=8)))
    assert [len(part) for part in split_clean(samples, 0, seed=0)] == [0, 8]
    assert [len(part) for part in split_clean(samples, 7, seed=0)] == [7, 1]
    for count in (8, 100):
        with pytest.raises(UserError, match=rf"data\.clean_count {count}: .* 8 images .* at most 7"):
            split_clean(samples, count, seed=0)


# --- files ------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, pixels: np.ndarray) -> None:
    assert cv2.imwrite(str(path), pixels)


def palette_png(path: Path, indices: np.ndarray, palette: list[int]) -> None:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(palette)
    image.save(path)


@pytest.fixture
def dataset(make_dataset) -> tuple[Path, list[Sample]]:
    root = make_dataset(noisy=True)
    return root, read_samples(DataConfig(root=root))


def test_good_files_pass_in_every_binary_encoding(dataset):
    root, samples = dataset
    mask = cv2.imread(str(root / "masks/S000.png"), cv2.IMREAD_GRAYSCALE) // 255
    rewrite(root / "masks/S001.png", mask)
    palette_png(root / "masks/S002.png", mask, [0, 0, 0, 128, 0, 0])
    Image.fromarray(mask * 255).convert("1").save(root / "masks/S003.png")
    rewrite(root / "masks/S004.png", np.repeat(mask[..., None] * 255, 3, axis=2))
    rewrite(root / "masks/S005.png", np.zeros_like(mask))
    rewrite(root / "masks/S006.png", np.full_like(mask, 255))
    assert cv2.imwrite(str(root / "masks/S007.bmp"), mask * 255)
    (root / "masks/S007.bmp").rename(root / "masks/S007.png")  # what it is stands in the file
    assert inspect_files(samples, PLAIN, threads=2).problems == []


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def truncate_as_jpeg(path: Path, lost_bytes: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes()[:-lost_bytes])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("images/S001.png", lambda p: p.unlink(), "no such file"),
        ("masks/S001.png", lambda p: p.unlink(), "no such file"),
        ("images/S001.png", lambda p: p.write_bytes(b""), "is empty"),
        ("masks/S001.png", lambda p: p.write_bytes(b""), "is empty"),
        ("images/S001.png", lambda p: p.write_bytes(b"<html>404</html>"), "cannot be decoded"),
        ("images/S001.png", lambda p: truncate(p, 0.7), "cannot be decoded"),
        ("masks/S001.png", lambda p: truncate(p, 0.7), "cannot be decoded"),
        ("images/S001.png", lambda p: truncate_as_jpeg(p, 900), "truncated"),
        ("images/S001.png", lambda p: truncate_as_jpeg(p, 2), "truncated"),
        ("masks/S001.png", lambda p: rewrite(p, np.zeros((32, 31), np.uint8)), "31×32 and its image S001.png 32×32"),
        ("noisy/S001.png", lambda p: rewrite(p, np.zeros((31, 32), np.uint8)), "32×31 and its image S001.png 32×32"),
        ("masks/S001.png", lambda p: rewrite(p, np.eye(32, dtype=np.uint8) * 128), "not binary: it holds 0, 128"),
        ("noisy/S001.png", lambda p: rewrite(p, np.tile(np.arange(32, dtype=np.uint8), (32, 1))), "0, 1, 2, 3, 4, …"),
        ("masks/S001.png", lambda p: rewrite(p, np.diag([1] * 31 + [255]).astype(np.uint8)), "0, 1, 255"),
        ("masks/S001.png", lambda p: palette_png(p, np.eye(32, dtype=np.uint8), [255, 255, 255, 0, 0, 0]), "palette"),
    ],
)
def test_a_bad_file_is_named(dataset, name, damage, message):
    root, samples = dataset
    damage(root / name)
    [problem] = inspect_files(samples, PLAIN, threads=2).problems
    text = str(problem)
    assert text.startswith(str(root / name))
    assert message in text
    assert "\n" not in text


def test_the_first_bad_file_is_named_and_the_others_counted(dataset):
    root, _ = dataset
    for name in ("masks/S007.png", "images/S002.png", "masks/S005.png"):
        (root / name).unlink()
    with pytest.raises(UserError, match=r"images/S002\.png: no such file \(and 2 more\)$"):
        usable_samples(DataConfig(root=root), folder=root, check=True)


@pytest.mark.parametrize(("split", "mend"), [("train", "rows"), ("val", "data.val_fraction")])
def test_an_empty_split_is_refused(dataset, split, mend):
    _, samples = dataset
    with pytest.raises(UserError, match=rf"the {split} split is empty; .*{mend}"):
        check_splits([s for s in samples if s.split != split])
