import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--images", "30", "--sample", "10", "--rounds", "2", "--threads", "1"]
    command = [sys.executable, "benchmarks/prepare.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert result["cost"].keys() == {"decoding", "check", "findings"}
    assert result["cost"]["decoding"]["ratio"] == 1
    assert result["whole"]["images"] == 30 and 0 < result["whole"]["peak_mib"] < 1024
    assert "of 30 images" in done.stdout
