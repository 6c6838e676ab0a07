"""Images a second of `distseg predict` beside a plain loop, by turns in one process, and the share of decoding.

    python benchmarks/predict.py RUN FOLDER [--rounds 3] [--threads 2] [--json FILE]

Both read every image of FOLDER, squash it to the network's input, predict, bring the mask to the image's size and write
it as PNG. The plain loop is what one writes first: PIL, one image at a time, torch.no_grad, no threads of its own.
Loading the network is in neither time.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.distributed.ranks import ShardSpec
from distseg.inference.inputs import Item, find_items
from distseg.inference.job import Job
from distseg.inference.outputs import Outputs, Wanted
from distseg.inference.predictor import Predictor, Settings


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    keys = [f"data.threads={arguments.threads}"]
    predictor = Predictor.of_run(arguments.run, torch.device("cpu"), Settings(), overrides=keys)
    if predictor.data.shape != "squash":
        parser.error("the plain loop squashes images: give a run of data.shape=squash")
    items, _ = find_items([str(arguments.folder)], [], Path("/nowhere"))
    times: dict[str, list[float]] = {"plain": [], "predict": [], "decode": []}
    for _ in range(arguments.rounds):
        for name, run in (("plain", plain), ("predict", ours), ("decode", decode)):
            started = time.perf_counter()
            run(predictor, items)
            times[name].append(time.perf_counter() - started)
    report = figures(times, len(items)) | {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "threads": arguments.threads,
        "image_size": predictor.data.image_size,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def figures(times: dict[str, list[float]], images: int) -> dict[str, float | int | list[float]]:
    """Medians; `ratio` is that of the rounds' own ratios. `decode_share`: the plain loop's time spent on decoding."""
    ratios = [plain / ours for plain, ours in zip(times["plain"], times["predict"], strict=True)]
    shares = [decoding / plain for decoding, plain in zip(times["decode"], times["plain"], strict=True)]
    return {
        "images": images,
        **{f"{name}_images_per_second": images / float(np.median(values)) for name, values in times.items()},
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
        "decode_share_of_plain": float(np.median(shares)),
    }


def plain(predictor: Predictor, items: Sequence[Item]) -> None:
    side = predictor.data.image_size
    with tempfile.TemporaryDirectory() as folder:
        for item in items:
            image = Image.open(item.path).convert("RGB")
            small = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
            normal = ((small - CHANNEL_MEANS) / CHANNEL_DEVIATIONS).astype(np.float32)
            with torch.no_grad():
                logits = predictor.network(torch.from_numpy(normal).permute(2, 0, 1)[None])
                own = interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)
            mask = (own[0, 0] > 0).numpy().astype(np.uint8) * 255
            Image.fromarray(mask).save(Path(folder) / f"{item.id}.png")


def ours(predictor: Predictor, items: Sequence[Item]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(predictor, Outputs(Path(folder), Wanted(), predictor.data.decoding), items, [])
        job.begin()
        job.run(ShardSpec(), lambda count: None)
        job.finish()


def decode(predictor: Predictor, items: Sequence[Item]) -> None:
    """The plain loop's decoding alone."""
    for item in items:
        Image.open(item.path).convert("RGB").load()


if __name__ == "__main__":
    main()
