import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    small = ["--sizes", "2x8x9", "1x16x16", "--rounds", "3", "--no-compile", "--device", "cpu"]
    command = [sys.executable, "benchmarks/kernels.py", *small, "--json", str(figures), "--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    cases = {"weights", "loss", "loss+gradient", "dice loss+grad.", "double backward", "patch(8)", "normalise", "step"}
    assert {row["case"] for row in result["rows"]} == cases
    assert len(result["rows"]) == len(cases) * 2 * 2
    assert all(seconds > 0 for row in result["rows"] for seconds in row["seconds"].values())
    assert all(set(row["seconds"]) == {"ours", "eager", "copy"} for row in result["rows"])
    assert result["machine"]["backend"].startswith("csrc")
    assert all(case in done.stdout for case in cases)
    assert picture.read_bytes().startswith(b"\x89PNG")
