"""What held-out clean images say of the annotators, and what correction would do to the labels, as training goes on.

    python benchmarks/label_errors.py --config configs/isic2017.yaml --step 120 --step 400 data.root=PATH …

Trains `noisy_only` by the config and stops at the steps given. There it calibrates the network on the K clean images,
none of which it has seen, and prints, of all noisy images without augmentation: wrong pixels in per cent as drawn, by
the calibrated network alone, corrected with counts from calibrated probabilities, with counts from the posterior (ten
rounds), and with these but for images that would lose their object, as in training. Of the last two it prints the worst
ratio of wrong pixels to those drawn wrong in 2000 batches of 16 images, and how many batches are above 1.02, in per
cent; then what the calibration's shift does to the Dice of the network's masks of the clean images, with its standard
error, by which label_correction decides.

A second table has the choice between distances in sizes of the objects and of the frame: the mean Dice of the labels
as drawn and corrected by either, as in training; and the power by which labelled areas grow with those that the network
expects, of the clean images' references with its standard error, and of either's labels.

Where images have several annotations there is a third table: wrong pixels as drawn, of the vote, of STAPLE, of all
annotators' distances as if they were independent, and of the posterior that data.annotators=all fits on the clean
images (ten rounds); what that adds to the Dice of the vote there and its error; and a, τ, b. The truth of the noisy
images serves the figures of errors alone.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distseg.config.load import load_config
from distseg.data.annotators import Annotators, staple, vote
from distseg.data.batch import EveryAnnotation
from distseg.data.sample import Sample
from distseg.data.streams import Stream
from distseg.labels.annotators import log_likelihood
from distseg.labels.areas import area_sums, slope
from distseg.labels.calibration import (
    calibrated,
    calibration_sums,
    dice_gain_sums,
    identity,
    joint_newton_step,
    mean_gain,
    newton_step,
    relative_logits,
)
from distseg.labels.combination import annotation_counts, annotator_scores, reliability
from distseg.labels.distances import bin_count, signed_distance_bins
from distseg.methods.labels.corrected import loses_object
from distseg.ops import correct_labels
from distseg.optim.schedules import learning_rate
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

CLASSES = 2
ROUNDS = 10
COLUMNS = (
    *("drawn", "network", "counted", "posterior", "guarded"),
    *("worst", "above 1.02", "worst guarded", "above 1.02 guarded"),
    *("gain", "its error", "scale", "shift"),
)
OF_SCALES = ("Dice, drawn", "by object", "by frame", "power", "its error", "by object", "by frame")
OF_ANNOTATORS = ("drawn", "vote", "STAPLE", "by distance", "joint", "gain", "its error", "scale", "exponent", "shift")


class Seen(NamedTuple):
    """Images without augmentation: relative logits, drawn and true masks, and every annotation if asked for."""

    relative: Tensor
    drawn: Tensor
    truth: Tensor
    every: EveryAnnotation | None


def figures(noisy: Seen, clean: tuple[Tensor, Tensor]) -> Tensor:
    """(13,) float64, COLUMNS; clean: relative logits and masks."""
    theta = identity(CLASSES, noisy[0].device)
    for _ in range(30):
        theta = newton_step(theta, calibration_sums(*clean, theta))
    own, shifted = clean[0].argmax(1), calibrated(clean[0], theta).argmax(1)
    gain, error = mean_gain(dice_gain_sums(shifted, own, clean[1], CLASSES), len(clean[1]))

    relative, drawn, truth, _ = noisy
    bins, one = signed_distance_bins(drawn, CLASSES)[:, None], torch.zeros(len(drawn), 1, dtype=torch.int64)

    def corrected(table: Tensor) -> tuple[Tensor, Tensor]:
        labels, counts = correct_labels(relative, drawn, bins, one.to(drawn.device), table[None], theta)
        return labels, counts[0]

    by_network, counts = corrected(theta.new_zeros(CLASSES, bin_count(CLASSES)))
    counted, _ = corrected(log_likelihood(counts))
    for _ in range(ROUNDS):
        posterior, counts = corrected(log_likelihood(counts))
    guarded = torch.where(loses_object(drawn, posterior), drawn, posterior)
    labels = (drawn, by_network, counted, posterior, guarded)
    wrong = [100 * (each != truth).double().mean((1, 2)) for each in labels]
    batches = torch.randint(len(drawn), (2000, 16), generator=torch.Generator().manual_seed(0))
    ratios = [each[batches].sum(1) / wrong[0][batches].sum(1) for each in wrong[3:]]
    worst = [value for each in ratios for value in (each.max(), 100 * (each > 1.02).double().mean())]
    return torch.stack([*(each.mean() for each in wrong), *worst, gain, error, *theta])


def figures_of_scales(noisy: Seen, clean: tuple[Tensor, Tensor]) -> Tensor:
    """(7,) float64, OF_SCALES."""
    relative, drawn, truth, _ = noisy
    theta = identity(CLASSES, truth.device)
    for _ in range(30):
        theta = newton_step(theta, calibration_sums(*clean, theta))
    one = torch.zeros(len(drawn), 1, dtype=torch.int64)
    candidates = []
    for of_frame in (False, True):
        bins = signed_distance_bins(drawn, CLASSES, of_frame)[:, None]
        table = theta.new_zeros(1, CLASSES, bin_count(CLASSES))
        for _ in range(ROUNDS + 1):
            labels, counts = correct_labels(relative, drawn, bins, one, table, theta)
            table = log_likelihood(counts)
        candidates.append(torch.where(loses_object(drawn, labels), drawn, labels))
    dice = [mean_gain(dice_gain_sums(each, 0 * drawn, truth, CLASSES), 2)[0] for each in (drawn, *candidates)]
    grown = slope(area_sums(clean[0], theta, clean[1]), len(clean[1]))
    return torch.stack([*dice, *grown, *(slope(area_sums(relative, theta, each), 3)[0] for each in candidates)])


def figures_of_annotators(noisy: Seen, clean: Seen, count: int) -> Tensor:
    """(10,) float64, OF_ANNOTATORS."""
    relative, _, truth, every = noisy
    assert every is not None and clean.every is not None
    votes = vote(every.masks, CLASSES)
    known = (every.annotators >= 0)[:, :, None, None]
    drawn = ((every.masks != truth[:, None]) & known).sum() / known.expand_as(every.masks).sum()
    own = [masks[who >= 0].numpy() for masks, who in zip(*every, strict=True)]
    fused = torch.stack([torch.as_tensor(staple(masks)) for masks in own])

    alone, theta = identity(CLASSES, truth.device), identity(CLASSES + 1, truth.device)
    for _ in range(30):
        alone = newton_step(alone, calibration_sums(clean.relative, clean.truth, alone))
    flat = every.masks.flatten(0, 1)
    bins = torch.where(flat == 255, 255, signed_distance_bins(torch.where(flat == 255, 0, flat), CLASSES)).view_as(
        every.masks
    )
    certain = 50.0 * torch.nn.functional.one_hot(votes.long(), CLASSES).movedim(-1, 1)
    silent = theta.new_zeros(1, CLASSES, bin_count(CLASSES))
    pooled = torch.where(every.annotators < 0, -1, 0)
    counts = correct_labels(certain, votes, bins, pooled, silent, identity(CLASSES, truth.device))[1]
    by_distance = correct_labels(relative, votes, bins, pooled, log_likelihood(counts), alone)[0]

    annotations = annotation_counts(every.annotators, count)
    counts = torch.eye(CLASSES, dtype=torch.float64).repeat(count, 1, 1) * annotations[:, None, None]
    for _ in range(ROUNDS):
        tables = reliability(counts, annotations, pooled=False)
        scores = annotator_scores(*clean.every, tables, clean.relative.dtype)
        for _ in range(30):
            theta = joint_newton_step(theta, calibration_sums(clean.relative, clean.truth, theta, scores))
        calibration = torch.cat([theta[:1], theta[2:]])
        joint, counts = correct_labels(relative, votes, *every, theta[1] * tables, calibration)
    both = (calibrated(clean.relative, calibration) + theta[1] * scores).argmax(1)
    sums = dice_gain_sums(both, vote(clean.every.masks, CLASSES), clean.truth, CLASSES)
    gain = mean_gain(sums, len(clean.truth))
    wrong = [100 * (each != truth).double().mean() for each in (votes, fused, by_distance, joint)]
    return torch.stack([100 * drawn.double(), *wrong, *gain, *theta])


def measure(runtime, config_file: str, overrides: list[str], steps: list[int]) -> dict[str, Tensor]:
    """Rows of the tables, by "first STEP", "second STEP" and "third STEP"."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(Path(config_file), [*overrides, "method.name=noisy_only", "name=label_errors"])
        plain = config.data.model_copy(update={"augment": type(config.data.augment)()})
        trainer = Trainer(config, Path(folder), runtime)

        annotators = Annotators.of(trainer.splits.noisy, trainer.splits.clean)

        def seen(samples: Sequence[Sample], labels: str, annotators: Annotators | None = None) -> Seen:
            stream = Stream(samples, labels, labels, plain, 0, runtime.shard, 1, 1, runtime.device, annotators)
            batches = [stream.batch(index, 0) for index in range(len(samples))]
            stream.close()
            with torch.no_grad():
                logits = torch.cat([trainer.model(batch.images) for batch in batches])
            masks, truth = (torch.cat([getattr(b, name) for b in batches]) for name in ("masks", "true_masks"))
            every = [batch.every for batch in batches if batch.every is not None]
            joined = EveryAnnotation(*(torch.cat(each) for each in zip(*every, strict=True))) if every else None
            return Seen(relative_logits(logits), masks, truth, joined)

        found = {}
        for index in range(max(steps)):
            train_step(trainer.engine, trainer.method, index, learning_rate(config.optim, index, trainer.steps))
            if index + 1 in steps:
                clean = seen(trainer.splits.clean, "true")
                noisy = seen(trainer.splits.noisy, "noisy")
                found[f"first {index + 1}"] = figures(noisy, (clean.relative, clean.truth))
                found[f"second {index + 1}"] = figures_of_scales(noisy, (clean.relative, clean.truth))
                if annotators.most > 1:
                    noisy = seen(trainer.splits.noisy, "noisy", annotators)
                    clean = seen(trainer.splits.clean, "true", annotators)
                    found[f"third {index + 1}"] = figures_of_annotators(noisy, clean, len(annotators.names))
        trainer.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, action="append", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    [found] = run_ranks(measure, 1, arguments.config, arguments.overrides, arguments.step, timeout=3600)
    for table, columns in (("first", COLUMNS), ("second", OF_SCALES), ("third", OF_ANNOTATORS)):
        rows = {name.split()[1]: row for name, row in found.items() if name.startswith(table)}
        if rows:
            print("\n| step |", " | ".join(columns), "|")
            print("|---" * (1 + len(columns)) + "|")
        for step, row in rows.items():
            print(f"| {step} |", " | ".join(f"{value:.2f}" for value in row.tolist()), "|")


if __name__ == "__main__":
    main()
