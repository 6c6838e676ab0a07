"""`distseg audit`: what it finds of annotators whose errors are known, and that its folder survives kills."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_by_annotators import SHIFTS, SIZE, disc, logits, write_data

from distseg.cli.audit import main
from distseg.cli.process import run_command
from distseg.config.load import load_config
from distseg.data.decode import PLAIN
from distseg.data.sample import Problem
from distseg.distributed.runtime import stop_runtime
from distseg.inference.audit.drawn import drawn_in_training
from distseg.inference.audit.model import Judge, fit
from distseg.inference.audit.report import annotator_figures, annotators_table, ranked, table
from distseg.inference.audit.verdicts import Verdict, contour_shift, judge_masks
from distseg.testing.forked import run_script
from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
KEYS = ("data.image_size=32", "data.pipeline=torch")


def audit(*arguments: str | Path) -> int:
    code = run_command(lambda: main([str(argument) for argument in arguments]))
    stop_runtime()
    return code


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """What is for the user."""
    kept = ("audit.json", "report.html", "table.csv", "annotators.csv", "proposals", "queue")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] in kept
    }


def judged(folder: Path, images: int = 40) -> list[Verdict]:
    """Of discs by annotators of SHIFTS, the logits of a good network in place of a run's."""
    write_data(folder / "data", images, val=8)
    config = load_config(_config(folder), [])
    drawn, references = drawn_in_training(config, folder)
    places = folder / "images", folder / "calibration"
    for place, samples in zip(places, ([each.sample for each in drawn], references), strict=True):
        place.mkdir()
        for sample in samples:
            found = logits(int(sample.id[-3:]))
            if sample.id == "train001":
                found[1] = -8  # there is nothing
            np.save(place / f"{sample.id}.npy", found)
            cv2.imwrite(str(place / f"{sample.id}.png"), 255 * (found[1] > 0).astype(np.uint8))
    judge = Judge("one", drawn, places[0], places[0], places[1], references)
    model = fit([judge], PLAIN, 2)
    (folder / "proposals").mkdir()
    found = list(judge_masks([judge], model, folder / "proposals", PLAIN, 2))
    assert not [each for each in found if isinstance(each, Problem)]
    return [verdict for each in found if not isinstance(each, Problem) for verdict in each]


def _config(folder: Path) -> Path:
    file = folder / "written.yaml"
    file.write_text(f"{{name: made, data: {{root: {folder}/data, image_size: {SIZE}}}, train: {{steps: 1}}}}")
    return file


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Verdict], Path]:
    folder = tmp_path_factory.mktemp("judged")
    return judged(folder), folder


def test_annotators_errors_are_found(verdicts: tuple[list[Verdict], Path]) -> None:
    figures = annotator_figures(verdicts[0])
    assert list(figures) == sorted(SHIFTS)
    for name, shift in SHIFTS.items():
        found = figures[name]["shift"]
        assert abs(found["mean"] - shift) < 0.5, name  # pixels
        assert found["low"] <= found["mean"] <= found["high"]
        radius = 0.235 * SIZE
        assert figures[name]["relative_shift"]["mean"] == pytest.approx(shift / (radius * np.pi**0.5), abs=0.02)
    assert figures["generous"]["missed"]["mean"] == pytest.approx(1 / 39)  # of the images that show something
    assert figures["exact"]["missed"]["mean"] == 0
    assert max(figures, key=lambda name: figures[name]["expected_dice"]["mean"]) == "exact"
    assert figures["exact"]["masks"] == 40
    assert figures["exact"]["agreement"]["mean"] > figures["strict"]["agreement"]["mean"]


def test_the_expected_dice_is_near_the_true_one_and_ranks_masks(verdicts: tuple[list[Verdict], Path]) -> None:
    true = []
    for each in verdicts[0]:
        number = int(each.drawn.sample.id[-3:])
        mask, truth = cv2.imread(str(each.file), cv2.IMREAD_GRAYSCALE) > 0, disc(number) * (number != 1)
        marked = mask.sum() + truth.sum()
        true.append(2 * (mask & (truth > 0)).sum() / marked if marked else 1.0)
    expected = np.array([each.expected_dice for each in verdicts[0]])
    assert np.abs(expected - true).mean() < 0.06
    assert ranked(verdicts[0])[0].drawn.sample.id == "train000"
    assert ranked(verdicts[0])[0].missed
    assert np.corrcoef(expected, true)[0, 1] > 0.9


