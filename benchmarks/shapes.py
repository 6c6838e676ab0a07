"""What scoring costs an image: at network resolution, at the file's own beside it, and by tiles.

    python benchmarks/shapes.py PATH [--size 64] [--scale 0.25] [--rounds 5] [--json FILE]

PATH holds manifest.csv. The network is that of configs/isic2017.yaml, untrained, on the CPU, one rank and one thread
that reads; each measurement scores all images, without and with their own resolution (data.score_own).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine, take_turns

from distseg.config.load import load_config
from distseg.data.config import DataConfig
from distseg.data.survey import read_samples
from distseg.distributed.runtime import start_runtime, stop_runtime
from distseg.models.registry import build_model
from distseg.training.scoring import score

ROOT = Path(__file__).parents[1]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds an image of each shape, without and with scores at the files' own resolution."""
    runtime = start_runtime()
    torch.manual_seed(0)
    config = load_config(ROOT / "configs" / "isic2017.yaml", [f"data.root={arguments.data}"])
    model = build_model(config.model)
    samples = read_samples(config.data)
    contenders = {}
    for shape in ("squash", "letterbox", "crop"):
        keys = {"scale": arguments.scale} if shape == "crop" else {}
        data = DataConfig(root=arguments.data, image_size=arguments.size, shape=shape, **keys)
        for own in (False, True):
            name = f"{shape}, own resolution too" if own else shape
            contenders[name] = lambda data=data, own=own: score(model, samples, data, runtime, 16, False, own)
    seconds = take_turns(contenders, arguments.rounds, device="cpu")
    stop_runtime()
    rows = {
        name: [1e3 * value / len(samples) for value in statistics.quantiles(values, n=4)]
        for name, values in seconds.items()
    }
    setting = {key: getattr(arguments, key) for key in ("size", "scale", "rounds")} | {"images": len(samples)}
    return {"machine": describe_machine("cpu"), "setting": setting, "milliseconds": rows}


def show(result: dict[str, Any]) -> str:
    setting = result["setting"]
    lines = [
        f"{result['machine']['device']}; {setting['images']} images to {setting['size']}×{setting['size']}, crops at "
        f"{setting['scale']}, {setting['rounds']} rounds",
        "",
        "an image                        ms  quartiles",
    ]
    rows = result["milliseconds"].items()
    lines += [f"{name:30s} {median:5.1f}  {low:.1f} – {high:.1f}" for name, (low, median, high) in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with manifest.csv")
    parser.add_argument("--size", type=int, default=64, help="side of the network's input, pixels")
    parser.add_argument("--scale", type=float, default=0.25, help="of the crops")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
