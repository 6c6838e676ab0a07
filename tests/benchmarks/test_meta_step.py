import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--width", "4", "--depth", "1", "--size", "16", "--batch", "2", "--rounds", "3", "--device", "cpu"]
    command = [sys.executable, "benchmarks/meta_step.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert list(result["rows"]) == ["plain", "forward", "reverse", "finite"]
    assert result["rows"]["plain"]["time_ratio"] == result["rows"]["plain"]["memory_ratio"] == 1
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in result["rows"].values())
    assert result["setting"]["width"] == 4 and result["machine"]["torch"]
    assert all(name in done.stdout for name in result["rows"])
