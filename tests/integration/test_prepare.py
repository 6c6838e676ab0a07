"""`launch/prepare.py`, then training on what it has prepared, on two ranks and with a file that is bad."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import cv2
import pytest

from distseg.testing.forked import run_script

ROOT = Path(__file__).parents[2]
CONFIG = """
name: prepared
data: {image_size: 32, clean_count: 4, noise: {kind: polygon}, augment: {flip: true, hairs: 3, elastic: 0.03}}
model: {width: 4, depth: 2, norm: batch}
optim: {name: adam, lr: 1e-3}
train: {steps: 4, batch_size: 2, clean_batch_size: 2, log_every: 1}
tracking: {mlflow: false}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "prepared.yaml").write_text(CONFIG)
    return tmp_path / "prepared.yaml"


def prepare(*arguments: str) -> subprocess.CompletedProcess:
    [done] = run_script(["launch/prepare.py", *arguments], ROOT, os.environ)
    return done


@pytest.mark.slow
def test_training_from_the_cache_without_the_bad_file(
    config: Path, drawn_data: Path, tmp_path: Path, train_ranks
) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(drawn_data, data)
    victim = sorted((data / "images").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:100])
    arguments = ["--config", str(config), f"data.root={data}", "data.on_bad=skip"]

    done = prepare(*arguments, "--cache", str(cache))
    assert done.returncode == 0, done.stderr
    assert f"{victim}: cannot be decoded" in done.stdout
    assert f"{cache}: 31 samples at 32², 1 shards written, 0 kept" in done.stdout

    losses = {}
    for name, key in (("originals", []), ("cached", [f"data.cache={cache}"])):
        run = train_ranks(2, *arguments, *key, "--runs-dir", str(tmp_path / name))
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("left out 1 sample,") == 1
        folder = tmp_path / name / "prepared"
        with (folder / "left_out.csv").open(newline="") as file:
            assert [row["id"] for row in csv.DictReader(file)] == [victim.stem]
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses["cached"]) == 4
    assert losses["cached"] == losses["originals"]


def test_noisy_masks_are_those_of_training_with_a_manifest_and_a_contact_sheet(
    config: Path, drawn_data: Path, tmp_path: Path, train
) -> None:
    masks, arguments = tmp_path / "masks", ["--config", str(config), f"data.root={drawn_data}"]
    done = prepare(*arguments, "--noisy-masks", str(masks))
    assert done.returncode == 0, done.stderr
    with (masks / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"{masks}: {len(rows)} masks of polygon(3), " in done.stdout
    assert {(row["kind"], row["parameters"], row["seed"]) for row in rows} == {("polygon", "vertices=3", "0")}
    assert all(0 < float(row["wrong_pixel_rate"]) < 1 for row in rows)
    height, width, _ = cv2.imread(str(masks / "contact_sheet.png")).shape
    assert min(height, width) > 100

    assert train(0, *arguments, "--runs-dir", str(tmp_path / "runs")).returncode == 0
    trained_on = tmp_path / "runs" / "prepared" / "noisy_masks"
    assert {path.name for path in trained_on.iterdir()} == {path.name for path in masks.iterdir()} - {
        "contact_sheet.png"
    }
    assert all((trained_on / row["mask"]).read_bytes() == (masks / row["mask"]).read_bytes() for row in rows)


def test_noise_that_draws_nothing_has_no_masks_to_show(config: Path, drawn_data: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), f"data.root={drawn_data}", "data.noise.kind=none"]
    done = prepare(*arguments, "--noisy-masks", str(tmp_path / "masks"))
    assert done.returncode == 2
    assert "data.noise.kind=polygon" in done.stderr and done.stderr.count("\n") == 1


def test_what_training_would_refuse_is_refused(config: Path, drawn_data: Path) -> None:
    done = prepare("--config", str(config), f"data.root={drawn_data}", "data.clean_count=null", "data.noise.kind=none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data: all 20 training images have a reference mask")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.cuont=3"], "data.cuont: unknown key"),
        (["data.root=/no/such/folder"], "/no/such/folder: no such folder"),
        (["data.on_bad=ignore"], "data.on_bad"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(config: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = prepare("--config", str(config), "data.root=.", *arguments, "--cache", str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (tmp_path / "cache").exists()