def test_proposals_are_nearer_to_the_truth_than_any_annotator(verdicts: tuple[list[Verdict], Path]) -> None:
    wrong = {"proposed": 0} | dict.fromkeys(SHIFTS, 0)
    for each in verdicts[0]:
        number = int(each.drawn.sample.id[-3:])
        truth = disc(number) * (number != 1) > 0
        wrong[each.annotator] += (cv2.imread(str(each.file), cv2.IMREAD_GRAYSCALE) > 0).__xor__(truth).sum()
        proposed = cv2.imread(str(verdicts[1] / f"proposals/{each.drawn.sample.id}.png"), cv2.IMREAD_UNCHANGED)
        assert proposed.shape == truth.shape and set(np.unique(proposed)) <= {0, 255}
        wrong["proposed"] += ((proposed > 0) ^ truth).sum() / len(SHIFTS)
    assert wrong["proposed"] < min(wrong["generous"], wrong["strict"]) / 3


def test_tables_hold_all_and_no_formula(verdicts: tuple[list[Verdict], Path], tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(table(ranked(verdicts[0])))
    rows = rows_of(tmp_path / "table.csv")
    assert len(rows) == 120
    assert [float(row["expected_dice"]) for row in rows] == sorted(float(row["expected_dice"]) for row in rows)
    assert {row["annotator"] for row in rows} == set(SHIFTS)
    (tmp_path / "annotators.csv").write_text(annotators_table(annotator_figures(verdicts[0])))
    assert [row["annotator"] for row in rows_of(tmp_path / "annotators.csv")] == sorted(SHIFTS)


@pytest.mark.parametrize("shift", [-3, -1, 0, 2, 4])
def test_the_shift_of_a_contour_is_that_of_its_radius(shift: int) -> None:
    truth = disc(3, side=200) > 0
    drawn = disc(3, shift, side=200) > 0
    assert contour_shift(drawn, truth) == pytest.approx(shift, abs=0.25)
    assert np.isnan(contour_shift(drawn, np.zeros_like(drawn)))
    assert np.isnan(contour_shift(np.ones_like(drawn), truth))


def test_a_squares_shift_is_exact_and_the_frame_is_no_contour() -> None:
    truth, drawn = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[:, :8], drawn[:, :11] = True, True
    assert contour_shift(drawn, truth) == 3
    assert contour_shift(truth, drawn) == -3


@pytest.fixture
def run(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    root = write_data(tmp_path / "data", 12, group="=<script>alert(1)</script>")
    return make_run(f"data.root={root}", *KEYS)


def test_a_folder_is_whole_and_a_second_start_changes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "audit"
    assert audit(run, "--to", to, "--queue", "3", "--shown", "4") == 0
    said = capsys.readouterr().out
    assert "36 masks" in said and str(to / "report.html") in said
    before = contents(to)
    assert len(rows_of(to / "table.csv")) == 36
    assert len(list((to / "proposals").glob("*.png"))) == 12
    tasks = json.loads((to / "queue/label-studio/annotations.json").read_text())
    worst = list(dict.fromkeys(row["id"] for row in rows_of(to / "table.csv")))[:3]
    assert [Path(task["data"]["image"]).stem for task in tasks] == worst
    assert all(not task["annotations"] and task["predictions"] for task in tasks)
    page = (to / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("data:image", "")
    assert all(cell["group"].startswith("'=") for cell in rows_of(to / "table.csv"))
    assert audit(run, "--to", to, "--queue", "3", "--shown", "4") == 0
    assert contents(to) == before
    assert audit(run, "--to", to, "--queue", "3", "--shown", "4", "--flips") == 0  # other settings: all anew
    assert contents(to) != before


def test_what_cannot_be_judged_is_named_and_the_rest_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, to = tmp_path / "data", tmp_path / "audit"
    (data / "images/train002.png").write_bytes(b"no image")
    (data / "annotations/exact/train003.png").write_bytes(b"")
    cv2.imwrite(str(data / "annotations/strict/train004.png"), np.zeros((9, 9), np.uint8))
    (data / "references/val012.png").write_bytes(b"")
    assert audit(run, "--to", to) == 1
    assert [row["id"] for row in rows_of(to / "failed.csv")] == ["train002", "train003", "train004"]
    assert len(rows_of(to / "table.csv")) == 27
    assert "train003.png" in capsys.readouterr().err
    assert "train004" in (to / "report.html").read_text()


def test_references_of_other_data_are_audited_where_there_are_no_annotations(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "masks").mkdir()
    for number in range(6):
        cv2.imwrite(str(other / f"images/{number}.png"), np.full((40, 60, 3), 30 * number, np.uint8))
        cv2.imwrite(str(other / f"masks/{number}.png"), np.zeros((40, 60), np.uint8))
    assert audit(run, "--to", tmp_path / "audit", "--data", other) == 0
    rows = rows_of(tmp_path / "audit/table.csv")
    assert len(rows) == 6
    assert all(row["true_dice"] == "" and row["area"] == "0" for row in rows)  # what is in doubt is not the truth
    proposed = cv2.imread(str(tmp_path / "audit/proposals/0.png"), cv2.IMREAD_UNCHANGED)
    assert proposed.shape == (40, 60)


def test_annotations_of_other_data_need_no_reference(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for folder in ("images", "annotations/anna", "annotations/ben"):
        (other / folder).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((40, 60, 3), 30 * number, np.uint8) if folder == "images" else np.zeros((40, 60), np.uint8)
            cv2.imwrite(str(other / folder / f"{number}.png"), pixels)
    cv2.imwrite(str(other / "annotations/ben/2.png"), np.full((40, 60), 100, np.uint8))
    assert audit(run, "--to", tmp_path / "audit", "--data", other) == 1
    assert [row["annotator"] for row in rows_of(tmp_path / "audit/annotators.csv")] == ["anna", "ben"]
    assert [row["id"] for row in rows_of(tmp_path / "audit/failed.csv")] == ["2"]  # 100 is neither 0 nor 1 nor 255
    assert "holds 100" in capsys.readouterr().err


def test_three_classes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 12, shifts={"a": 0.0, "b": 1.0})
    for path in (*(data / "annotations").rglob("*.png"), *(data / "references").glob("*.png")):
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) // 255
        mask[: SIZE // 2] *= 2
        cv2.imwrite(str(path), mask)
    classes = "data.classes={background: 0, lower: 1, upper: 2}"
    run = make_run(f"data.root={data}", classes, *KEYS)
    assert audit(run, "--to", tmp_path / "audit") == 0
    assert len(rows_of(tmp_path / "audit/table.csv")) == 24
    found = np.unique([cv2.imread(str(path), -1) for path in (tmp_path / "audit/proposals").glob("*.png")])
    assert set(found) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--folds", "1"], "at least 2"),
        (["--folds", "2", "--checkpoint", "best"], "networks of their own"),
        (["--queue", "-1"], "at least 0"),
        (["--parallel", "2"], "is for --folds"),
        (["--set", "train.steps=3"], "must be data.KEY=VALUE"),
    ],
)
def test_bad_arguments_are_named(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["runs/none", "--to", "somewhere", *words])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_other_peoples_folders_are_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("…")
    assert audit(run, "--to", tmp_path / "letters") == 2
    assert "holds other things than an audit" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(run: Path, tmp_path: Path) -> None:
    assert audit(run, "--to", tmp_path / "whole", "--queue", "3") == 0
    command = [sys.executable, "-m", "distseg.cli.audit", str(run), "--to", str(tmp_path / "killed"), "--queue", "3"]
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(rng.uniform(2, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, timeout=300).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(run: Path, tmp_path: Path) -> None:
    assert audit(run, "--to", tmp_path / "one", "--batch-size", "3") == 0
    words = ["launch/audit.py", str(run), "--to", str(tmp_path / "two"), "--batch-size", "3"]
    assert [done.returncode for done in run_script(words, ROOT, ENVIRONMENT, ranks=2)] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_folds_judge_what_they_have_not_learned_from_and_are_taken_up(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_data(tmp_path / "data", 16)
    run = make_run(f"data.root={root}", *KEYS, "method.name=noisy_only", "train.batch_size=4", "train.steps=2")
    to = tmp_path / "audit"
    assert audit(run, "--to", to, "--folds", "2") == 0
    assert len(rows_of(to / "table.csv")) == 48
    folds = sorted((to / "folds").glob("fold_*_of_2-*"))
    assert len(folds) == 2
    learned = {}
    for folder in folds:
        config = load_config(folder / "config.yaml")
        assert config.data.fold is not None
        judged_ids = {path.stem for path in (to / f"judges/fold_{config.data.fold.index}/images/masks").iterdir()}
        learned[config.data.fold.index] = judged_ids
    assert not learned[0] & learned[1] and len(learned[0] | learned[1]) == 16
    groups = [{row["group"] for row in rows_of(to / "table.csv") if row["id"] in ids} for ids in learned.values()]
    assert not groups[0] & groups[1]
    stamps = [(folder / "result.json").stat().st_mtime_ns for folder in folds]
    before = contents(to)
    assert audit(run, "--to", to, "--folds", "2") == 0
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folds] == stamps
    assert contents(to) == before
