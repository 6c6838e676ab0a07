"""Every Triton kernel compiles for the GPUs that people have, with no GPU at hand, and keeps to its registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_ahead.py")
KERNELS = {
    "alignment_kernel",
    "double_backward_kernel",
    "loss_kernel",
    "normalise_kernel",
    "patch_kernel",
    "positive_kernel",
    "rescale_kernel",
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_ahead_of_time_without_spills(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PROGRAM.parents[2])}
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(capability)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    variants = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {variant["kernel"] for variant in variants} == KERNELS
    assert all(variant["REG"] > 0 for variant in variants)
    spilled = [variant for variant in variants if variant["LOCAL"] or variant["STACK"]]
    assert not spilled, "\n".join(map(str, spilled))
