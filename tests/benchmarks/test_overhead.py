import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--width", "4", "--depth", "1", "--size", "16", "--batch", "2", "--rounds", "3"]
    command = [sys.executable, "benchmarks/overhead.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert {"plain", "plain, channels last", "plain, both streams", "forward", "head, both streams"} < rows.keys()
    assert all(row["ms"] > 0 and row["host_ms"] > 0 for row in rows.values())
    assert all(name in done.stdout for name in rows)
