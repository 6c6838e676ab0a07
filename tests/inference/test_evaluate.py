"""`distseg evaluate`: its figures against figures made otherwise, and what its page shows."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from PIL import Image

from distseg.cli.evaluate import main
from distseg.data.synthetic import write_dataset
from distseg.distributed.runtime import stop_runtime
from distseg.evaluation.calibration import BINS, calibration_bins, expected_calibration_error
from distseg.evaluation.intervals import grouped_interval
from distseg.evaluation.surfaces import surface_scores
from distseg.testing.forked import run_script
from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def evaluate(*arguments: str | Path) -> int:
    code = main([str(argument) for argument in arguments])
    stop_runtime()
    return code


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of two groups and none, their references, a test split; one reference has ignored pixels."""
    root = tmp_path_factory.mktemp("data") / "drawn"
    write_dataset(root, {"test": 8}, size=60, seed=3)
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    groups = ["<script>alert(1)</script>"] * 3 + ["B"] * 3 + ["", ""]
    lines = ["id,split,image,reference,group"]
    for row, group in zip(rows, groups, strict=True):
        lines.append(f"{row['id']},test,{row['image']},{row.get('reference') or row['mask']},{group}")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def dice_of(mask: np.ndarray, truth: np.ndarray) -> float:
    total = mask.sum() + truth.sum()
    return 1.0 if total == 0 else 2 * (mask & truth).sum() / total


