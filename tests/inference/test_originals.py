"""The ISIC originals: masks of their sizes, scores as by hand, the same files after ten kills."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from distseg.cli.evaluate import main
from distseg.cli.export import main as export
from distseg.cli.predict import main as predict
from distseg.data.decode import read_reduced
from distseg.data.geometry import Frame
from distseg.distributed.runtime import stop_runtime
from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("DISTSEG_DATA", "/none"))
ORIGINALS = DATA / "isic_original"
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CONFIG = """
name: trained
data: {root: ROOT, image_size: 64, clean_count: 20, pipeline: torch, threads: 2}
model: {width: 8, depth: 3, norm: group}
method: {name: clean_only}
optim: {name: adam, lr: 3e-3}
train: {steps: 120, batch_size: 8, log_every: 60, validate_every: 60, checkpoint_every: 60}
tracking: {mlflow: false}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not ORIGINALS.is_dir(), reason="DISTSEG_DATA names no folder with isic_original"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "c.yaml").write_text(CONFIG.replace("ROOT", str(ORIGINALS)))
    done = train(0, "--config", str(folder / "c.yaml"), "--runs-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder / "trained"


def rows() -> list[dict[str, str]]:
    with (ORIGINALS / "manifest.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_own_dice_of_evaluate_is_that_by_hand(run: Path, tmp_path: Path) -> None:
    code = main([str(run), "--to", str(tmp_path), "--split", "all", "--no-surfaces"])
    stop_runtime()
    assert code == 0
    dice = []
    for row in rows():
        mask = Image.open(tmp_path / "predictions" / "masks" / f"{row['id']}.png")
        truth = Image.open(ORIGINALS / row["mask"])
        assert mask.size == truth.size == Image.open(ORIGINALS / row["image"]).size and mask.mode == "L"
        drawn, right = np.asarray(mask) == 255, np.asarray(truth) > 0
        dice.append(2 * (drawn & right).sum() / (drawn.sum() + right.sum()))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["images"] == len(dice) == 47
    assert found["own"]["dice"]["mean"] == pytest.approx(np.mean(dice), abs=1e-9)
    assert np.mean(dice) > 0.5


def test_exported_graphs_and_the_served_model_give_the_runs_masks_on_ten(run: Path, tmp_path: Path) -> None:
    import mlflow.pyfunc
    import pandas as pd

    chosen = [ORIGINALS / row["image"] for row in rows()[::5]]
    assert len(chosen) == 10
    assert export([str(run), "--to", str(tmp_path / "out"), "--onnx", "--program", "--mlflow"]) == 0
    assert predict([str(run), *map(str, chosen), "--to", str(tmp_path / "masks")]) == 0
    stop_runtime()
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    served = mlflow.pyfunc.load_model(str(tmp_path / "out" / "mlflow_model"))
    answers = served.predict(pd.DataFrame({"image": [path.read_bytes() for path in chosen]}))
    for path, png in zip(chosen, answers["mask"], strict=True):
        expected = np.asarray(Image.open(tmp_path / "masks" / "masks" / f"{path.stem}.png")) > 0
        pixels, size = read_reduced(path, Frame(64))
        inputs = {"images": pixels[None], "size": np.array(size)}
        masks = {
            "onnx": session.run(["masks"], inputs)[0][0] > 0,
            "program": program(*map(torch.from_numpy, inputs.values()))[0][0].numpy() > 0,
            "served": np.asarray(Image.open(BytesIO(png))) > 0,
        }
        for name, mask in masks.items():
            assert (mask & expected).sum() / (mask | expected).sum() >= 0.999, (name, path)


def test_killed_ten_times_and_started_again(run: Path, tmp_path: Path) -> None:
    rng, kills = random.Random(0), 0
    command = [sys.executable, "launch/predict.py", str(run), str(ORIGINALS / "images"), "--batch-size", "4", "--to"]
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=250)
    killed = tmp_path / "killed"
    for start in range(10):
        process = subprocess.Popen([*command, str(killed)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and len([*killed.glob("masks/*.png")]) < 4 * start and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() / 3)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 5
    subprocess.run([*command, str(killed)], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=250)
    masks = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "masks").iterdir()}
    assert masks == {path.name: path.read_bytes() for path in (killed / "masks").iterdir()} and len(masks) == 47
