"""Bad files: each is found and named, by `prepare` and by what the trainer asks, and none of them hangs."""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_files import write_bad_data
from PIL import Image

from distseg.data.cache import _open, write_cache
from distseg.data.checks import inspect_files, usable_samples
from distseg.data.config import DataConfig
from distseg.data.decode import Decoding
from distseg.data.geometry import Frame
from distseg.data.reader import PixelReader
from distseg.data.sample import Sample
from distseg.data.survey import read_samples
from distseg.errors import BadFileError, UserError
from distseg.run_folder import RunFolder
from distseg.testing.forked import run_script
from distseg.text import for_csv, for_terminal
from distseg.training.splits import prepare_splits

ROOT = Path(__file__).parents[2]
CONFIG = "name: x\ndata: {image_size: 32, clean_count: 1}\nmodel: {depth: 2}\ntrain: {steps: 1}\n"


@pytest.fixture
def bad_data(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return tmp_path / "data", write_bad_data(tmp_path / "data")


def prepare(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    config = folder / "x.yaml"
    config.write_text(CONFIG)
    [done] = run_script(["launch/prepare.py", "--config", str(config), *arguments], ROOT, os.environ)
    return done


def test_prepare_finds_and_names_every_kind_of_bad_file(bad_data, tmp_path):
    root, expected = bad_data
    done = prepare(tmp_path, f"data.root={root}", "--report", str(tmp_path / "report"), "--cache", str(tmp_path / "c"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {root}: ") and "data.on_bad=skip" in done.stderr
    assert not (tmp_path / "c").exists()

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    reasons: dict[str, list[str]] = {}
    for problem in report["problems"]:
        reasons.setdefault(problem["id"], []).append(f"{problem['file']}: {problem['reason']}")
    assert len(expected) >= 50
    assert reasons.keys() == expected.keys()
    for id, said in expected.items():
        assert any(said in reason for reason in reasons[id]), (id, said, reasons[id])
        assert all("\n" not in reason and " at 0x" not in reason for reason in reasons[id])
        if id.startswith(("image-", "mask-")):
            kind = id.split("-")[0]
            assert all(reason.startswith(str(root / f"{kind}s" / f"{id}.png")) for reason in reasons[id])
    assert report["good"] == {"train": 5, "val": 2, "test": 2}

    text = (tmp_path / "report" / "report.txt").read_text()
    with (tmp_path / "report" / "report.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: for_csv(said) for key, said in problem.items()} for problem in report["problems"]]
    assert not any(row["id"].startswith(("=", "+", "-", "@")) for row in table)
    assert all(for_terminal(f"{each['file']}: {each['reason']}") in text for each in report["problems"])


def test_bad_files_are_refused_or_left_out_by_name(bad_data, tmp_path, caplog):
    root, expected = bad_data
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"and \d\d more") as raised:
        usable_samples(DataConfig(clean_count=1, root=root), run, check=True)
    assert "\n" not in str(raised.value) and not run.exists()

    skipping = DataConfig(clean_count=1, root=root, on_bad="skip")
    samples = usable_samples(skipping, run, check=True)
    assert [sample.id for sample in samples] == [f"good{number}" for number in range(9)]
    with (run / "left_out.csv").open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == set(map(for_csv, expected))
    said, shared = caplog.messages
    assert said.startswith(f"left out {len(expected)} samples") and "left_out.csv" in said
    assert shared.startswith("data: 9 images share their mask with another image")

    # A rank that does not check takes the main rank's word: it must not look into the files again.
    for path in (root / "images").glob("good*"):
        path.write_bytes(b"")
    assert usable_samples(skipping, run, check=False) == samples
    (run / "config.yaml").touch()  # the run has begun
    with pytest.raises(
        UserError, match=r"other files are bad now .*: .*good0\.png: the file is empty.* \(and 8 more\)"
    ):
        usable_samples(skipping, run, check=True)


def test_crops_that_would_show_whole_images_in_a_corner_are_refused(drawn_data, tmp_path):
    config = DataConfig(root=drawn_data, image_size=32, shape="crop", scale=0.5)
    message = (
        r"data\.scale 0\.5: the largest image, 48×48, is then 24×24, and crops are 32×32; .*data\.shape=letterbox$"
    )
    with pytest.raises(UserError, match=message):
        usable_samples(config, tmp_path, check=True)
    assert usable_samples(config.model_copy(update={"scale": 0.7}), tmp_path, check=True)


def test_links_out_of_the_root_can_be_allowed(bad_data, tmp_path):
    root, _ = bad_data
    allowed = usable_samples(
        DataConfig(clean_count=1, root=root, on_bad="skip", follow_links=True), tmp_path / "run", check=True
    )
    assert "image-link-out-of-root" in {sample.id for sample in allowed}
    (tmp_path / "linked").symlink_to(root)  # the root itself may be a link
    through = usable_samples(
        DataConfig(clean_count=1, root=tmp_path / "linked", on_bad="skip"), tmp_path / "run2", check=True
    )
    assert [sample.id for sample in through] == [f"good{number}" for number in range(9)]


def test_leaving_out_must_leave_every_split_something(bad_data, tmp_path):
    root, _ = bad_data
    for number in (2, 6):
        (root / "images" / f"good{number}.png").unlink()
    with pytest.raises(UserError, match="the val split is empty"):
        usable_samples(DataConfig(clean_count=1, root=root, on_bad="skip"), tmp_path / "run", check=True)


# --- what masks show --------------------------------------------------------------------------------------------------


def write_masks(root: Path, change: Callable[[np.ndarray, str], np.ndarray], count: int = 12) -> DataConfig:
    """Discs, and of each `change`'s mask; splits 6, 3, 3."""
    rows = ["id,split,image,mask"]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        split = ("train", "train", "val", "test")[number % 4]
        row, column = np.mgrid[:32, :32]
        mask = ((row - 15) ** 2 + (column - 10 - number) ** 2 < 40).astype(np.uint8)
        ground = np.random.default_rng(number).integers(120, 255, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(ground - 100 * mask[..., None]).save(root / f"images/s{number}.png")
        Image.fromarray(change(mask * 255, split)).save(root / f"masks/s{number}.png")
        rows.append(f"s{number},{split},images/s{number}.png,masks/s{number}.png")
    (root / "manifest.csv").write_text("\n".join(rows))
    return DataConfig(clean_count=1, root=root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mask, split: mask * 0, "all 6 masks of the train split are empty: they mark no lesion"),
        (lambda mask, split: mask * (split != "test"), "all 3 masks of the test split are empty"),
        (lambda mask, split: mask * 0 + 255, "all 6 masks of the train split are full: they mark no background"),
    ],
)
def test_a_split_whose_masks_show_nothing_is_refused(tmp_path, change, said):
    config = write_masks(tmp_path / "data", change)
    for on_bad in ("refuse", "skip"):
        with pytest.raises(UserError, match=said) as raised:
            usable_samples(config.model_copy(update={"on_bad": on_bad}), tmp_path / on_bad, check=True)
        assert "\n" not in str(raised.value)
    done = prepare(tmp_path, f"data.root={config.root}", "--cache", str(tmp_path / "cache"))
    assert (done.returncode, (tmp_path / "cache").exists()) == (2, False) and said in done.stderr


def test_masks_that_seem_to_be_inverted_are_warned_of(tmp_path, caplog):
    config = write_masks(tmp_path / "inverted", lambda mask, split: 255 - mask)
    assert len(usable_samples(config, tmp_path / "run", check=True)) == 12
    [said] = caplog.messages
    assert "in 12 of 12 masks lesion covers most of the frame's border" in said and "invert the masks" in said
    caplog.clear()
    empty_ones = iter(range(12))
    config = write_masks(tmp_path / "some", lambda mask, split: mask * (next(empty_ones) % 5 > 0))
    assert len(usable_samples(config, tmp_path / "run", check=True)) == 12  # skin without a lesion is data too
    assert caplog.messages == []


# --- orientation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn_as", ["displayed", "stored"])
def test_a_mask_of_the_other_orientation_is_refused_with_a_mend_that_helps(tmp_path, drawn_as):
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    shown.rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif)
    mask = np.zeros((30, 40) if drawn_as == "displayed" else (40, 30), np.uint8)
    mask[5:9, 5:20] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    sample = Sample("a", "train", tmp_path / "a.jpg", tmp_path / "a.png")
    right, wrong = ("apply", "ignore") if drawn_as == "displayed" else ("ignore", "apply")
    assert inspect_files([sample], Decoding(right), 1).problems == []
    [problem] = inspect_files([sample], Decoding(wrong), 1).problems
    assert f"set data.orientation={right}" in problem.reason


def test_a_mask_of_another_shape_is_not_to_be_resampled(tmp_path):
    for name, size in (("image", (40, 60)), ("same", (20, 30)), ("other", (30, 60))):
        Image.fromarray(np.tri(*size, dtype=np.uint8) * 255).save(tmp_path / f"{name}.png")
    for name, said in (("same", "resample the mask"), ("other", "is it another image's mask?")):
        sample = Sample("a", "train", tmp_path / "image.png", tmp_path / f"{name}.png")
        [problem] = inspect_files([sample], Decoding(), 1).problems
        assert said in problem.reason


# --- a run's files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "reference"])
def test_a_file_that_is_replaced_in_mid_run_is_named(tmp_path, kind):
    config = write_masks(tmp_path / "data", lambda mask, split: mask)
    sample = usable_samples(config, tmp_path / "run", check=True)[0]
    path, other = sample.files[kind], sample.files[kind].with_name("s4.png")
    reader = PixelReader(Frame(16))
    read = {"image": reader.image, "reference": reader.mask}[kind]
    before = read(path)
    np.testing.assert_array_equal(read(path), before)
    path.write_bytes(other.read_bytes() + b"\0")  # a sound file of another content
    with pytest.raises(BadFileError, match=r"s0\.png: has changed since this run first read it"):
        read(path)


def training_images(config: DataConfig, folder: Path) -> list[Sample]:
    """Of a study with 3 clean ones."""
    splits = prepare_splits(config.model_copy(update={"clean_count": 3}), 0, RunFolder(folder), check=True)
    return [*splits.clean, *splits.noisy]


def write_dataset(root: Path) -> DataConfig:
    return write_masks(root, lambda mask, split: mask)


def grow(root: Path) -> str:
    with (root / "manifest.csv").open("a") as file:
        file.write("\nnew,train,images/new.png,masks/s0.png")
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(root / "images/new.png")
    return "new is new"


def shrink(root: Path) -> str:
    lines = (root / "manifest.csv").read_text().splitlines()
    (root / "manifest.csv").write_text("\n".join([*lines[:1], *lines[2:]]))
    return "s0 is gone"


def repaint(root: Path) -> str:
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(root / "masks/s5.png")
    return "the reference of s5 has changed"


def move_to_test(root: Path) -> str:
    text = (root / "manifest.csv").read_text()
    (root / "manifest.csv").write_text(text.replace("s1,train", "s1,test"))
    return "s1 was in train and is in test"


def pick(root: Path) -> str:
    header, *rows = (root / "manifest.csv").read_text().splitlines()
    marked = [row + (",1" if row.startswith("s1,") else ",") for row in rows]
    (root / "manifest.csv").write_text("\n".join([f"{header},picked", *marked]))
    return "s1 was not picked and is now"


@pytest.mark.parametrize("change", [grow, shrink, repaint, move_to_test, pick])
@pytest.mark.parametrize("cached", [False, True])
def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, change, cached):
    config, run = write_dataset(tmp_path / "data"), tmp_path / "run"

    def usable(folder: Path) -> list[Sample]:
        if not cached:
            return training_images(config, folder)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        write_cache(read_samples(config), [], config, tmp_path / "cache", threads=1)
        _open.cache_clear()
        return training_images(config.model_copy(update={"cache": tmp_path / "cache"}), folder)

    before = usable(run)
    assert usable(run) == before
    (run / "config.yaml").touch()  # the run has begun
    assert usable(run) == before
    said = change(config.root)
    with pytest.raises(UserError, match=f"the data is not what this run began with: {said}.*; put it back") as raised:
        usable(run)
    assert "\n" not in str(raised.value)
    assert usable(tmp_path / "other")  # another run may
    (run / "config.yaml").unlink()
    assert usable(run)  # and so may one that has not taken a step


def test_a_run_goes_on_without_what_it_left_out_even_where_the_data_has_moved(tmp_path, caplog):
    config, run = write_dataset(tmp_path / "data").model_copy(update={"on_bad": "skip"}), tmp_path / "run"
    bad = config.root / "images/s4.png"
    sound = bad.read_bytes()
    bad.write_text("no image")
    before = usable_samples(config, run, check=True)
    assert "s4" not in {sample.id for sample in before} and len(before) == 11
    assert caplog.messages[0].startswith("left out 1 sample, ")
    (run / "config.yaml").touch()  # the run has begun
    assert usable_samples(config, run, check=True) == before
    moved = config.model_copy(update={"root": config.root.rename(tmp_path / "elsewhere")})
    after = usable_samples(moved, run, check=True)
    assert [sample.id for sample in after] == [sample.id for sample in before]
    assert str(moved.root / "images/s4.png") in (run / "left_out.csv").read_text()

    (moved.root / "images/s4.png").write_bytes(sound)
    with pytest.raises(UserError, match=r"images/s4\.png is no longer bad; put the data back as it was, or choose an"):
        usable_samples(moved, run, check=True)
    (run / "left_out.csv").write_text("sample\ns4\n")
    with pytest.raises(UserError, match=r"left_out\.csv: is damaged"):
        usable_samples(moved, run, check=True)


def test_a_run_goes_on_where_its_data_has_moved(tmp_path):
    config, run = write_dataset(tmp_path / "data"), tmp_path / "run"
    before = training_images(config, run)
    (run / "config.yaml").touch()
    moved = config.model_copy(update={"root": config.root.rename(tmp_path / "elsewhere")})
    assert [sample.id for sample in training_images(moved, run)] == [sample.id for sample in before]
    for damage in (b"\xff\xfe", b"id,split\ns0,train\n"):
        (run / "data.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"data\.json: "):
            training_images(moved, run)
