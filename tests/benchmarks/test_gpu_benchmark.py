"""`make gpu` rehearsed on the CPU, at tiny sizes, by the same script."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_every_stage_runs_and_leaves_its_figures(gpu: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    summary = json.loads((tmp_path / "summary.json").read_text())
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert [outcome["stage"] for outcome in summary] == [stage.name for stage in gpu.STAGES]
    for outcome in summary:
        if outcome["status"] == "left out":
            assert outcome["why"].endswith("is not installed")
            continue
        assert outcome["status"] == "done", logs
        tables = json.loads((tmp_path / f"{outcome['stage']}.json").read_text())["tables"]
        assert tables and all(tables.values())
        assert f"## {outcome['title']}" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")

    tables = json.loads((tmp_path / "meta_step.json").read_text())["tables"].values()
    assert all({"plain", "authors"} < {row["step"] for row in table} for table in tables)
    resumed = json.loads((tmp_path / "resume.json").read_text())["tables"].values()
    assert all(row["differing elements"] == 0 for table in resumed for row in table)


def test_a_stage_that_fails_or_takes_too_long_is_recorded(gpu: ModuleType, tmp_path: Path) -> None:
    stage, log = gpu.Stage("labels", "The label model", 60), tmp_path / "log"

    def run(code: str, limit: float) -> tuple[str, str]:
        outcome = gpu.run_stage(stage, [sys.executable, "-c", code], limit, log, {})
        return outcome.status, outcome.why

    assert run("print(1)", 30) == ("done", "")
    assert run("raise SystemExit('CUDA out of memory')", 30) == ("failed", "exit code 1: CUDA out of memory")
    assert run("import time; print(1, flush=True); time.sleep(60)", 1) == ("out of time", "ended after 1 s")
    assert gpu.missing_package(gpu.Stage("a", "A", 1, ("json", "no_such_package.part"))) == "no_such_package.part"


def test_the_summary_has_what_a_cut_off_stage_left(gpu: ModuleType, tmp_path: Path) -> None:
    tables = {"96², fp32": [{"step": "plain", "× plain": 1.0}, {"step": "forward", "× plain": 1.3456, "MiB": 7}]}
    (tmp_path / "meta_step.json").write_text(json.dumps({"machine": {"device": "H100"}, "tables": tables}))
    cut_off = gpu.Outcome("meta_step", "What a weighted step costs", "out of time", 9.0, "ended after 9 s")
    left_out = gpu.Outcome("labels", "The label model", "left out", why="cv2 is not installed")
    gpu.write_summary([cut_off, left_out], tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| meta_step | out of time | 9 | ended after 9 s |" in text
    assert "| labels | left out | 0 | cv2 is not installed |" in text
    assert gpu.earlier_outcomes(tmp_path) == {"meta_step": cut_off, "labels": left_out}
    assert "| step | × plain | MiB |" in text and "| plain | 1 |  |" in text and "| forward | 1.35 | 7 |" in text
