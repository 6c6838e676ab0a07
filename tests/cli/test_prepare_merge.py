"""prepare ROOT --merge: masks that were drawn again become references, and nothing is lost."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from distseg.cli.prepare import main
from distseg.cli.process import run_command
from distseg.data.annotators import drawn_masks
from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN, read_mask
from distseg.data.formats.convert import export_proposals
from distseg.data.splits import split_clean
from distseg.data.survey import survey


def prepare(*arguments: str | Path) -> int:
    return run_command(lambda: main([str(argument) for argument in arguments]))


def png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)
    return path


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((20, 30), np.uint8)
    mask[3 : 8 + number, 5:20] = 255
    return mask


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight training images with cheap masks, two of them with a reference, and a table of a spreadsheet's kind."""
    root = tmp_path / "data"
    rows = [["ID", "split", "image", "mask", "annotation:anna", "group", "remark"]]
    for number in range(8):
        name = f"im{number}"
        png(root / f"images/{name}.png", np.full((20, 30, 3), 20 * number, np.uint8))
        png(root / f"anna/{name}.png", mask_of(0))
        reference = f"expert/{name}.png" if number < 2 else ""
        if reference:
            png(root / reference, mask_of(2))
        rows.append([name, "train", f"images/{name}.png", reference, f"anna/{name}.png", "", 'said "no"; why?'])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows(rows)
    return root


def drawn_again(data: Path, to: Path, numbers: list[int], format: str, by: str = "eva") -> Path:
    """What a tool exports once the queue's images `numbers` have been annotated anew, each with its own mask."""
    samples = [each for each in survey(DataConfig(root=data))[0] if int(each.id[2:]) in numbers]
    proposals = [png(to.parent / f"proposals/{each.id}.png", mask_of(int(each.id[2:]))) for each in samples]
    export_proposals(samples, proposals, ("background", "lesion"), format, to, PLAIN)
    if format == "label-studio":
        file = to / "annotations.json"
        tasks = json.loads(file.read_text())
        for task in tasks:  # the annotator submits the prediction as it is
            [prediction] = task.pop("predictions")
            assert task["annotations"] == []
            task["annotations"] = [{"id": 1, "completed_by": {"email": by}, "result": prediction["result"]}]
        file.write_text(json.dumps(tasks))
    return to


