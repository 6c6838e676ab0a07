import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_says_what_it_measured(drawn_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    for name in ("isic_original", "isic2017_128"):
        shutil.copytree(drawn_data, tmp_path / name)
    figures = tmp_path / "figures.json"
    small = ["--rounds", "2", "--images", "8", "--batch", "4", "--size", "32", "--no-training"]
    command = [sys.executable, "benchmarks/data.py", str(tmp_path), *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    assert list(result["sets"]) == ["isic_original", "isic2017_128"]
    for rows in result["sets"].values():
        assert {"baseline", "torch 2", "DALI 1", "DALI 2", "DALI 2, in memory"} <= rows.keys()
        assert rows["baseline"]["ratio"] == 1
        assert all(row["images_per_second"] > 0 for row in rows.values())
    assert len(result["decoding"]) == 6 and all(row["milliseconds"] > 0 for row in result["decoding"].values())
    assert result["waiting"] is None
    assert result["machine"]["torch"] and "DALI 2" in done.stdout
