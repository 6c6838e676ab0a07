"""How fast batches come: our loaders beside a plain torch DataLoader, and what a training step waits for them.

    python benchmarks/data.py PATH [--rounds 7] [--images 96] [--size 64] [--batch 8] [--json FILE]
    python benchmarks/data.py PATH --no-training

PATH holds isic_original/ and isic2017_128/, each with manifest.csv. All contenders give normalised float32 batches with
masks under the same augmentation, on the same two cores:

    baseline       a torch DataLoader with two workers over Image.open, resize and PIL's own transforms
    torch 1, 2     distseg's loader on cv2, with so many threads that read
    DALI 1, 2      distseg's loader on DALI, with so many threads that read and as many that transform
    … in memory    the same from the second epoch on, when the files have been decoded

Each measurement opens its loader, takes eight batches untimed, and times those that follow; contenders take turns in a
random order, round after round, and ratios are of one round. The processor time of an image, over all threads and
workers, says what a loader costs also on a machine that others use. The files are in the page cache.

Then what decoding a file takes on one thread: whole, a region of it, or reduced on the way. At last the time that a
step of configs/isic2017.yaml waits for its batches, on two ranks.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measure import describe_machine, take_turns
from PIL import Image, ImageEnhance
from torch.utils.data import DataLoader, Dataset

from distseg.data.augment import CHANNEL_DEVIATIONS, CHANNEL_MEANS
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.decode import read_image, read_mask, read_resized_image, read_resized_mask
from distseg.data.geometry import Frame
from distseg.data.sample import Sample
from distseg.data.streams import Stream
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec

ROOT = Path(__file__).parents[1]
SETS = ("isic_original", "isic2017_128")
AUGMENT = AugmentConfig(
    flip=True, right_angles=True, rotate=20, scale=(0.9, 1.1), shear=5, translate=0.05,
    brightness=0.1, contrast=0.1, saturation=0.1, hue=5,
)  # fmt: skip
UNTIMED_BATCHES = 8
"""More than any contender has ahead of it: what was made before the clock started is not counted."""


class PlainDataset(Dataset):
    """What one writes first: PIL for everything, random numbers from torch's generator in each worker."""

    def __init__(self, samples: list[Sample], size: int) -> None:
        self.samples, self.size = samples, size
        self.means, self.deviations = (
            torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (CHANNEL_MEANS, CHANNEL_DEVIATIONS)
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample, size = self.samples[index], self.size
        image = Image.open(sample.image).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        mask = Image.open(sample.truth).convert("L").resize((size, size), Image.Resampling.NEAREST)

        rng = random.Random(int(torch.randint(2**31, ())))
        for flip in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE):
            if rng.random() < 0.5:
                image, mask = image.transpose(flip), mask.transpose(flip)
        matrix = self.draw_matrix(rng)
        image = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        mask = mask.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(rng.uniform(0.9, 1.1))
        hue, saturation, value = image.convert("HSV").split()
        turn = round(rng.uniform(-5, 5) / 360 * 255)
        hue = Image.fromarray(np.asarray(hue) + np.uint8(turn % 256))
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")

        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.means) / self.deviations, torch.from_numpy(np.array(mask) > 127).to(torch.uint8)

    def draw_matrix(self, rng: random.Random) -> tuple[float, ...]:
        angle, shear = np.radians(rng.uniform(-20, 20)), np.tan(np.radians(rng.uniform(-5, 5)))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = turn @ np.array([[1, shear], [0, 1]]) / rng.uniform(0.9, 1.1)
        centre = np.full(2, self.size / 2)
        shift = centre - linear @ (centre + 0.05 * self.size * np.array([rng.uniform(-1, 1), rng.uniform(-1, 1)]))
        return tuple(np.column_stack([linear, shift]).ravel())


def plain_batches(samples: list[Sample], arguments: argparse.Namespace) -> Iterator[object]:
    # Epochs in one sampler, so that no worker is idle or started anew at the end of a small set.
    order = [i for epoch in range(64) for i in np.random.default_rng(epoch).permutation(len(samples))]
    loader = DataLoader(PlainDataset(samples, arguments.size), batch_size=arguments.batch, sampler=order, num_workers=2)
    yield from loader