def streams(data: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The masks that the clean and the noisy stream learn from, by id."""
    samples, problems = survey(DataConfig(root=data, val_fraction=0, test_fraction=0))
    assert not problems
    clean, noisy = split_clean(samples, None, 0)
    return {sample.id: sample.truth for sample in clean}, {sample.id: drawn_masks(sample)[0].mask for sample in noisy}


@pytest.mark.parametrize("format", ["label-studio", "cvat"])
def test_masks_that_were_drawn_again_are_learned_from(
    data: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert len(streams(data)[0]) == 2
    export = drawn_again(data, tmp_path / "queue", [1, 4, 6], format)
    assert prepare(data, "--merge", f"{format}={export}") == 0
    assert "2 images have a reference now, 1 another one, 0 had it already" in capsys.readouterr().out
    clean, noisy = streams(data)
    assert set(clean) == {"im0", "im1"}, "the other two were picked, and say nothing of the rest"
    assert list(noisy) == ["im2", "im3", "im4", "im5", "im6", "im7"]
    for number in (1, 4, 6):
        assert (255 * read_mask((clean | noisy)[f"im{number}"]) == mask_of(number)).all()
    assert all((255 * read_mask(noisy[f"im{number}"]) == mask_of(0)).all() for number in (2, 3, 5, 7))
    # Nothing is lost: every file, the table as it was, its other columns, and the reference that was replaced.
    manifest = data / "manifest.csv"
    assert (data / "manifest.1.csv").read_bytes() == before.pop(manifest)
    assert all(path.read_bytes() == content for path, content in before.items())
    with manifest.open(newline="") as file:
        rows = {row["ID"]: row for row in csv.DictReader(file, delimiter=";")}
    assert all(row["remark"] == 'said "no"; why?' and row["annotation:anna"] for row in rows.values())
    assert rows["im1"]["annotation:former"] == "expert/im1.png"
    assert {id for id, row in rows.items() if row["picked"] == "1"} == {"im4", "im6"}, "im1 had been drawn before"
    assert rows["im4"]["annotation:former"] == rows["im0"]["annotation:former"] == ""

    again = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert prepare(data, "--merge", f"{format}={export}") == 0
    assert "0 images have a reference now, 0 another one, 3 had it already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == again


def test_only_images_that_are_a_random_draw_are_not_marked_as_picked(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an audit calls worst is of hard images: annotators' errors are not measured on them."""
    for at_random in (True, False):
        export = drawn_again(data, tmp_path / f"queue{at_random}", [3, 4] if at_random else [5, 6], "cvat")
        assert prepare(data, "--merge", f"cvat={export}", *(["--at-random"] if at_random else [])) == 0
        assert ("marked as picked" in capsys.readouterr().out) != at_random
        clean, noisy = streams(data)
        assert set(clean) == {"im0", "im1", "im3", "im4"} and {"im5", "im6"} <= noisy.keys()


def test_a_second_opinion_takes_another_name(data: Path, tmp_path: Path) -> None:
    export = drawn_again(data, tmp_path / "queue", [4], "cvat")
    assert prepare(data, "--merge", f"cvat={export}") == 0
    samples = [each for each in survey(DataConfig(root=data))[0] if each.id == "im4"]
    other = png(tmp_path / "two/im4.png", mask_of(9))
    for count in (1, 2):
        export_proposals(samples, [other], ("background", "lesion"), "cvat", tmp_path / f"two/queue{count}", PLAIN)
        assert prepare(data, "--merge", f"cvat={tmp_path / f'two/queue{count}'}") == 0
        other = png(tmp_path / "two/im4.png", mask_of(7))
    with (data / "manifest.csv").open(newline="") as file:
        [row] = [row for row in csv.DictReader(file, delimiter=";") if row["ID"] == "im4"]
    assert row["mask"] == "references/im4.3.png"
    assert row["annotation:former"] == "references/im4.png"
    assert row["annotation:former-2"] == "references/im4.2.png"
    assert (data / "manifest.3.csv").exists()


def test_folders_without_a_table_get_one(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(6):
        png(data / f"images/im{number}.png", np.full((20, 30, 3), 20 * number, np.uint8))
        png(data / f"annotations/im{number}.png", mask_of(0))
        if number < 2:
            png(data / f"references/im{number}.png", mask_of(1))
    before = streams(data)
    for number, more in ((5, []), (4, ["--at-random"])):
        export = drawn_again(data, tmp_path / f"queue{number}", [number], "label-studio")
        assert prepare(data, "--merge", f"label-studio={export}", *more) == 0
    clean, noisy = streams(data)
    assert clean.keys() - before[0].keys() == {"im4"} and noisy.keys() == before[1].keys() - {"im4"}
    assert noisy["im5"].parent.name == "references" and noisy["im3"] == before[1]["im3"]


def test_a_row_an_annotation_stays_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    rows = ["id,image,annotation,annotator,reference"]
    for number in range(3):
        png(data / f"images/im{number}.png", np.full((20, 30, 3), 20 * number, np.uint8))
        for who in ("anna", "ben"):
            png(data / f"{who}/im{number}.png", mask_of(0))
            rows.append(f"im{number},images/im{number}.png,{who}/im{number}.png,{who},expert.png" if number == 2 else
                        f"im{number},images/im{number}.png,{who}/im{number}.png,{who},")  # fmt: skip
    png(data / "expert.png", mask_of(1))
    (data / "manifest.csv").write_text("\n".join(rows))
    export = drawn_again(data, tmp_path / "queue", [0, 2], "cvat")
    assert prepare(data, "--merge", f"cvat={export}") == 0
    samples, problems = survey(DataConfig(root=data, val_fraction=0, test_fraction=0))
    assert not problems
    assert [sorted(each.annotator for each in sample.annotations) for sample in samples] == [
        ["anna", "ben"], ["anna", "ben"], ["anna", "ben", "former"],
    ]  # fmt: skip
    assert [sample.reference and sample.reference.name for sample in samples] == ["im0.png", None, "im2.png"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data, queue: shutil.rmtree(data / "anna"), None),
        (lambda data, queue: (data / "images/im4.png").write_bytes(b""), "im4.png"),
        (lambda data, queue: png(data / "images/im4.png", np.zeros((9, 9, 3), np.uint8)), "is it of another data set"),
        (lambda data, queue: _renamed(data), "not in the data"),
        (lambda data, queue: (queue / "labelmap.txt").write_text("mole:128,0,0::\n"), "the class mole"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_changes(
    data: Path, tmp_path: Path, spoil, says: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    export = drawn_again(data, tmp_path / "queue.zip", [4, 6], "cvat")
    shutil.unpack_archive(export, tmp_path / "queue")
    spoil(data, tmp_path / "queue")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    code = prepare(data, "--merge", f"cvat={tmp_path / 'queue'}")
    if says is None:  # files that are not needed may be gone
        assert code == 0
        return
    assert code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def _renamed(data: Path) -> None:
    table = data / "manifest.csv"
    table.write_text(table.read_text().replace("im6;train", "other;train"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--merge", "cvat=x.zip"], "the one data set"),
        (["a", "b", "--merge", "cvat=x.zip"], "the one data set"),
        (["a", "--merge", "x.zip"], "must be FORMAT=PATH"),
        (["a", "--merge", "cvat=x.zip", "--to", "y"], "changes the data where it is"),
        (["a", "--merge", "cvat=x.zip", "data.threads=2"], "keys need --config"),
        (["a", "--merge", "cvat=x.zip", "--export", "coco", "--to", "b"], "two commands"),
    ],
)
def test_bad_arguments_are_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_missing_root_or_file_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path / "none", "--merge", "cvat=x.zip") == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert prepare(data, "--merge", f"cvat={tmp_path}/x.zip") == 2
    assert "x.zip" in capsys.readouterr().err
