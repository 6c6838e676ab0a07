import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WAYS = {"exact", "head", "bf16", "g of 1 steps ago", "g of 3 steps ago", "g of 7 steps ago"}


def test_the_benchmark_runs_and_says_what_it_measured(drawn_data: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    keys = ["train.batch_size=2", "train.clean_batch_size=2", "data.image_size=16", "model.width=4", "model.depth=1"]
    small = ["--steps", "24", "--every", "8", "--seeds", "0", "--set", *keys, "data.clean_count=4"]
    command = [sys.executable, "benchmarks/approximations.py", str(drawn_data), *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert {(row["way"], row["step"]) for row in result["along"]} == {
        (way, step) for way in WAYS for step in (8, 16, 24)
    }
    differences = {row["way"]: row["difference"] for row in result["along"] if row["step"] == 24}
    assert differences["exact"] == 0 < min(differences[way] for way in WAYS - {"exact"})
    assert max(differences.values()) <= 1 + 1e-5
    assert result["dice"].keys() == {"noisy labels", "exact", "head", "bf16"}
    assert "g of 7 steps ago" in done.stdout and "test Dice, seeds 0" in done.stdout
