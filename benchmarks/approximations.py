"""What approximations of the exact weights give away: head, a meta pass in bf16, and clean gradients of steps ago.

    python benchmarks/approximations.py PATH [--steps 300] [--every 15] [--seeds 0 1] [--json FILE]

PATH holds manifest.csv, with true masks; noise is drawn, polygons of 3 vertices, and 50 images are clean. The network,
optimiser and schedule are those of configs/isic2017.yaml, on one rank.

Every way has a run of its own, of the same budget and seeds, and the Dice of its test split. In the first run by the
exact weights, every so many steps the other weights of the same step are made beside them, and change nothing: how well
U tells wrong pixels (AUROC), the weight on wrong pixels, and half the sum of the differences from the exact weights,
which is 0 for the same map and 1 for one that shares no pixel. `g of n steps ago` is what refreshing the clean gradient
every n + 1 steps comes to at its oldest.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine
from torch import Tensor

from distseg.config.load import load_config
from distseg.distributed.runtime import Runtime, start_runtime, stop_runtime
from distseg.evaluation.metrics import summarise
from distseg.meta import PixelReweighter
from distseg.meta.estimators import LabelledImages, MeanLoss
from distseg.methods.part import Weighed, Weighting
from distseg.optim.schedules import learning_rate
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
LAGS = (1, 3, 7)
WAYS = {
    "noisy labels": ["method.name=noisy_only"],
    "exact": ["method.name=pixel_reweight"],
    "head": ["method.name=pixel_reweight", "method.estimator=head"],
    "bf16": ["method.name=pixel_reweight", "method.meta_precision=bf16"],
}
"""The runs that are scored, by the keys that they set."""


class Beside(Weighting):
    """Weighs exactly, and every `every` steps by the other ways too; what they gave is added to `found`."""

    def __init__(self, trainer: Trainer, every: int, found: list[dict[str, Any]]) -> None:
        model = trainer.method.weighting.reweighter.model
        self.exact = PixelReweighter(model)
        self.gradients: deque[MeanLoss] = deque(maxlen=max(LAGS) + 1)
        self.others = {
            "head": PixelReweighter(model, estimator="head"),
            "bf16": PixelReweighter(model, precision="bf16"),
        }
        self.lagging = PixelReweighter(model)
        self.every, self.step, self.found = every, 0, found

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None,
    ) -> Weighed:
        self.gradients.appendleft(self.exact.clean_loss(clean))
        maps = self.exact.weigh_along(self.gradients[0], noisy, true_masks)
        self.step += 1
        if self.step % self.every == 0 and true_masks is not None:
            exact = maps[0].full(noisy[0][1])
            self._note("exact", self.exact, exact, exact)
            for name, reweighter in self.others.items():
                [own] = reweighter.weigh(noisy, clean, true_masks)
                self._note(name, reweighter, own.full(noisy[0][1]), exact)
            for lag in LAGS:
                [own] = self.lagging.weigh_along(self.gradients[lag], noisy, true_masks)
                self._note(f"g of {lag} steps ago", self.lagging, own.full(noisy[0][1]), exact)
        return Weighed(maps, self.exact.diagnostics)

    def _note(self, way: str, reweighter: PixelReweighter, own: Tensor, exact: Tensor) -> None:
        numbers = {name: reweighter.diagnostics[name].item() for name in ("auroc", "wrong_mass", "noise_rate")}
        self.found.append(
            {"way": way, "step": self.step, **numbers, "difference": ((own - exact).abs().sum() / 2).item()}
        )


def trained(
    arguments: argparse.Namespace, runtime: Runtime, seed: int, keys: list[str], watch: Callable[[Trainer], None]
) -> float:
    """Test Dice of a run; `watch` may exchange parts of it before it starts."""
    config = load_config(
        ROOT / "configs" / "isic2017.yaml",
        [
            *(f"data.root={arguments.data}", f"seed={seed}", "train.epochs=null", f"train.steps={arguments.steps}"),
            *("tracking.mlflow=false", "data.pipeline=torch", *arguments.set, *keys),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), runtime)
        watch(trainer)
        for step in range(trainer.steps):
            diagnose = (step + 1) % arguments.every == 0
            train_step(trainer.engine, trainer.method, step, learning_rate(config.optim, step, trainer.steps), diagnose)
        counts, _ = trainer.score(trainer.splits.test, own=False)
        trainer.close()
    return summarise(counts, "test", class_names=config.data.class_names)["test/dice"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    runtime = start_runtime()
    along: list[dict[str, Any]] = []

    def beside(trainer: Trainer) -> None:
        weighting = Beside(trainer, arguments.every, along)
        trainer.method = dataclasses.replace(trainer.method, weighting=weighting)

    dice: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in arguments.seeds:
        for way, keys in WAYS.items():
            watch = beside if way == "exact" and seed == arguments.seeds[0] else lambda trainer: None
            dice[way].append(trained(arguments, runtime, seed, keys, watch))
            print(f"seed {seed}, {way}: test Dice {dice[way][-1]:.3f}", file=sys.stderr, flush=True)
    stop_runtime()
    setting = {name: getattr(arguments, name) for name in ("steps", "every", "seeds", "threads", "set")}
    return {"machine": describe_machine("cpu"), "setting": setting, "along": along, "dice": dice}


def show(result: dict[str, Any]) -> str:
    """Means over thirds of the run, then Dice by seed."""
    setting, along = result["setting"], result["along"]
    thirds = list(itertools.pairwise(setting["steps"] * third / 3 for third in range(4)))
    head = "".join(f"  steps {low:.0f}–{high:.0f}".ljust(26) for low, high in thirds)
    lines = [
        f"{result['machine']['device']}, torch {result['machine']['torch']}, {result['machine']['date']}; "
        f"{setting['steps']} steps",
        f"{'':18s}{head}",
        f"{'weights':18s}" + "  AUROC  wrong  difference" * 3,
    ]
    for way in dict.fromkeys(row["way"] for row in along):
        line = f"{way:18s}"
        for low, high in thirds:
            rows = [row for row in along if row["way"] == way and low < row["step"] <= high]
            means = [statistics.fmean(row[name] for row in rows) for name in ("auroc", "wrong_mass", "difference")]
            line += "  {:5.3f}  {:5.3f}  {:10.3f}".format(*means)
        lines.append(line)
    lines += ["", f"test Dice, seeds {', '.join(map(str, setting['seeds']))}"]
    lines += [f"{way:18s}" + "".join(f"  {value:.3f}" for value in values) for way, values in result["dice"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with manifest.csv")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=15, help="steps between comparisons, at least 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="keys of the config")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
