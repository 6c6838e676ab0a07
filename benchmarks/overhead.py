"""How much of a step is Python and dispatch, and what the layout of its images is worth, on the CPU.

    python benchmarks/overhead.py [--width 64 --depth 4 --size 96 --batch 6] [--rounds 7] [--json FILE]

The same steps are made twice: of the network and images as given, and of a network of one channel and as many layers
on one image of the least size, where next to nothing is left to compute. The time that this takes is what a device
that computes at once would still wait for the host: Python, torch's dispatcher and the set-up of its operators. Beside
it, the step of channels-last images. A step of both streams learns from the clean images too, and is held against the
plain step that does. Contenders take turns in a random order; ratios are of one round.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_stages.stage_meta_step import Contender, build_step
from measure import describe_machine, take_turns

CONTENDERS = (
    Contender("plain"),
    Contender("plain, channels last", channels_last=True),
    Contender("plain, both streams", learns_clean=True),
    *(Contender(name, name) for name in ("forward", "reverse", "finite", "head")),
    *(Contender(f"{name}, both streams", name, learns_clean=True, one_pass=True) for name in ("forward", "head")),
)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    least = argparse.Namespace(width=1, depth=arguments.depth, batch=1)
    entries = {each.name: build_step(each, "cpu", arguments, arguments.size) for each in CONTENDERS}
    entries |= {f"{each.name}: host": build_step(each, "cpu", least, 2**arguments.depth) for each in CONTENDERS}
    seconds = take_turns(entries, arguments.rounds, "cpu")
    rows = {}
    for name in (each.name for each in CONTENDERS):
        whole, host = seconds[name], seconds[f"{name}: host"]
        plain = seconds["plain, both streams" if name.endswith("both streams") else "plain"]
        rows[name] = {
            "ms": 1e3 * statistics.median(whole),
            "over_plain": statistics.quantiles([a / b for a, b in zip(whole, plain, strict=True)], n=4),
            "host_ms": 1e3 * statistics.median(host),
            "host_share": statistics.quantiles([a / b for a, b in zip(host, whole, strict=True)], n=4),
        }
    setting = {name: value for name, value in vars(arguments).items() if name != "json"}
    return {"machine": describe_machine("cpu"), "setting": setting, "rows": rows}


def show(result: dict[str, Any]) -> str:
    setting, machine = result["setting"], result["machine"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}; U-Net width "
        f"{setting['width']} depth {setting['depth']}, {setting['batch']} images of {setting['size']}²",
        "",
        "step                         ms  × plain             host ms  share of the step",
    ]
    for name, row in result["rows"].items():
        (low, middle, high), (less, share, more) = row["over_plain"], row["host_share"]
        lines.append(
            f"{name:22s} {row['ms']:8.1f}  {middle:.2f} ({low:.2f}–{high:.2f})  {row['host_ms']:7.2f}"
            f"  {share:.1%} ({less:.1%}–{more:.1%})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=6, help="noisy images, and as many clean ones")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
