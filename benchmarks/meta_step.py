"""What a weighted step costs beside a plain one: time and memory of each estimator on one network and batch.

    python benchmarks/meta_step.py [--width 64 --depth 4 --norm none --size 96 --batch 6] [--rounds 9] [--json FILE]
    python benchmarks/meta_step.py --only one_pass --rounds 30      # beside the plain steps

A plain step is forward, backward and SGD with momentum: on the noisy batch (`plain`), or on the noisy and the clean
batch together (`plain_both`). The others find the weights of the noisy batch from the clean one, and learn from the
noisy batch; those with `_clean` learn from the clean batch too, half and half. `one_pass` carries the tangents in the
step's own forward pass, and its clean gradient is the update's clean half; `forward` takes a pass of its own for them,
and its clean images are joined to the noisy ones. `head_clean` too finds its weights in the step's own pass. Contenders
take turns in a random order, round after round, and each is compared with the plain steps of its own round, because a
machine's speed drifts. Beside the time stands what counting passes predicts: F, one forward pass of a batch; a backward
is 2F, a Jacobian-vector product 3F, or 2F where the pass itself is made anyway.

Memory is the peak above what any training of the network holds (parameters, gradients, momentum, the batches): on CUDA
what the allocator counts; on the CPU the growth of the resident set, each contender in a process of its own where glibc
gives freed tensors back at once (MALLOC_MMAP_THRESHOLD_), so that it shows what is held and not what the heap keeps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import describe_machine, take_turns
from torch import Tensor

from distseg.meta import PixelReweighter
from distseg.models.unet import UNet
from distseg.ops import weighted_loss

PASSES = {
    "plain": 3,
    "plain_both": 6,
    "one_pass": 8,
    "one_pass_clean": 8,
    "forward": 9,
    "forward_clean": 12,
    "reverse": 11,
    "finite": 8,
    "head": 5,
    "head_clean": 6,
}
"""In F. plain: 1 + 2. one_pass: clean 3, tangents 2, step 3. forward: clean 3, JVP 3, step 3, or 6 of both batches.
reverse: clean 3, inner forward and backward 3, its transpose about 2, step 3. finite: clean 3, two noisy forwards,
step 3. head: a clean and a noisy forward, step 3; head_clean: clean 3, step 3."""
SHARE = 0.5
"""Of the clean loss, where the step learns from it."""


def build_step(contender: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """One training step of `contender`, with everything that training holds already allocated."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = UNet(arguments.width, arguments.depth, arguments.norm).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.99)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def batch() -> tuple[Tensor, Tensor]:
        shape = (arguments.batch, arguments.size, arguments.size)
        images = torch.randn(shape[0], 3, *shape[1:], device=device)
        return images, torch.randint(0, 2, shape, dtype=torch.uint8, device=device)

    noisy, clean = batch(), batch()
    both = tuple(torch.cat(parts) for parts in zip(noisy, clean, strict=True))
    uniform = torch.full(noisy[1].shape, 1 / noisy[1].numel(), device=device)
    estimator = contender.removesuffix("_clean")
    reweighter = PixelReweighter(
        model, estimator=estimator if estimator in ("reverse", "finite", "head") else "forward"
    )

    def plain() -> None:
        weighted_loss(model(noisy[0]), noisy[1], uniform).backward()

    def plain_both() -> None:
        weighted_loss(model(both[0]), both[1], torch.cat([uniform, uniform]) / 2).backward()

    def one_pass() -> None:
        logits, weights, _ = reweighter.one_pass(*noisy, *clean)
        weighted_loss(logits, noisy[1], weights).backward()

    def one_pass_clean() -> None:
        logits, weights, found = reweighter.one_pass(*noisy, *clean)
        weighted_loss(logits, noisy[1], weights * (1 - SHARE)).backward()
        for name, parameter in model.named_parameters():
            parameter.grad.add_(found.gradient[name], alpha=SHARE)

    def two_passes() -> None:
        weights = reweighter(*noisy, *clean)
        weighted_loss(model(noisy[0]), noisy[1], weights).backward()

    def forward_clean() -> None:
        weights = reweighter(*noisy, *clean)
        weighted_loss(model(both[0]), both[1], torch.cat([weights * (1 - SHARE), uniform * SHARE])).backward()

    made = {step.__name__: step for step in (plain, plain_both, one_pass, one_pass_clean, forward_clean)}
    made["head_clean"] = one_pass_clean
    gradient = made.get(contender, two_passes)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        gradient()
        optimizer.step()

    return step


