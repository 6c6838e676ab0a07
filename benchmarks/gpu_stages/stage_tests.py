"""tests/gpu, file by file: how many passed, and which failed."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_stages.findings import Findings, Setting

ROOT = Path(__file__).parents[2]
FILES = {"test_on_gpu.py": ("pydantic", "cv2"), "test_data_on_gpu.py": ("nvidia", "pydantic", "simplejpeg", "zlib_ng")}
"""With what they need. test_benchmark.py is the stage `kernels`."""


def measure(setting: Setting, findings: Findings) -> None:
    failed = []
    for name, needs in FILES.items():
        missing = [package for package in needs if importlib.util.find_spec(package) is None]
        if missing:
            findings.add("tests/gpu", {"file": name, "failed": f"left out: {missing[0]} is not installed"})
            continue
        counts, names = run_file(ROOT / "tests" / "gpu" / name)
        findings.add("tests/gpu", {"file": name, **counts, "failed": "; ".join(names[:10])})
        failed += names
    if failed:
        raise SystemExit(f"{len(failed)} tests failed, the first {failed[0]}")


def run_file(path: Path) -> tuple[dict[str, float], list[str]]:
    """Counts and seconds of a file's tests, and the names of those that failed."""
    # The suite's own conftest wants packages that these files do not.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(path)]
    workers = min(8, len(os.sched_getaffinity(0)) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["--numprocesses", str(workers)]  # most of the time is Triton's compiler
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT)
        if not report.exists():
            return {}, [f"{path.name}: pytest wrote no report"]
        [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    row = {"passed": passed, "skipped": counts["skipped"], "seconds": float(suite.get("time", 0))}
    return row, [str(case.get("name")) for case in bad]
