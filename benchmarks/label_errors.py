"""What held-out clean images say of the annotators, and what correction would do to the labels, as training goes on.

    python benchmarks/label_errors.py --config configs/isic2017.yaml --step 120 --step 400 data.root=PATH …

Trains `noisy_only` by the config and stops at the steps given. There it calibrates the network on the K clean images,
none of which it has seen, and prints, of all noisy images without augmentation: wrong pixels as drawn, by the
calibrated network alone, corrected with counts from calibrated probabilities, and with counts from the posterior (ten
rounds); and the gain of the calibration's shift on the clean images with its standard error, by which
label_correction decides. The truth of the noisy images serves the first four figures alone.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distseg.config.load import load_config
from distseg.data.sample import Sample
from distseg.data.streams import Stream
from distseg.labels.annotators import log_likelihood
from distseg.labels.calibration import (
    calibration_sums,
    gain_sums,
    identity,
    newton_step,
    relative_gain,
    relative_logits,
)
from distseg.labels.distances import bin_count, signed_distance_bins
from distseg.ops import correct_labels
from distseg.optim.schedules import learning_rate
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

CLASSES = 2
ROUNDS = 10
COLUMNS = ("drawn", "network", "counted", "posterior", "gain", "its error", "scale", "shift")


def figures(noisy: tuple[Tensor, Tensor, Tensor], clean: tuple[Tensor, Tensor]) -> Tensor:
    """(8,) float64, COLUMNS; noisy: relative logits, drawn and true masks, clean: relative logits and masks."""
    theta, without = identity(CLASSES, noisy[0].device), identity(CLASSES, noisy[0].device)
    for _ in range(30):
        theta = newton_step(theta, calibration_sums(*clean, theta))
        without = newton_step(without, calibration_sums(*clean, without), shifts=False)
    gain, error = relative_gain(gain_sums(*clean, theta, without), len(clean[1]))

    relative, drawn, truth = noisy
    bins, one = signed_distance_bins(drawn, CLASSES)[:, None], torch.zeros(len(drawn), 1, dtype=torch.int64)

    def corrected(table: Tensor) -> tuple[Tensor, Tensor]:
        labels, counts = correct_labels(relative, drawn, bins, one.to(drawn.device), table[None], theta)
        return labels, counts[0]

    by_network, counts = corrected(theta.new_zeros(CLASSES, bin_count(CLASSES)))
    counted, _ = corrected(log_likelihood(counts))
    for _ in range(ROUNDS):
        posterior, counts = corrected(log_likelihood(counts))
    labels = (drawn, by_network, counted, posterior)
    wrong = [100 * (each != truth).double().mean() for each in labels]
    return torch.stack([*wrong, gain, error, *theta])


def measure(runtime, config_file: str, overrides: list[str], steps: list[int]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(Path(config_file), [*overrides, "method.name=noisy_only", "name=label_errors"])
        plain = config.data.model_copy(update={"augment": type(config.data.augment)()})
        trainer = Trainer(config, Path(folder), runtime)

        def seen(samples: Sequence[Sample], labels: str) -> tuple[Tensor, Tensor, Tensor]:
            stream = Stream(samples, labels, labels, plain, 0, runtime.shard, 1, 1, runtime.device)
            batches = [stream.batch(index, 0) for index in range(len(samples))]
            stream.close()
            with torch.no_grad():
                logits = torch.cat([trainer.model(batch.images) for batch in batches])
            masks, truth = (torch.cat([getattr(b, name) for b in batches]) for name in ("masks", "true_masks"))
            return relative_logits(logits), masks, truth

        found = {}
        for index in range(max(steps)):
            train_step(trainer.engine, trainer.method, index, learning_rate(config.optim, index, trainer.steps))
            if index + 1 in steps:
                clean = seen(trainer.splits.clean, "true")[:2]
                found[str(index + 1)] = figures(seen(trainer.splits.noisy, "noisy"), clean)
        trainer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, action="append", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    [found] = run_ranks(measure, 1, arguments.config, arguments.overrides, arguments.step, timeout=3600)
    print("| step |", " | ".join(COLUMNS), "|")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for step, row in found.items():
        print(f"| {step} |", " | ".join(f"{value:.2f}" for value in row.tolist()), "|")


if __name__ == "__main__":
    main()
