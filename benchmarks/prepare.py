"""What the check of the data costs: `prepare --report` beside plain decoding of the same files, and its memory.

    python benchmarks/prepare.py [--images 10000] [--sample 500] [--rounds 5] [--threads 2] [--json FILE]

Makes its own data: JPEGs of 300×225 pixels, each with a reference and the masks of two annotators, PNG. Contenders take
turns on the first `--sample` images, round after round, and ratios are of one round. They are of processor time, over
all threads, which says what the work costs also on a machine that others use. The files are in the page cache:

    decoding    each file decoded whole by PIL, as the loaders do, and thrown away
    check       the strict look into every file, statistics and agreement gathered on the way, as before training
    findings    what the rules and the search for near-identical images then take: no file is read

Then `launch/prepare.py --report` once over all images, in a process of its own: seconds, and the peak of its memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from measure import describe_machine, take_turns

from distseg.data.checks import facts_of, inspect_files
from distseg.data.config import DataConfig
from distseg.data.decode import PLAIN, read_image, read_mask
from distseg.data.findings import find
from distseg.data.sample import Sample
from distseg.data.survey import read_samples

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = 300, 225
ANNOTATORS = ("a", "b")


def write_data(folder: Path, count: int) -> None:
    """`count` images that look like no other, with a reference and two annotations; 7 in 10 are of the train split."""
    (folder / "files").mkdir(parents=True)
    rows = ["id,split,image,reference," + ",".join(f"annotation:{name}" for name in ANNOTATORS)]
    rows += [_write_sample(folder / "files", number) for number in range(count)]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def _write_sample(folder: Path, number: int) -> str:
    rng = np.random.default_rng(number)
    coarse = rng.integers(60, 220, (12, 16, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image + rng.normal(0, 4, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8)
    names = [f"{number:05d}.jpg", *(f"{number:05d}_{who}.png" for who in ("r", *ANNOTATORS))]
    cv2.imwrite(str(folder / names[0]), image)
    centre, axes, angle = rng.uniform(0.35, 0.65, 2), rng.uniform(0.1, 0.3, 2), rng.uniform(0, 180)
    for place, name in enumerate(names[1:]):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        middle = int(centre[0] * WIDTH) + 4 * place, int(centre[1] * HEIGHT)
        cv2.ellipse(mask, middle, (int(axes[0] * WIDTH), int(axes[1] * HEIGHT)), angle, 0, 360, 255, -1)
        cv2.imwrite(str(folder / name), mask)
    split = "train" if number % 10 < 7 else "val" if number % 10 == 7 else "test"
    return ",".join([f"s{number:05d}", split, *(f"files/{name}" for name in names)])


def decode_all(samples: Sequence[Sample], threads: int) -> None:
    def decode(sample: Sample) -> None:
        image, *masks = sample.files.values()
        read_image(image)
        for path in masks:
            read_mask(path)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode, samples):
            pass


def measure_cost(samples: Sequence[Sample], arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("background", "lesion")
    facts = facts_of(samples, inspect_files(samples, PLAIN, arguments.threads), names)
    costs: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            started = time.process_time()
            work()
            costs.setdefault(name, []).append(time.process_time() - started)

        return run

    contenders = {
        "decoding": lambda: decode_all(samples, arguments.threads),
        "check": lambda: inspect_files(samples, PLAIN, arguments.threads),
        "findings": lambda: find(facts),
    }
    seconds = take_turns({name: timed(name, work) for name, work in contenders.items()}, arguments.rounds, device="cpu")
    rows = {}
    for name, values in seconds.items():
        own, plain = costs[name][1:], costs["decoding"][1:]  # less the round that warms up
        ratios = [each / decoding for each, decoding in zip(own, plain, strict=True)]
        rows[name] = {
            "milliseconds_an_image": 1e3 * statistics.median(values) / len(samples),
            "processor_milliseconds": 1e3 * statistics.median(own) / len(samples),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    return rows


def measure_whole(data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and the peak of resident memory, MiB, of one `prepare --report`."""
    config = data / "c.yaml"
    config.write_text("name: x\ndata: {image_size: 96, clean_count: 3}\ntrain: {steps: 1}\n")
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--config", str(config), f"data.root={data}"]
    command += ["--report", str(data / "report"), "--threads", str(arguments.threads)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"prepare ended with {process.returncode}")
    page = (data / "report" / "report.html").stat().st_size
    return {
        "images": arguments.images,
        "seconds": time.perf_counter() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "page_mib": page / 2**20,
    }


def show(result: dict[str, Any]) -> str:
    setting, whole = result["setting"], result["whole"]
    lines = [
        f"{result['machine']['device']}, {setting['threads']} threads; {WIDTH}×{HEIGHT} JPEG and {1 + len(ANNOTATORS)} "
        f"masks an image, {setting['sample']} images a measurement, {setting['rounds']} rounds",
        "",
        "           ms an image  CPU ms  × decoding  range",
    ]
    for name, row in result["cost"].items():
        low, high = row["ratio_range"]
        times = f"{row['milliseconds_an_image']:11.2f}  {row['processor_milliseconds']:6.2f}"
        lines.append(f"{name:9s}  {times}  {row['ratio']:10.2f}  {low:.2f} – {high:.2f}")
    lines += [
        "",
        f"prepare --report of {whole['images']} images: {whole['seconds']:.0f} s, {whole['processor_seconds']:.0f} s "
        f"of the processor, at most {whole['peak_mib']:.0f} MiB, a page of {whole['page_mib']:.1f} MiB",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--sample", type=int, default=500, help="of them, in the comparison")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(data, arguments.images)
        samples = read_samples(DataConfig(root=data))[: arguments.sample]
        result = {
            "machine": describe_machine("cpu"),
            "setting": {key: getattr(arguments, key) for key in ("sample", "rounds", "threads")},
            "cost": measure_cost(samples, arguments),
            "whole": measure_whole(data, arguments),
        }
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
