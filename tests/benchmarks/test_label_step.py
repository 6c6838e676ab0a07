import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--sizes", "2x16x16", "--width", "4", "--depth", "1", "--rounds", "3", "--device", "cpu"]
    command = [sys.executable, "benchmarks/label_step.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(figures.read_text())["results"]
    names = ["plain", "corrected", "noisy", "held out", "label model", "the same, held out", "bins", "correct"]
    assert list(result["rows"]) == names
    assert result["rows"]["plain"]["ratio"] == result["rows"]["noisy"]["ratio"] == [1, 1, 1]
    assert all(row["seconds"] > 0 for row in result["rows"].values())
    assert result["rows"]["bins"]["bytes"] == 2 * 2 * 16 * 16
    assert all(name in done.stdout for name in result["rows"])
