"""A method less each of its rivals in a study, seed by seed: the mean of the differences and its standard error.

    python benchmarks/differences.py RUNS.csv [--champion label_correction] [--score test/dice]
    python benchmarks/differences.py --best-steps STUDY RUNS.csv

RUNS.csv is what launch/sweep.py writes. Two runs of one seed have the same split, clean images and drawn masks, so that
their difference is paired. A run that does not depend on the noise or on K stands for all of them.

--best-steps adds a column best_step/test/dice to RUNS.csv: test Dice of the checkpoint with the best validation Dice,
whose runs are folders of STUDY; take it as --score then.
"""

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distseg.config.load import load_config
from distseg.data.survey import survey
from distseg.distributed.runtime import Runtime, start_runtime, stop_runtime
from distseg.evaluation.metrics import image_scores
from distseg.files import write_atomically
from distseg.inference.predictor import Predictor, Settings
from distseg.study.plan import ANY
from distseg.training.scoring import score

BEST_STEP = "best_step/test/dice"
Row = dict[str, str]


class Difference(NamedTuple):
    """Of one noise level and clean count; over `seeds` seeds, `error` is the standard error of the mean."""

    noise: str
    clean_count: str
    rival: str
    seeds: int
    champion_mean: float
    rival_mean: float
    mean: float
    error: float


def differences(rows: Sequence[Row], champion: str, key: str) -> Iterator[Difference]:
    settings = dict.fromkeys((row["noise"], row["clean_count"]) for row in rows if row["method"] == champion)
    rivals = dict.fromkeys(row["method"] for row in rows if row["method"] != champion)
    for noise, clean_count in settings:
        ours = _by_seed(rows, champion, noise, clean_count, key)
        for rival in rivals:
            theirs = _by_seed(rows, rival, noise, clean_count, key)
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                continue
            each = np.array([[ours[seed], theirs[seed]] for seed in seeds])
            apart = each[:, 0] - each[:, 1]
            error = float(apart.std(ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else float("nan")
            means = (float(value) for value in (*each.mean(0), apart.mean()))
            yield Difference(noise, clean_count, rival, len(seeds), *means, error)


def _by_seed(rows: Sequence[Row], method: str, noise: str, clean_count: str, key: str) -> dict[str, float]:
    return {
        row["seed"]: float(row[key])
        for row in rows
        if row["method"] == method and row["noise"] in (noise, ANY) and row["clean_count"] in (clean_count, ANY)
    }


def dice_of_best_step(run: Path, runtime: Runtime) -> float:
    """Test Dice at the network's resolution, as training scores the last step."""
    config = load_config(run / "config.yaml", [])
    samples = [each for each in survey(config.data)[0] if each.split == "test" and each.reference is not None]
    predictor = Predictor.of_run(run, runtime.device, Settings(), "best")
    counts = score(predictor.network, samples, config.data, runtime, config.train.batch_size, sharded=False, own=False)
    return float(image_scores(counts.network)["dice"].mean())


def add_best_steps(rows: Sequence[Row], study: Path) -> None:
    """Runs whose best step is the last have its score already."""
    runtime = start_runtime()
    for row in rows:
        run = study / row["name"]
        ends = [(run / "checkpoints" / which).read_text().strip() for which in ("best", "last")]
        if ends[0] == ends[1]:
            row[BEST_STEP] = row["test/dice"]
        else:
            row[BEST_STEP] = repr(dice_of_best_step(run, runtime))
    stop_runtime()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--champion", default="label_correction")
    parser.add_argument("--score", default="test/dice")
    parser.add_argument("--best-steps", type=Path, metavar="STUDY")
    arguments = parser.parse_args()
    with arguments.runs.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if arguments.best_steps:
        add_best_steps(rows, arguments.best_steps)
        out = io.StringIO(newline="")
        table = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_atomically(arguments.runs, out.getvalue())
        return
    print(f"| noise | K | rival | seeds | {arguments.champion} | rival's {arguments.score} | difference |")
    print("|---|---|---|---:|---:|---:|---:|")
    for each in differences(rows, arguments.champion, arguments.score):
        print(
            f"| {each.noise} | {each.clean_count} | {each.rival} | {each.seeds} | {each.champion_mean:.3f} |"
            f" {each.rival_mean:.3f} | {each.mean:+.4f} ± {each.error:.4f} |"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
