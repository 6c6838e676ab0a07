"""The weighted step beside other ways to it: time, peak memory and error, each contender in its own environment.

    python benchmarks/peers.py [--rounds 5] [--json benchmarks/results/peers.json]

Makes an environment for each contender from its requirements in benchmarks/peers/ (in `--environments`, once), and
gives every one the same network, batches and number of threads as safetensors. A step is: weights for the noisy images
from the clean ones, then the weighted step. `authors` is the procedure of the paper, `of_monai` a step without weights.

    s           median seconds of the step
    × plain     beside a plain step of the noisy images in the same process, taking turns: median and quartiles
    memory      peak above parameters, gradients, momentum and batches, in a process of its own (× plain's)
    error       Σ |W − W*|, of weights that sum to 1: 0 if equal, 2 if they share no pixel. W* is made in float64 by the
                oracle of the tests (tests/meta/oracle.py), which imports nothing of distseg

A contender that cannot be installed or does not run has its last line of error in the table. On the CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import describe_machine
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.models.unet import UNet

ROOT = Path(__file__).parents[1]
PEERS = Path(__file__).parent / "peers"
sys.path.append(str(ROOT / "tests" / "meta"))
from oracle import double_backward  # noqa: E402  (the baseline of the tests)

PLAIN = ("of_distseg", "plain")


@dataclass(frozen=True)
class Setting:
    width: int
    depth: int
    side: int
    batch: int
    threads: int


CONTENDERS = (
    PLAIN,
    ("of_distseg", "forward"),
    ("of_distseg", "reverse"),
    ("of_distseg", "finite"),
    ("authors", "virtual step"),
    ("of_higher", "innerloop_ctx"),
    ("of_torchopt", "MetaSGD"),
    ("of_betty", "darts"),
    ("of_betty", "sama"),
    ("of_monai", "Dice and cross-entropy"),
)
"""Scripts of benchmarks/peers/ and what they are asked for; the first one is what the others are beside."""
THEN = {"of_betty": ["--no-deps", "--ignore-requires-python", "betty-ml==0.2.1"]}
"""What pip installs after the requirements. The releases of Betty that have SAMA say Python < 3.11; they are Python
alone, and run. Asked to ignore that, pip would ignore it for every package."""
SCRIPTS = tuple(dict.fromkeys(script for script, _ in CONTENDERS))


class Failed(Exception):
    """One line: why a contender has no figures."""


def prepare(environments: Path) -> dict[str, Path | str]:
    """By script the Python of its environment, or why it has none. distseg's is the one that runs this."""
    pythons: dict[str, Path | str] = {}
    for script in SCRIPTS:
        requirements = PEERS / f"{script}.txt"
        if not requirements.exists():
            pythons[script] = Path(sys.executable)
            continue
        folder = environments / script
        installed = folder / "installed.txt"
        try:
            if not installed.exists() or installed.read_text() != requirements.read_text():
                _call([sys.executable, "-m", "venv", "--clear", str(folder)])
                pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
                _call([*pip, "-r", str(requirements)])
                if script in THEN:
                    _call([*pip, *THEN[script]])
                installed.write_text(requirements.read_text())
            pythons[script] = folder / "bin" / "python"
        except Failed as error:
            pythons[script] = str(error)
    return pythons


