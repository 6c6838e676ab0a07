"""What a step on corrected labels costs beside a plain step on the same images, and its operators beside copying.

    python benchmarks/label_step.py [--sizes 8x64x64 1x512x512] [--rounds 15] [--json FILE]

A step is forward, backward and SGD with momentum on as many noisy as clean images of each size (BxHxW of each), made as
training makes it. Contenders take turns in a random order, round after round, and each is compared with the plain step
of its own round, because a machine's speed drifts:

    corrected   labels of the noisy images by the label model, beside `plain`, drawn labels
    held out    the same while the clean images are only looked at, beside `noisy`, drawn labels of the noisy images
                alone: by passes 1.33, one forward more

`label model` is all that a corrected step has more than a plain one, without the network: bins, correction, learning
from the counts; `the same, held out` has the calibration on the clean images' logits too. Both stand beside the step
that they are part of, `plain` and `noisy`, in its medians.

Of the operators, the bytes are those that have to be moved, each tensor read or written once: bins 2 a pixel (masks,
bins), correction 4C + 3 (float32 logits, masks, bins, labels). The copy beside a time moves as many, half of them read
and half written. Distances are exact, which takes more passes than one.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine, take_turns
from torch import Tensor

from distseg import ops
from distseg.data.batch import Batch
from distseg.labels.annotators import identity_prior, log_likelihood
from distseg.labels.distances import signed_distance_bins
from distseg.methods.labels.corrected import Corrected
from distseg.methods.part import HeldOut
from distseg.models.unet import UNet
from distseg.testing.steps import method_on

BESIDE = {"plain": "plain", "corrected": "plain", "noisy": "noisy", "held out": "noisy"}
"""What each step is compared with."""
BYTES = {"bins": 2, "correct": 7}
"""A pixel, one channel."""


def discs(batch: int, height: int, width: int, device: torch.device) -> Batch:
    """Noise for images, and discs of many sizes for masks; one image has none."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    centre = torch.rand(batch, 2, 1, 1, generator=generator)
    radius = (0.1 + 0.25 * torch.rand(batch, 1, 1, generator=generator)) * min(height, width)
    masks = ((rows - centre[:, 0] * height) ** 2 + (columns - centre[:, 1] * width) ** 2 < radius**2).to(torch.uint8)
    masks[0] = 0
    images = torch.randn(batch, 3, height, width, generator=generator)
    return Batch(images.to(device), masks.to(device), None, tuple(map(str, range(batch))))


def build_step(contender: str, batch: Batch, arguments: argparse.Namespace) -> Callable[[], None]:
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = UNet(arguments.width, arguments.depth, arguments.norm).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    skipped, label_model = torch.zeros((), dtype=torch.bool, device=device), None
    if contender in ("corrected", "held out"):
        label_model = Corrected(device, 2, len(batch.ids), least_gain=-1, decide_after=1)

    def logits_of(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    clean_share = 0.5 if contender in ("plain", "corrected") else 0.0
    method = method_on(batch, batch if contender != "noisy" else None, clean_share, label_model, logits_of)

    def step() -> None:
        made = method.begin(0, diagnose=False)
        optimizer.zero_grad()
        [micro] = made.micro_batches
        made.loss(0, model(micro.batch.images)).backward()
        optimizer.step()
        made.finish(skipped, 1e-4)

    return step


def operators(batch: Batch) -> dict[str, Callable[[], object]]:
    masks, device = batch.masks, batch.masks.device
    bins = signed_distance_bins(masks)[:, None]
    logits, one = batch.images[:, :1].contiguous(), torch.zeros(len(masks), 1, dtype=torch.int64, device=device)
    tables, theta = log_likelihood(identity_prior(2, device))[None], torch.tensor([1.0, 0.0], device=device)
    return {
        "bins": lambda: signed_distance_bins(masks),
        "correct": lambda: ops.correct_labels(logits, masks, bins, one, tables, theta),
    }


def label_models(batch: Batch) -> dict[str, Callable[[], object]]:
    masks, device = batch.masks, batch.masks.device
    model = Corrected(device, 2, len(masks), least_gain=-1, decide_after=1)
    logits, skipped = batch.images[:, :1].contiguous(), torch.zeros((), dtype=torch.bool, device=device)

    def run(held_out: HeldOut | None) -> None:
        _, evidence = model.correct(logits, masks, model.bins(masks), held_out)
        model.learn(evidence, skipped, 1e-4)

    return {
        "label model": lambda: run(None),
        "the same, held out": lambda: run(
            HeldOut(logits, masks, torch.arange(len(masks), device=masks.device) % 10, masks)
        ),
    }


def ratios(times: list[float], others: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile, round by round."""
    return statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    batch = discs(*map(int, size.split("x")), torch.device(arguments.device))
    steps = {contender: build_step(contender, batch, arguments) for contender in BESIDE}
    seconds = take_turns(steps, arguments.rounds, arguments.device)
    rows: dict[str, Any] = {
        name: {"seconds": statistics.median(times), "ratio": ratios(times, seconds[BESIDE[name]])}
        for name, times in seconds.items()
    }
    timed = take_turns(label_models(batch), arguments.rounds, arguments.device)
    for (name, times), step in zip(timed.items(), ("plain", "noisy"), strict=True):
        own = statistics.median(times)
        rows[name] = {"seconds": own, "beside": step, "of_step": own / rows[step]["seconds"]}
    for name, call in operators(batch).items():
        moved = BYTES[name] * batch.masks.numel()
        source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=arguments.device)
        turns = take_turns(
            {"own": call, "copy": lambda source=source, target=target: target.copy_(source)},
            arguments.rounds,
            arguments.device,
        )
        own = statistics.median(turns["own"])
        rows[name] = {
            "seconds": own,
            "bytes": moved,
            "over_copy": ratios(turns["own"], turns["copy"]),
            "beside": "plain",
            "of_step": own / rows["plain"]["seconds"],
        }
    return {"size": size, "rows": rows}


def show(result: dict[str, Any]) -> str:
    lines = [
        f"{result['size']} noisy and as many clean images",
        "",
        "                           ms    ratio  quartiles",
    ]
    for name, row in result["rows"].items():
        line = f"{name:20s} {row['seconds'] * 1e3:9.3f}"
        if spread := row.get("ratio") or row.get("over_copy"):
            low, median, high = spread
            line += f"  {median:7.3f}  {low:.3f} – {high:.3f} × {BESIDE.get(name, 'copy')}"
        if "of_step" in row:
            line += f"   {100 * row['of_step']:.2f} % of {row['beside']}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["8x64x64", "1x512x512"], help="BxHxW of each stream")
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--norm", default="group")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    machine = describe_machine(arguments.device) | {"backend": ops.backend(arguments.device)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = []
    for size in arguments.sizes:
        results.append(measure(size, arguments))
        print(f"\n{show(results[-1])}", flush=True)
    if arguments.json:
        setting = {name: value for name, value in vars(arguments).items() if name != "json"}
        text = json.dumps({"setting": setting, "machine": machine, "results": results}, indent=2)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
