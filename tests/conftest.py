"""What several rooms' tests share: a small data set, and entry points run as a user runs them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distseg.testing.dermoscopy import write_dataset
from distseg.testing.ranks import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 drawn dermoscopy images with true masks: 20 train, 6 val, 6 test."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_dataset(folder, {"train": 20, "val": 6, "test": 6}, size=48, seed=0)
    return folder


def command(ranks: int, *arguments: str) -> list[str]:
    """`launch/train.py` under DeepSpeed's launcher on `ranks` processes, or as plain python for 0."""
    if ranks == 0:
        return [sys.executable, "launch/train.py", *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), "launch/train.py", *arguments]


@pytest.fixture(scope="session")
def train() -> Callable[..., subprocess.CompletedProcess]:
    """Run `launch/train.py` to its end; `train(ranks, *arguments)`."""

    def run(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(ranks, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
        )

    return run


def environment() -> dict[str, str]:
    """This process's, less what would make a child think that it is somebody's rank."""
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in ranks} | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