def contenders(arguments: argparse.Namespace) -> list[str]:
    return [name for name in PASSES if name in ("plain", "plain_both", *arguments.only)]


def measure_times(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    steps = {contender: build_step(contender, arguments) for contender in contenders(arguments)}
    return take_turns(steps, arguments.rounds, arguments.device)


def measure_peak(contender: str, arguments: argparse.Namespace) -> int:
    """Bytes that two steps of `contender` take above what training holds, at their peak; for a fresh process."""
    step = build_step(contender, arguments)
    step()  # the first one also tries whether the network takes tangents in its own pass
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present resident set
    held = resident("VmRSS")
    step()
    step()
    return resident("VmHWM") - held


def resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure_peak_apart(contender: str, options: list[str]) -> int:
    command = [sys.executable, __file__, *options, "--peak-of", contender]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def report(arguments: argparse.Namespace, options: list[str]) -> dict:
    seconds = measure_times(arguments)
    peaks = {contender: measure_peak_apart(contender, options) for contender in contenders(arguments)}

    def beside(contender: str, base: str) -> dict:
        ratios = [own / plain for own, plain in zip(seconds[contender], seconds[base], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        return {
            "time_ratio": median,
            "time_ratio_quartiles": [low, high],
            "predicted_ratio": PASSES[contender] / PASSES[base],
            "memory_ratio": peaks[contender] / peaks[base],
        }

    rows = {
        contender: {"seconds": statistics.median(times), "peak_bytes": peaks[contender]}
        | beside(contender, "plain")
        | {"beside_plain_both": beside(contender, "plain_both")}
        for contender, times in seconds.items()
    }
    machine = describe_machine(arguments.device) | {"load": os.getloadavg()[0]}
    return {"setting": vars(arguments) | {"json": None}, "machine": machine, "rows": rows}


def show(result: dict) -> str:
    setting, machine = result["setting"], result["machine"]
    network = f"U-Net width {setting['width']} depth {setting['depth']} norm {setting['norm']}"
    lines = [
        f"{network}, batch {setting['batch']} noisy + {setting['batch']} clean, {setting['size']}×{setting['size']}",
        f"{machine['device']}, {machine['threads']} threads, load {machine['load']:.1f}, torch {machine['torch']}, "
        f"{setting['rounds']} rounds",
        "",
        "                         × plain on the noisy images     × plain on both               peak   × plain",
        "step             seconds  time  quartiles  by passes    time  quartiles  by passes    MiB   noisy  both",
    ]
    for name, row in result["rows"].items():
        cells = [f"{name:15s} {row['seconds']:8.3f}"]
        for ratios in (row, row["beside_plain_both"]):
            low, high = ratios["time_ratio_quartiles"]
            cells.append(f"{ratios['time_ratio']:5.2f}  {low:.2f}–{high:.2f}  {ratios['predicted_ratio']:9.2f}  ")
        cells.append(f"{row['peak_bytes'] / 2**20:6.0f}")
        cells += [f"{ratios['memory_ratio']:6.2f}" for ratios in (row, row["beside_plain_both"])]
        lines.append(" ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--norm", default="none")
    parser.add_argument("--size", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=6, help="noisy images, and as many clean ones")
    parser.add_argument("--rounds", type=int, default=9, help="at least 2")
    parser.add_argument("--only", nargs="+", choices=PASSES, default=list(PASSES), help="these beside the plain steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--peak-of", choices=PASSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    contender = vars(arguments).pop("peak_of")
    if contender:
        print(measure_peak(contender, arguments))
        return
    options = [f"--{name}={value}" for name, value in vars(arguments).items() if name not in ("json", "only")]
    path = arguments.json
    result = report(arguments, options)
    print(show(result))
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
