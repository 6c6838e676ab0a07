"""Everything that a GPU can say about distseg, in one command and under eight minutes; `make gpu` runs it.

    python benchmarks/gpu.py [--budget 460] [--wheels wheels] [--out benchmarks/results/gpu] [--only kernels …]
    python benchmarks/gpu.py --device cpu --tiny --out FOLDER          # the same on a CPU, at tiny sizes

Needs a Python with torch and Triton and nothing else: of what is missing, the wheels in `wheels/` are used from a
folder of their own for as long as this runs (`make gpu-wheels` fetches them); a stage that still lacks a package is
left out, by the package's name. The C++ extension is not needed.

Each stage is a process with a time limit, and writes its figures after every row; the summary is written after every
stage. A stage that fails or runs out of time is recorded with what it had, and the next one goes on. In --out:

    <stage>.json     the figures of a stage        <stage>.log   what it printed
    summary.json     how each stage ended          summary.md, summary.png   the same to look at
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gpu_report import markdown, plot

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 10.0
"""A stage is not started with less of the budget left."""


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    limit: float
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Packages beside torch, NumPy and Triton."""


_DATA = ("pydantic", "cv2", "simplejpeg", "zlib_ng")
STAGES = (
    Stage("tests", "Tests on the GPU", 120, ("pytest",)),
    Stage("meta_step", "What a weighted step costs", 150),
    Stage("resume", "Resumed = never stopped", 40),
    Stage("kernels", "Operators beside copying their bytes", 110),
    Stage("training", "Training, images per second", 60, ("deepspeed", "omegaconf", *_DATA)),
    Stage("labels", "The label model", 30, ("pydantic", "cv2")),
    Stage("decoding", "Decoding on the GPU", 45, ("nvidia.dali", *_DATA)),
)
"""In the order of what would be missed most."""


@dataclass(frozen=True)
class Outcome:
    stage: str
    title: str
    status: str
    """`done`, `failed`, `out of time` or `left out`."""
    seconds: float = 0.0
    why: str = ""


def run_stage(stage: Stage, command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run a stage's command to its end, or for `limit` seconds."""
    started = time.monotonic()
    with log.open("w") as output:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    seconds = round(time.monotonic() - started, 1)
    if code == 0:
        return Outcome(stage.name, stage.title, "done", seconds)
    if code is None:
        return Outcome(stage.name, stage.title, "out of time", seconds, f"ended after {limit:.0f} s")
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing printed"]
    return Outcome(stage.name, stage.title, "failed", seconds, f"exit code {code}: {last[0][:200]}")


def missing_package(stage: Stage) -> str | None:
    """The first package that the stage needs and this Python does not have."""
    return next((name for name in stage.needs if not _is_there(name)), None)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that should hold it
        return False


def install_wheels(wheels: Path, target: Path) -> None:
    """Unpack the wheels into `target`, and find their packages there from now on."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if files:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(target), *files], check=True)
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()


def write_summary(outcomes: Sequence[Outcome], folder: Path) -> None:
    """summary.json, .md and, where matplotlib is there, .png, of the stages so far."""
    (folder / "summary.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=2) + "\n")
    figures = {
        each.stage: json.loads(path.read_text())
        for each in outcomes
        if (path := folder / f"{each.stage}.json").exists()
    }
    (folder / "summary.md").write_text(markdown([asdict(each) for each in outcomes], figures))
    if _is_there("matplotlib"):
        plot(figures, folder / "summary.png")


def earlier_outcomes(folder: Path) -> dict[str, Outcome]:
    """How the stages of the last call ended, for a summary of those that are run again and those that are not."""
    path = folder / "summary.json"
    found = json.loads(path.read_text()) if path.exists() else []
    return {each["stage"]: Outcome(**each) for each in found}


def run(arguments: argparse.Namespace, packages: Path) -> list[Outcome]:
    deadline = time.monotonic() + arguments.budget
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = earlier_outcomes(folder) if arguments.only else {}
    install_wheels(arguments.wheels, packages)
    places = [str(packages), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONUNBUFFERED": "1"}
    for stage in STAGES:
        if arguments.only and stage.name not in arguments.only:
            continue
        (folder / f"{stage.name}.json").unlink(missing_ok=True)
        left = deadline - time.monotonic()
        if package := missing_package(stage):
            outcome = Outcome(stage.name, stage.title, "left out", why=f"{package} is not installed")
        elif left < LEAST_SECONDS:
            outcome = Outcome(stage.name, stage.title, "left out", why="no time left in the budget")
        else:
            command = [sys.executable, "-m", "gpu_stages", stage.name, "--device", arguments.device, "--out", folder]
            command += ["--tiny"] if arguments.tiny else []
            limit = min(stage.limit, left)
            outcome = run_stage(stage, [*map(str, command)], limit, folder / f"{stage.name}.log", environment)
        outcomes[stage.name] = outcome
        write_summary([outcomes[each.name] for each in STAGES if each.name in outcomes], folder)
        print(f"{outcome.stage:10s} {outcome.status:12s} {outcome.seconds:6.1f} s  {outcome.why}", flush=True)
    return list(outcomes.values())


def _sees_a_gpu() -> bool:
    asked = subprocess.run([sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"])
    return asked.returncode == 0


def main() -> int:
    """Prints one line a stage; 0 where none has failed, 2 where there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can rehearse")
    parser.add_argument("--budget", type=float, default=460, help="seconds for everything")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[stage.name for stage in STAGES],
        help="these stages; what the others found before stays",
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not _sees_a_gpu():
        print(f"gpu.py: torch of {sys.executable} sees no GPU; set GPU_PYTHON, or rehearse by --device cpu --tiny")
        return 2
    with tempfile.TemporaryDirectory() as packages:
        outcomes = run(arguments, Path(packages))
    print(f"\n{(arguments.out / 'summary.md').read_text()}")
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