def stream_batches(stream: Stream) -> Iterator[object]:
    try:
        for step in itertools.count():
            yield stream.batch(step, 0)
    finally:
        stream.close()


def contenders(root: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Iterator[object]]]:
    """Functions that open a loader over the training images of `root`."""
    config = DataConfig(root=root, image_size=arguments.size, augment=AUGMENT, memory=0)
    samples = [sample for sample in read_samples(config) if sample.split == "train"]

    def stream(pipeline: str, threads: int, memory: float = 0.0) -> Stream:
        own = config.model_copy(update={"pipeline": pipeline, "threads": threads, "memory": memory})
        return Stream(samples, "true", "train", own, 0, ShardSpec(), arguments.batch, 1, torch.device("cpu"))

    def in_memory(pipeline: str, threads: int) -> Callable[[], Iterator[object]]:
        warm = stream(pipeline, threads, memory=1.0)
        for step in range(len(samples) // arguments.batch + 1):
            warm.batch(step, 0)
        return lambda: stream_batches(warm)

    return {
        "baseline": lambda: plain_batches(samples, arguments),
        "torch 1": lambda: stream_batches(stream("torch", 1)),
        "torch 2": lambda: stream_batches(stream("torch", 2)),
        "DALI 1": lambda: stream_batches(stream("dali", 1)),
        "DALI 2": lambda: stream_batches(stream("dali", 2)),
        "torch 1, in memory": in_memory("torch", 1),
        "torch 2, in memory": in_memory("torch", 2),
        "DALI 1, in memory": in_memory("dali", 1),
        "DALI 2, in memory": in_memory("dali", 2),
    }


def measure_loader(
    open_loader: Callable[[], Iterator[object]], images: int, arguments: argparse.Namespace
) -> tuple[float, float]:
    """Images per second, and the milliseconds of processor time that one took."""
    batches = open_loader()
    for _ in range(UNTIMED_BATCHES):
        next(batches)
    count = max(1, images // arguments.batch)
    started, busy = time.perf_counter(), processor_seconds()
    for _ in range(count):
        next(batches)
    seconds, busy = time.perf_counter() - started, processor_seconds() - busy
    batches.close()
    return count * arguments.batch / seconds, 1e3 * busy / (count * arguments.batch)


def processor_seconds() -> float:
    """Of this process and its workers, since they started."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


def measure_loaders(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    entries, order = contenders(root, arguments), random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name in entries}
    costs: dict[str, list[float]] = {name: [] for name in entries}
    for _ in range(arguments.rounds):
        for name in order.sample(list(entries), len(entries)):
            images = arguments.images * (10 if "in memory" in name else 1)
            speed, cost = measure_loader(entries[name], images, arguments)
            speeds[name].append(speed)
            costs[name].append(cost)
    rows = {}
    for name, values in speeds.items():
        ratios = [own / plain for own, plain in zip(values, speeds["baseline"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "images_per_second": statistics.median(values),
            "processor_milliseconds": statistics.median(costs[name]),
            "ratio": median,
            "ratio_quartiles": [low, high],
        }
    return rows


def measure_decoding(root: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds of a file on one thread, median and quartiles over the rounds, for up to 16 originals."""
    from nvidia.dali import fn, pipeline_def, types

    samples = [sample for sample in read_samples(DataConfig(root=root)) if sample.split == "train"][:16]

    @pipeline_def(batch_size=len(samples), num_threads=1, device_id=None, exec_pipelined=False, exec_async=False)
    def decoded(side: float):
        files, _ = fn.readers.file(files=[str(sample.image) for sample in samples])
        if side == 1:
            return fn.decoders.image(files, output_type=types.RGB)
        return fn.decoders.image_slice(files, [(1 - side) / 2] * 2, [side] * 2, output_type=types.RGB)

    def each(decode: Callable[..., object], kind: str, *frame: Frame) -> Callable[[], object]:
        return lambda: [decode(sample.files[kind], *frame) for sample in samples]

    seconds = take_turns(
        {
            "JPEG, whole, PIL": each(read_image, "image"),
            "JPEG, whole, DALI": decoded(1).run,
            "JPEG, middle half of its area, DALI": decoded(0.5**0.5).run,
            "JPEG, reduced, distseg": each(read_resized_image, "image", Frame(arguments.size)),
            "mask, whole, PIL": each(read_mask, "reference"),
            "mask, reduced, distseg": each(read_resized_mask, "reference", Frame(arguments.size)),
        },
        arguments.rounds,
        device="cpu",
    )
    rows = {}
    for name, values in seconds.items():
        low, median, high = (1e3 * value / len(samples) for value in statistics.quantiles(values, n=4))
        rows[name] = {"milliseconds": median, "quartiles": [low, high]}
    return rows


def measure_waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of configs/isic2017.yaml on two ranks: the larger share of the two that was spent waiting for data."""
    from distseg.distributed.runtime import free_port

    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
        command = [*launcher, "--master_port", str(free_port()), __file__, str(arguments.data.resolve())]
        command += ["--steps", str(arguments.steps), "--rank-folder", folder]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
    return max(ranks, key=lambda rank: rank["share"])


def train_and_wait(arguments: argparse.Namespace) -> None:
    """One rank of `measure_waiting`: the trainer's own steps, from the first, less ten to warm up."""
    from distseg.config.load import load_config
    from distseg.distributed.runtime import start_runtime, stop_runtime
    from distseg.training.train_step import train_step
    from distseg.training.trainer import Trainer

    runtime = start_runtime()
    root = f"data.root={arguments.data / 'isic2017_128'}"
    config = load_config(ROOT / "configs" / "isic2017.yaml", [root, "tracking.mlflow=false"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), runtime)
        for step in range(10 + arguments.steps):
            if step == 10:
                started, waited = time.perf_counter(), sum(stream.waited for stream in trainer.streams)
            train_step(trainer.engine, trainer.method, step, config.optim.lr)
        seconds = time.perf_counter() - started
        waited = sum(stream.waited for stream in trainer.streams) - waited
        trainer.close()
    row = {"steps": arguments.steps, "seconds_per_step": seconds / arguments.steps, "share": waited / seconds}
    (arguments.rank_folder / f"rank_{runtime.shard.rank}.json").write_text(json.dumps(row))
    stop_runtime()


def show(result: dict[str, Any]) -> str:
    setting, machine = result["setting"], result["machine"]
    lines = [
        f"{machine['device']}, two cores; {setting['size']}×{setting['size']}, batches of {setting['batch']}, "
        f"{setting['images']} images a measurement, {setting['rounds']} rounds"
    ]
    for name, rows in result["sets"].items():
        lines += ["", f"{name:18s}  images/s  × baseline  quartiles      CPU ms an image"]
        lines += [
            f"{contender:18s}  {row['images_per_second']:8.0f}  {row['ratio']:10.2f}  "
            f"{'{:.2f} – {:.2f}'.format(*row['ratio_quartiles']):14s} {row['processor_milliseconds']:15.2f}"
            for contender, row in rows.items()
        ]
    lines += ["", "one original, one thread              ms  quartiles"]
    lines += [
        f"{name:35s} {row['milliseconds']:6.2f}  {row['quartiles'][0]:.2f} – {row['quartiles'][1]:.2f}"
        for name, row in result["decoding"].items()
    ]
    if waiting := result["waiting"]:
        lines += [
            "",
            f"configs/isic2017.yaml on two ranks: {waiting['share']:.2%} of a step of "
            f"{waiting['seconds_per_step']:.3f} s spent waiting for data",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of isic_original/ and isic2017_128/")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--images", type=int, default=96, help="timed in each measurement; ten times as many in memory")
    parser.add_argument("--size", type=int, default=64, help="side of the batches' images, pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of training, timed")
    parser.add_argument("--no-training", action="store_true", help="leave the training steps out")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    arguments = parser.parse_args()
    if arguments.rank_folder:
        train_and_wait(arguments)
        return
    sets = {name: measure_loaders(arguments.data / name, arguments) for name in SETS}
    setting = {key: getattr(arguments, key) for key in ("rounds", "images", "size", "batch")}
    result = {
        "setting": setting,
        "machine": describe_machine("cpu"),
        "sets": sets,
        "decoding": measure_decoding(arguments.data / SETS[0], arguments),
        "waiting": None if arguments.no_training else measure_waiting(arguments),
    }
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
