"""The limits that the kernels are held to on a GPU, by the benchmark that prints them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[2]
PASSES = ("weights", "loss", "loss+gradient", "normalise")
"""Single kernels; the other cases are several launches, whose traffic the bytes do not count."""


def test_kernels_reach_the_memory_and_are_not_slower_than_compiled(tmp_path: Path) -> None:
    figures = tmp_path / "kernels.json"
    command = [sys.executable, "benchmarks/kernels.py", "--device", "cuda", "--json", str(figures)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads(figures.read_text())
    rows = [row for row in result["rows"] if row["case"] in PASSES]
    beyond_cache = [row for row in rows if row["bytes"] > result["machine"]["l2_bytes"]]
    assert beyond_cache
    slow = [row for row in beyond_cache if row["over_copy"][1] > 1 / 0.9]
    assert not slow, f"below 90 % of the copy's bandwidth: {slow}"
    slower = [row for row in rows if row["speedup"]["compiled"][1] < 1]
    assert not slower, f"slower than torch.compile: {slower}"
