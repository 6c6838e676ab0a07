"""What CONTRIBUTING says of adding a method: its file and its line in the registry, nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]

TOY = '''
"""The Brier score: the squared distance of probability and label."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distseg.meta.weights import WeightMap
from distseg.methods.context import Context
from distseg.methods.part import Loss
from distseg.section import Section


class BrierConfig(Section):
    kind: Literal["brier"] = "brier"
    factor: Annotated[float, Field(gt=0)] = 1.0

    def build(self, context: Context) -> Loss:
        return Brier(self.factor)


class Brier(Loss):
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, None]:
        error = (logits[:, 0].sigmoid() - (labels == 1).float()).square()
        return self.factor * (weights.full(labels) * torch.where(labels == 255, 0.0, error)).sum(), None
'''
REGISTRY = "Losses = "


def test_a_loss_is_one_file_and_one_line_in_the_registry(tmp_path: Path, drawn_data: Path) -> None:
    package = tmp_path / "distseg"
    shutil.copytree(ROOT / "distseg", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (package / "methods" / "losses" / "brier.py").write_text(TOY)
    registry = package / "methods" / "config.py"
    before = registry.read_text()
    assert before.count(REGISTRY) == 1
    registry.write_text(
        before.replace(
            "\n# The registry", "\nfrom distseg.methods.losses.brier import BrierConfig\n# The registry"
        ).replace(REGISTRY, REGISTRY + "BrierConfig | ")
    )

    config = tmp_path / "toy.yaml"
    config.write_text(
        f"name: toy\ndata: {{root: {drawn_data}, image_size: 16, clean_count: 4, pipeline: torch}}\n"
        "model: {width: 4, depth: 1}\nmethod: {name: finetune, loss: brier, factor: 2.0}\n"
        "train: {steps: 2, batch_size: 2, clean_batch_size: 2, log_every: 1}\ntracking: {mlflow: false}\n"
    )
    command = [sys.executable, "launch/train.py", "--config", str(config), "--runs-dir", str(tmp_path / "runs")]
    environment = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "factor: 2.0" in (tmp_path / "runs" / "toy" / "config.yaml").read_text()
    assert json.loads((tmp_path / "runs" / "toy" / "result.json").read_text())["steps"] == 2
