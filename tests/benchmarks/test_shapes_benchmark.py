import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_says_what_it_measured(drawn_data: Path, tmp_path: Path) -> None:
    small = ["--rounds", "2", "--size", "16", "--scale", "0.5", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, "benchmarks/shapes.py", str(drawn_data), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result["setting"]["images"] == 32
    assert len(result["milliseconds"]) == 6
    assert all(0 < low <= median <= high for low, median, high in result["milliseconds"].values())
    assert "letterbox, own resolution too" in done.stdout
