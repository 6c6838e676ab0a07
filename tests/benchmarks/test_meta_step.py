import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--width", "8", "--depth", "1", "--size", "64", "--batch", "2", "--rounds", "3", "--device", "cpu"]
    command = [sys.executable, "benchmarks/meta_step.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    learning_from_both = ["plain_both", "one_pass_clean", "forward_clean", "head_clean"]
    assert set(result["rows"]) == {"plain", "one_pass", "forward", "reverse", "finite", "head", *learning_from_both}
    for itself in (result["rows"]["plain"], result["rows"]["plain_both"]["beside_plain_both"]):
        assert itself["time_ratio"] == itself["memory_ratio"] == itself["predicted_ratio"] == 1
    assert result["rows"]["one_pass_clean"]["beside_plain_both"]["predicted_ratio"] == pytest.approx(8 / 6)
    assert all(row["seconds"] > 0 for row in result["rows"].values())
    peaks = {name: row["peak_bytes"] for name, row in result["rows"].items()}  # MiBs: a resident set jumps by pages
    assert min(peaks.values()) > 2**20 and peaks["plain_both"] > 1.5 * peaks["plain"]
    assert result["setting"]["width"] == 8 and result["machine"]["torch"]
    assert all(name in done.stdout for name in result["rows"])