def test_a_run_scores_as_its_masks_do_by_hand(make_run: Callable, data: Path, tmp_path: Path) -> None:
    run, to = make_run(f"data.root={data}", "tracking.mlflow=false"), tmp_path / "report"
    assert evaluate(run, "--to", to) == 0
    content = json.loads((to / "evaluation.json").read_text())
    assert content["images"] == 8 and content["groups"] == 4
    with (data / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected, right, confidence = [], [], []
    for row in rows:
        mask = np.asarray(Image.open(to / "predictions" / "masks" / f"{row['id']}.png")) > 0
        truth = np.asarray(Image.open(data / row["reference"])) > 0
        expected.append(dice_of(mask, truth))
        probability = np.asarray(Image.open(to / "predictions" / "probabilities" / f"{row['id']}.png")) / 65535
        right.append((mask == truth).ravel())
        confidence.append(np.maximum(probability, 1 - probability).ravel())
    assert 0.02 < np.mean(expected) < 0.98
    assert content["own"]["dice"]["mean"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert content["own"]["dice"]["low"] <= np.mean(expected) <= content["own"]["dice"]["high"]
    group = content["by_group"]["B"]
    assert group == {"images": 3, "dice": pytest.approx(np.mean(expected[3:6]))}
    place = np.ceil(np.concatenate(confidence) * 15).astype(int)
    hits = np.concatenate(right)
    values = np.concatenate(confidence)
    ece = sum(abs(hits[place == bin].mean() - values[place == bin].mean()) * (place == bin).mean()
              for bin in np.unique(place))  # fmt: skip
    assert content["calibration"]["ece"] == pytest.approx(ece, abs=1e-4)
    assert set(content["network"]) == {"dice", "jaccard", "sensitivity", "specificity", "accuracy"}

    page = (to / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert page.count("data:image/png;base64,") == 3 and "worst cases" in page and "median cases" in page
    with (to / "scores.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in table] == pytest.approx(expected)

    masks = tmp_path / "masks"
    (to / "predictions" / "masks").rename(masks)
    again = tmp_path / "again"
    assert evaluate(masks, "--config", run / "config.yaml", "--to", again, "--no-surfaces") == 0
    other = json.loads((again / "evaluation.json").read_text())
    assert other["own"]["dice"] == content["own"]["dice"] and "network" not in other and "calibration" not in other


def test_the_means_and_the_page_are_beside_the_run_in_mlflow(
    make_run: Callable, data: Path, empty_store: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'store.db')}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    tracked = client.create_run(experiment).info.run_id
    run = make_run(f"data.root={data}", f"tracking.uri={uri}")
    (run / "mlflow_run_id").write_text(tracked + "\n")
    assert evaluate(run, "--to", tmp_path / "report", "--no-surfaces") == 0
    content = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    found = client.get_run(tracked).data.metrics
    assert found["evaluate/drawn/test/own/dice"] == pytest.approx(content["own"]["dice"]["mean"])
    assert found["evaluate/drawn/test/ece"] == pytest.approx(content["calibration"]["ece"])
    names = {file.path for file in client.list_artifacts(tracked, "evaluation")}
    assert names == {"evaluation/report.html", "evaluation/evaluation.json", "evaluation/scores.csv"}


def test_what_cannot_be_scored_is_listed(
    make_run: Callable, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, masks = make_run(f"data.root={data}", "tracking.mlflow=false"), tmp_path / "masks"
    masks.mkdir()
    with (data / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[:6]:
        (masks / f"{row['id']}.png").write_bytes((data / row["reference"]).read_bytes())
    Image.new("L", (10, 12)).save(masks / f"{rows[5]['id']}.png")
    Image.fromarray(np.arange(3600, dtype=np.uint8).reshape(60, 60) % 3).save(masks / f"{rows[4]['id']}.png")
    to = tmp_path / "report"
    assert evaluate(masks, "--config", run / "config.yaml", "--to", to) == 1
    content = json.loads((to / "evaluation.json").read_text())
    assert content["images"] == 4 and content["own"]["dice"]["low"] == 1.0
    assert content["classes"]["lesion"]["hausdorff95"]["mean"] == 0
    reasons = {each["id"]: each["reason"] for each in content["failed"]}
    assert reasons.keys() == {rows[place]["id"] for place in (4, 5, 6, 7)}
    assert "different sizes, 10×12 and 60×60" in reasons[rows[5]["id"]]
    assert "not binary: it holds 0, 1, 2" in reasons[rows[4]["id"]]
    for arguments, said in (
        ([masks, "--to", to], "say with --config FILE"),
        ([masks, "--config", run / "config.yaml", "--to", to, "--split", "val"], "split val has no image"),
        ([run, "--to", to, "--split", "val"], "split val has no image"),
        ([run, "--to", to, "data.root=/none"], "data.root /none: no such folder"),
    ):
        capsys.readouterr()
        assert evaluate(*arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(run, "--to", to, "train.steps=3")


def test_overrides_and_two_ranks_give_the_figures_of_one(make_run: Callable, data: Path, tmp_path: Path) -> None:
    """The run's own root is nowhere; 255 is of a class of its own, and the reference's values are others."""
    run = make_run("tracking.mlflow=false")
    overrides = [f"data.root={data}", "data.classes={background: [0], spot: [255, 1]}"]
    assert evaluate(run, "--to", tmp_path / "one", "--no-surfaces", *overrides) == 0
    words = ["launch/evaluate.py", str(run), "--to", str(tmp_path / "two"), "--no-surfaces", *overrides]
    ranks = run_script(words, ROOT, ENVIRONMENT, ranks=2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    assert sorted("8 images" in rank.stdout for rank in ranks) == [False, True]
    one, two = ((tmp_path / name / "evaluation.json").read_text() for name in ("one", "two"))
    assert one == two and list(json.loads(one)["classes"]) == ["spot"]


def test_distances_of_outlines_against_simpleitk_and_by_hand() -> None:
    truth = np.zeros((40, 50), bool)
    truth[10:20, 10:30] = True
    moved = np.roll(truth, 3, axis=1)
    found = surface_scores(moved, truth, 1.0)
    assert found.hausdorff95 == pytest.approx(3, abs=0.5)
    assert surface_scores(truth, truth, 0.5) == (0.0, 1.0)
    assert surface_scores(moved, truth, 3.5).surface_dice == 1.0
    assert 0.4 < found.surface_dice < 0.8  # the long sides lie upon each other, the short ones are 3 apart
    nothing = np.zeros_like(truth)
    assert surface_scores(nothing, nothing, 1.0) == (0.0, 1.0)
    assert surface_scores(nothing, truth, 1.0) == (pytest.approx(np.hypot(40, 50)), 0.0)
    filter = SimpleITK.HausdorffDistanceImageFilter()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        blob = np.zeros((60, 60), bool)
        blob[10:40, 15:45] = True
        other = np.roll(blob, rng.integers(-8, 9, 2), axis=(0, 1))
        filter.Execute(*(SimpleITK.GetImageFromArray(each.astype(np.uint8)) for each in (blob, other)))
        assert surface_scores(other, blob, 1.0).hausdorff95 <= filter.GetHausdorffDistance() + 1e-9


def test_calibration_of_what_is_known() -> None:
    confidence = np.array([0.5, 0.6, 0.6, 0.6, 1.0])
    right = np.array([True, True, False, False, True])
    bins = calibration_bins(confidence, right)
    assert bins[:, 0].sum() == 5 and len(bins) == BINS
    assert expected_calibration_error(bins) == pytest.approx((abs(1 - 0.5) + abs(1 - 1.8) + 0) / 5)
    assert np.isnan(expected_calibration_error(np.zeros((BINS, 3))))


def test_an_interval_over_groups_is_wider_where_groups_differ() -> None:
    scores = np.repeat([0.2, 0.5, 0.8], 20)
    mean, low, high = grouped_interval(scores, [str(n) for n in range(60)])
    _, low_grouped, high_grouped = grouped_interval(scores, [str(n // 20) for n in range(60)])
    assert mean == pytest.approx(0.5)
    assert high_grouped - low_grouped > 2 * (high - low)
    alone = grouped_interval(np.array([0.4]), ["a"])
    assert alone == pytest.approx((0.4, 0.4, 0.4))
