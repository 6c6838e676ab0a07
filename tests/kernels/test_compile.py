"""Every Triton kernel compiles for the GPUs that people have, with no GPU at hand, and keeps to its registers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_ahead.py")
KERNELS = {
    "alignment_kernel",
    "bins_kernel",
    "correct_kernel",
    "dice_gradient_kernel",
    "dice_sums_kernel",
    "double_backward_kernel",
    "edges_kernel",
    "loss_kernel",
    "normalise_kernel",
    "patch_kernel",
    "positive_kernel",
    "rescale_kernel",
    "row_distances_kernel",
}


CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[subprocess.Popen, Path]]]:
    """A compiler for each capability and the folder of its output; all at once, because each takes one core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PROGRAM.parents[2])
    started = {}
    for capability in CAPABILITIES:
        folder = tmp_path_factory.mktemp("triton")
        with (folder / "stdout").open("w") as output, (folder / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(capability)],
                env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")},
                stdout=output,
                stderr=errors,
            )
        started[capability] = process, folder
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_ahead_of_time_without_spills(
    capability: int, compilers: dict[int, tuple[subprocess.Popen, Path]]
) -> None:
    process, folder = compilers[capability]
    assert process.wait(timeout=280) == 0, (folder / "stderr").read_text()
    variants = [json.loads(line) for line in (folder / "stdout").read_text().splitlines()]
    assert {variant["kernel"] for variant in variants} == KERNELS
    assert all(variant["REG"] > 0 for variant in variants)
    spilled = [variant for variant in variants if variant["LOCAL"] or variant["STACK"]]
    assert not spilled, "\n".join(map(str, spilled))
