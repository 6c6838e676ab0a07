"""Scripts go by result.json: an exit code of 0 from a launcher does not say that a run is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.testing.forked import run_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("{name: run, data: {root: .}, train: {steps: 1}}")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    return path


def ask(*arguments: str) -> subprocess.CompletedProcess:
    [asked] = run_script(["launch/finished.py", *arguments], ROOT, os.environ)
    return asked


def test_a_run_is_done_once_its_result_is_whole(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(config), "--runs-dir", str(tmp_path / "runs")]
    result = tmp_path / "runs" / "run" / "result.json"
    for content in (None, "", '{"test/dice"', "[]"):
        if content is not None:
            result.write_text(content)
        asked = ask(*arguments)
        assert asked.returncode == 1
        assert asked.stderr == f"error: {result.parent}: is not done, it has no whole result.json; --resume goes on\n"
    result.write_text("{}")
    assert ask(*arguments).returncode == 0
    assert ask(*arguments, "name=other").returncode == 1
    assert ask(*arguments, "nam=other").returncode == 2


@pytest.mark.parametrize(
    ("code", "written", "expected"),
    [
        (0, False, 1),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((0, True, 0), (3, True, 3), (3, False, 3))),
    ],
)
def test_the_batch_script_checks_the_result(
    config: Path, tmp_path: Path, code: int, written: bool, expected: int
) -> None:
    if written:
        (tmp_path / "runs" / "run" / "result.json").write_text("{}")
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\nexit {code}\n")
    srun.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    script = ["bash", "launch/slurm/train.sbatch", "--config", str(config), "--runs-dir", str(tmp_path / "runs")]
    assert subprocess.run(script, cwd=ROOT, env=environment, capture_output=True).returncode == expected