def _call(command: list[str], timeout: float = 1800, **environment: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {timeout:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(lines[-1].strip() if lines else f"exit code {done.returncode}")
    return done.stdout


def write_inputs(folder: Path, setting: Setting) -> Tensor:
    """The files that contenders read; returns W* (B, H, W), float64."""
    torch.manual_seed(0)
    model = UNet(setting.width, setting.depth, "none")
    shape = (setting.batch, setting.side, setting.side)
    batches = {}
    for prefix in ("", "clean_"):
        batches[f"{prefix}images"] = torch.randn(shape[0], 3, *shape[1:])
        batches[f"{prefix}masks"] = torch.randint(0, 2, shape, dtype=torch.uint8)
    (folder / "setting.json").write_text(json.dumps(asdict(setting)))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "network.safetensors")
    save_file(batches, folder / "batches.safetensors")
    wide = [batches[f"{prefix}images"].double() for prefix in ("", "clean_")]
    u = double_backward(model.double(), (wide[0], batches["masks"]), (wide[1], batches["clean_masks"]))
    positive = u.clamp(min=0)
    return positive / positive.sum()


def measure(setting: Setting, pythons: dict[str, Path | str], rounds: int) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = write_inputs(folder, setting)
        for script, variant in CONTENDERS:
            row = {"script": script, "variant": variant}
            try:
                row |= _measure_one(script, variant, pythons[script], folder, rounds, reference)
            except Failed as error:
                row["failed"] = str(error)
            rows.append(row)
    plain = rows[0].get("peak")
    for row in rows:
        if plain and "peak" in row:
            row["memory_ratio"] = row["peak"] / plain
    return rows


def _measure_one(script: str, variant: str, python: Path | str, folder: Path, rounds: int, reference: Tensor) -> dict:
    if isinstance(python, str):
        raise Failed(f"not installed: {python}")
    command = [str(python), str(PEERS / f"{script}.py"), str(folder), variant]
    path = {"PYTHONPATH": str(ROOT)} if python == Path(sys.executable) else {"PYTHONPATH": ""}
    times = json.loads(_call([*command, "times", str(rounds)], **path).splitlines()[-1])
    # Freed tensors go back at once, so that the resident set tells what is held.
    peak = _call([*command, "peak"], **path, MALLOC_MMAP_THRESHOLD_="65536").splitlines()[-1]
    ratios = [own / plain for own, plain in zip(times["own"], times["plain"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    row = {"seconds": statistics.median(times["own"]), "time_ratio": median, "time_ratio_quartiles": [low, high]}
    row |= json.loads(peak) | {"torch": times["torch"]}
    weights = folder / f"weights-{script}-{variant}.safetensors"
    if weights.exists():
        row["error"] = (load_file(weights)["weights"].double() - reference).abs().sum().item()
    return row


def show(result: dict) -> str:
    machine = result["machine"]
    before, after = (", ".join(f"{load:.1f}" for load in loads) for loads in result["load"])
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}, {result['rounds']} rounds;"
        f" load averages {before} before and {after} after"
    ]
    for case in result["cases"]:
        setting = Setting(**case["setting"])
        lines += [
            "",
            f"U-Net of width {setting.width} and depth {setting.depth}, {setting.batch} + {setting.batch} images of"
            f" {setting.side}×{setting.side}, {setting.threads} threads",
            "",
            "| | s | × plain | memory | error |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [_line(row) for row in case["rows"]]
    return "\n".join(lines)


def _line(row: dict) -> str:
    name = f"{row['script'].removeprefix('of_')}, {row['variant']}"
    if "failed" in row:
        return f"| {name} | {row['failed']} | | | |"
    low, high = row["time_ratio_quartiles"]
    memory = f"{row['peak'] / 2**20:.0f} MiB" + (f" ({row['memory_ratio']:.2f})" if "memory_ratio" in row else "")
    error = f"{row['error']:.1e}" if "error" in row else ""
    return f"| {name} | {row['seconds']:.2f} | {row['time_ratio']:.2f} ({low:.2f}–{high:.2f}) | {memory} | {error} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--batch", type=int, default=6, help="noisy images, and as many clean ones")
    parser.add_argument("--side", type=int, default=96, help="of the images, pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 16], help="of the U-Nets; 64 is the paper's")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    pythons = prepare(arguments.environments)
    before = os.getloadavg()
    cases = []
    for width in arguments.widths:
        setting = Setting(width, arguments.depth, arguments.side, arguments.batch, arguments.threads)
        rows = measure(setting, pythons, arguments.rounds)
        cases.append({"setting": asdict(setting), "rows": rows})
    result = {"machine": describe_machine("cpu"), "load": [before, os.getloadavg()], "rounds": arguments.rounds}
    result |= {"cases": cases}
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
