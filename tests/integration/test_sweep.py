"""A study as a user runs it: real runs, an interruption, a run that fails, and reports from MLflow and from folders."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distseg.testing.launcher import train_environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1"}  # bits depend on the number of threads

BASE = """
name: base
data: {image_size: 16, pipeline: torch, augment: {flip: true}}
model: {width: 4, depth: 1, norm: batch}
optim: {name: adam, lr: 1e-2, schedule: one_cycle}
train: {steps: 60, batch_size: 2, clean_batch_size: 2, log_every: 1, checkpoint_every: 3, figure_every: 60}
tracking: {system_metrics: false}
"""


@pytest.fixture
def write_study(tmp_path: Path, drawn_data: Path):
    (tmp_path / "base.yaml").write_text(BASE)

    def write(name: str, **more_methods: list[str]) -> list[str]:
        study = {
            "name": name,
            "base": "base.yaml",
            "settings": [f"data.root={drawn_data}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"],
            "methods": {"t_loss": [], "pixel_reweight": ["optim.lr=5e-3"], **more_methods},
            "noise": [{"kind": "polygon", "vertices": 3}],
            "clean_counts": [4],
            "seeds": [0, 1],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(study))
        command = [sys.executable, str(ROOT / "launch" / "sweep.py"), str(tmp_path / f"{name}.yaml"), "--parallel", "2"]
        return [*command, "--runs-dir", str(tmp_path / "runs")]

    return write


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two runs at once need two cores")
def test_a_sweep_interrupted_three_times_ends_with_the_table_of_one_that_was_not(
    write_study, empty_store: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    whole = run(write_study("whole"), tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = (tmp_path / "runs" / "whole" / "report" / "results.csv").read_text()
    assert len(expected.splitlines()) == 3 and "polygon(3),4,pixel_reweight,2," in expected

    command = write_study("cut", broken=["method.name=noisy_only", "data.root=/no/such/folder"])
    folder = tmp_path / "runs" / "cut"
    steps_made = sorted(random.Random(0).sample(range(10, 200), 3))  # of 240 that the runs make together
    cut_off: set[str] = set()
    for moment in steps_made:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 200
        while sum(log.read_text().count("\n") for log in folder.glob("*/metrics.jsonl")) < moment:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        started = {last.parents[1] for last in folder.glob("*/checkpoints/last")}
        on_the_way = {run.name for run in started if not (run / "result.json").exists()}
        assert on_the_way, "no run was stopped on its way"
        cut_off |= on_the_way

    again = run(command, tmp_path)
    assert again.returncode == 1, again.stdout + again.stderr  # the broken ones failed, and the others went on
    assert len(re.findall(r"failed +broken.*/no/such/folder", again.stdout)) == 2
    assert all((folder / name / "result.json").exists() for name in cut_off)
    assert all(f"finished  {name}" in again.stdout for name in on_the_way)
    assert "2 of 6 runs have not finished: broken-" in again.stdout
    assert (folder / "report" / "results.csv").read_text() == expected

    # Finished runs are recognised, and the report needs nothing but the tracking server, or nothing but the folders.
    listed = run([*command, "--list"], tmp_path).stdout
    assert (listed.count("finished"), listed.count("failed")) == (4, 2)
    parent = (folder / "mlflow_run_id").read_text().strip()
    rebuild = [sys.executable, str(ROOT / "launch" / "report.py"), parent, "--uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert run(rebuild, tmp_path).returncode == 0
    assert (tmp_path / "report" / "results.csv").read_text() == expected
    from_folders = [sys.executable, "-m", "distseg.cli.main", "report", str(folder), "--folder", "from_folders"]
    assert run(from_folders, tmp_path).returncode == 0
    for name in ("results.csv", "runs.csv"):
        assert (tmp_path / "from_folders" / name).read_bytes() == (tmp_path / "report" / name).read_bytes()
    names = ({path.name for path in (tmp_path / source).iterdir()} for source in ("from_folders", "report"))
    assert next(names) == next(names)
    page = (tmp_path / "report" / "report.html").read_text()
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures >= {"dice_by_noise.png", "auroc.png", "cost.png", "weights_0_early.png"}
    assert page.count("data:image/png;base64,") == len(pictures)

    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    study = client.get_run(parent)
    assert (study.info.status, study.data.metrics["runs/failed"]) == ("FAILED", 2)
    assert {f.path for f in client.list_artifacts(parent, "report")} >= {"report/report.html", "report/results.csv"}
    nested = client.search_runs([study.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted((r.data.tags["method"], r.data.tags["clean_count"], r.data.tags["seed"]) for r in nested) == [
        ("pixel_reweight", "4", "0"), ("pixel_reweight", "4", "1"), ("t_loss", "any", "0"), ("t_loss", "any", "1"),
    ]  # fmt: skip

    # Whoever removes a run's folder wants it to run again.
    shutil.rmtree(folder / on_the_way.pop())
    listed = run([*command, "--list"], tmp_path).stdout
    assert (listed.count("finished"), listed.count("new")) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--index", "4"], "--index 4: the study has the runs 0 to 3"),
        (["data.clean_cuont=3"], "data.clean_cuont: unknown key; did you mean clean_count?"),
        (["--parallel", "5000"], "--parallel 5000"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(write_study, tmp_path, arguments: list[str], said: str):
    done = run([*write_study("bad"), *arguments], tmp_path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "runs").exists()


def test_a_study_without_mlflow_is_reported_from_its_folders(write_study, tmp_path: Path) -> None:
    command = write_study("local", t_loss={"grid": {"optim.lr": [1e-3, 1e-2]}}, pixel_reweight=[])
    done = run([*command, "tracking.mlflow=false", "train.steps=3", "train.figure_every=1"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "local"
    rows = list(csv.DictReader((folder / "report" / "results.csv").open()))
    assert [(row["method"], row["optim.lr"], row["seeds"]) for row in rows] == [
        ("pixel_reweight", "", "2"), ("t_loss", "0.001", "2"), ("t_loss", "0.01", "2"),
    ]  # fmt: skip
    pictures = {path.name for path in (folder / "report").glob("*.png")}
    assert pictures >= {"dice_by_noise.png", "grid_0_optim_lr.png", "cost.png", "weights_0_early.png"}
    assert "Best by validation Dice at polygon(3), K = 4: t_loss with optim.lr=" in done.stdout
    assert not (folder / "mlflow_run_id").exists() and not list(tmp_path.rglob("mlflow.db"))
