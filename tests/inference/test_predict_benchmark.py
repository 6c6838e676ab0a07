"""benchmarks/predict.py runs, and its figures follow from its times."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(make_run: Callable, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/predict.py", str(make_run()), str(pictures), "--rounds", "1"]
    environment = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["images"] == 10 and len(found["ratios"]) == 1
    assert found["ratio"] == pytest.approx(found["predict_images_per_second"] / found["plain_images_per_second"])
    decoding = found["plain_images_per_second"] / found["decode_images_per_second"]
    assert 0 < found["decode_share_of_plain"] == pytest.approx(decoding)
