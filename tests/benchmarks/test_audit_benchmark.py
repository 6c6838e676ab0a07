import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_figures_are_those_of_the_definitions() -> None:
    from audit import figures_of, ranks

    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    rng = np.random.default_rng(0)
    true, noise = rng.random(200), rng.normal(0, 0.2, 200)
    order = rng.permutation(200)
    found = figures_of(true + noise, true, order)
    bad = true < 0.8
    pairs = (true + noise)[bad][:, None] < (true + noise)[~bad][None]
    assert found["auroc"] == pytest.approx(pairs.mean())
    assert 0.3 < found["precision"] < 1
    assert figures_of(true, true, order) == pytest.approx(
        {"spearman": 1, "auroc": 1, "precision": 1, "true_dice_of_worst": np.sort(true)[:20].mean()}
    )
    assert figures_of(np.ones(200), true, order)["spearman"] == 0
    assert figures_of(np.ones(200), true, order)["auroc"] == pytest.approx(0.5)


@pytest.mark.slow
def test_ranking_and_relabelling_run_and_are_taken_up(drawn_data: Path, tmp_path: Path) -> None:
    keys = (
        "train.steps=4",
        "train.batch_size=2",
        "train.clean_batch_size=2",
        "data.clean_count=4",
        "data.image_size=16",
    )
    common = [str(tmp_path / "work"), "--isic", str(drawn_data), "--only", "isic_polygon", "--seeds", "0"]
    common += ["--results", str(tmp_path / "results"), *(word for key in keys for word in ("--set", key))]
    for what in (["ranking"], ["weights"], ["relabel", "--shares", "0.2"]):
        command = [sys.executable, "benchmarks/audit.py", what[0], *common, *what[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").rglob("*.json")}
    assert len(results) == 8  # quick, folds; weights; as drawn, and by four orders
    weighed = results["isic_polygon-s0.json"]["weights"]["0.5"]
    ranked = results["isic_polygon-s0-quick.json"]
    assert weighed["auroc"] == pytest.approx(ranked["scores"]["expected_dice"]["auroc"], abs=1e-3)
    assert results["isic_polygon-s0-quick.json"]["masks"] == results["isic_polygon-s0-folds.json"]["masks"] > 0
    assert results["isic_polygon-s0-label_correction-random-0.2.json"]["relabelled"] > 0
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*.json")}
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
