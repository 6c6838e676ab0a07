"""The formulas of the screen against autograd's double backward in float64, its baseline against the trainer's, and a
run of every variant."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

from distseg.config.load import load_config
from distseg.data.batch import Batch
from distseg.data.classes import IGNORE
from distseg.labels.annotators import log_likelihood
from distseg.labels.calibration import calibrated, relative_logits
from distseg.labels.distances import bin_count, signed_distance_bins
from distseg.meta import PixelReweighter
from distseg.ops import correct_labels
from distseg.optim.schedules import learning_rate
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import meta_gradients as screen  # noqa: E402

Parameters = dict[str, Tensor]
SMALL = [
    *("data.image_size=16", "model.width=4", "model.depth=1", "train.batch_size=4", "train.clean_batch_size=4"),
    *("data.clean_count=6", "train.validate_every=10"),
]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 1)).double()


def batch(seed: int, count: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 5, 7, dtype=torch.float64, generator=generator)
    masks, truth = torch.randint(2, (2, count, 5, 7), generator=generator).to(torch.uint8)
    masks[:, 0, :2] = IGNORE
    return Batch(images, masks, truth, ())


def held_out(clean: Batch) -> screen.HeldOutImages:
    return screen.HeldOutImages(clean.images, clean.true_masks, clean.masks, torch.arange(len(clean.masks)) % 10)


def cross_entropy(network: nn.Module, parameters: Parameters, images: Tensor, foreground: Tensor) -> Tensor:
    """(B, H, W), by torch alone."""
    z = functional_call(network, parameters, images)[:, 0]
    return F.binary_cross_entropy_with_logits(z, foreground.double(), reduction="none")


def after_step(
    network: nn.Module, clean: Batch, rate: float, inner: Callable[[Parameters], Tensor]
) -> tuple[Tensor, Parameters]:
    """The clean loss after an SGD step on inner(θ), with its graph; and the parameters there."""
    parameters = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    gradients = torch.autograd.grad(inner(parameters), list(parameters.values()), create_graph=True)
    ahead = {name: p - rate * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    return cross_entropy(network, ahead, clean.images, clean.true_masks).mean(), ahead


def tangents(network: nn.Module, gradient: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
    """z and ż (B, 1, H, W) at the network's own parameters."""
    own = {name: value.detach() for name, value in network.named_parameters()}
    return jvp(lambda parameters: functional_call(network, parameters, images), (own,), (gradient,))


def clean_gradient(network: nn.Module, clean: Batch, at: Parameters) -> Parameters:
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    loss = cross_entropy(network, leaves, clean.images, clean.true_masks).mean()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_weights_along_the_held_out_gradient_are_the_reweighters(network: nn.Module) -> None:
    noisy, clean = batch(0), batch(1)
    variant = screen.HeldOutGradient(SimpleNamespace(model=network), drawn_known=True)
    actual = variant.targets(screen.Seen(noisy, held_out(clean), None, 0.0)).weights
    expected = PixelReweighter(network)(noisy.images, noisy.masks, clean.images, clean.true_masks)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_weights_after_a_step_are_those_of_a_double_backward_through_it(network: nn.Module, share: float) -> None:
    noisy, clean, beside = batch(0), batch(1), batch(2)
    variant = screen.GradientAfterStep(SimpleNamespace(model=network), drawn_known=True)
    variant.length = torch.tensor(0.7, dtype=torch.float64)
    actual = variant.targets(screen.Seen(noisy, held_out(clean), beside if share else None, share)).weights

    valid, valid_beside = (each.masks != IGNORE for each in (noisy, beside))
    weights = (valid.double() / valid.sum()).requires_grad_()

    def inner(parameters: Parameters) -> Tensor:
        drawn = (weights * cross_entropy(network, parameters, noisy.images, noisy.masks == 1)).sum()
        learned = cross_entropy(network, parameters, beside.images, beside.masks == 1)[valid_beside].mean()
        return (1 - share) * drawn + share * learned

    own = dict(network.named_parameters())
    length = torch.cat([g.flatten() for g in torch.autograd.grad(inner(own), list(own.values()))]).norm()
    loss, _ = after_step(network, clean, 0.7 / length.item(), inner)
    positive = -torch.autograd.grad(loss, weights)[0].clamp(max=0) * valid
    torch.testing.assert_close(actual, positive / positive.sum(), rtol=1e-10, atol=1e-15)


def test_weights_of_both_labels_are_those_of_a_double_backward(network: nn.Module) -> None:
    noisy, clean, other = batch(0), batch(1), batch(2)
    corrected = torch.where(noisy.masks == IGNORE, noisy.masks, other.true_masks)
    valid = noisy.masks != IGNORE
    both = torch.zeros(2, *valid.shape, dtype=torch.float64, requires_grad=True)

    def inner(parameters: Parameters) -> Tensor:
        losses = [cross_entropy(network, parameters, noisy.images, labels == 1) for labels in (noisy.masks, corrected)]
        return (both * torch.stack(losses) * valid).sum()

    loss, _ = after_step(network, clean, 1.0, inner)
    positive = -torch.autograd.grad(loss, both)[0].clamp(max=0)
    alpha, beta = positive / positive.sum()

    gradient = clean_gradient(network, clean, dict(network.named_parameters()))
    logits, along = tangents(network, gradient, noisy.images)
    targets = screen.of_both_labels(logits.detach(), along.detach(), noisy.masks, corrected)
    torch.testing.assert_close(targets.weights, alpha + beta, rtol=1e-10, atol=1e-15)
    losses = [
        cross_entropy(network, dict(network.named_parameters()), noisy.images, m == 1) for m in (noisy.masks, corrected)
    ]
    torch.testing.assert_close(targets.loss(logits), (alpha * losses[0] + beta * losses[1]).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("of", ["gate", "table"])
def test_the_meta_loss_has_the_gradient_of_the_clean_loss_after_a_step(network: nn.Module, of: str) -> None:
    noisy, clean, rate = batch(0), batch(1), 0.9
    valid = noisy.masks != IGNORE
    weights = valid.double() / valid.sum()
    learned = torch.randn(
        2, bin_count(2), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    teacher = torch.rand(valid.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def foreground() -> Tensor:
        if of == "gate":
            kept = (noisy.images[:, 0] * learned[0, 0] + learned[1, 0]).sigmoid()
            return kept * (noisy.masks == 1) + (1 - kept) * teacher
        relative = relative_logits(noisy.images[:, :1])
        return screen.posterior(relative, learned, signed_distance_bins(noisy.masks))

    def inner(parameters: Parameters) -> Tensor:
        return (weights * cross_entropy(network, parameters, noisy.images, foreground())).sum()

    loss, ahead = after_step(network, clean, rate, inner)
    [expected] = torch.autograd.grad(loss, learned)
    _, along = tangents(network, clean_gradient(network, clean, ahead), noisy.images)
    [actual] = torch.autograd.grad(
        rate * screen.meta_loss(screen.Targets(weights, foreground()), along[:, 0].detach()), learned
    )
    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


def test_the_posterior_is_the_label_models() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 12, 13, generator=generator)
    masks = (torch.rand(3, 12, 13, generator=generator) > 0.6).to(torch.uint8)
    bins, theta = signed_distance_bins(masks), torch.tensor([0.8, 0.4])
    table = log_likelihood(torch.rand(2, bin_count(2), dtype=torch.float64, generator=generator))
    expected, _ = correct_labels(logits, masks, bins[:, None], torch.zeros(3, 1, dtype=torch.int64), table[None], theta)
    actual = screen.posterior(calibrated(relative_logits(logits), theta.double()), table.float(), bins) > 0.5
    torch.testing.assert_close(actual, expected == 1)


def disc(radius: float) -> np.ndarray:
    rows, columns = np.ogrid[-20:21, -20:21]
    return np.asarray(rows**2 + columns**2 <= radius**2)


@pytest.mark.parametrize(("predicted", "true"), [(8.2, 11.2), (11.2, 8.2), (9.2, 9.2)])
def test_a_contour_moves_by_the_distance_between_discs(predicted: float, true: float) -> None:
    shift = screen.contour_shift(disc(predicted), disc(true))
    assert shift == pytest.approx(true - predicted, abs=0.25)
    mended = screen.moved(disc(predicted), shift)
    assert (mended != disc(true)).sum() <= 0.1 * disc(true).sum()
    assert (mended != disc(true)).sum() <= (disc(predicted) != disc(true)).sum()


def test_a_mask_of_one_class_has_no_contour_and_stays() -> None:
    nothing = np.zeros((5, 5), bool)
    assert screen.contour_shift(nothing, disc(3)) is None
    for mask in (nothing, ~nothing):
        np.testing.assert_array_equal(screen.moved(mask, 2.0), mask)


@pytest.mark.parametrize(("epochs", "ended"), [(3, False), (4, False), (12, True)])
def test_early_learning_ends_where_the_curve_is_flat(epochs: int, ended: bool) -> None:
    t = np.arange(1.0, epochs + 1)
    ious = 0.8 * (1 - np.exp(-(t**0.9) / 3))  # its slope at 4 is 0.41 of that at 1, and at 12 it is 0.04
    assert screen.early_learning_ended(list(ious)) is ended


def test_predictions_are_averaged_over_three_sizes() -> None:
    sides: list[int] = []

    def by_size(images: Tensor) -> Tensor:
        sides.append(images.shape[-1])
        return torch.full_like(images[:, :1], {32: -1.0, 48: 0.0, 72: 2.0}[images.shape[-1]])

    p = screen.over_scales(by_size, torch.zeros(2, 3, 48, 48), multiple=8)
    assert sides == [32, 48, 72] and p.shape == (2, 48, 48)
    expected = torch.tensor([-1.0, 0.0, 2.0]).sigmoid().mean()
    torch.testing.assert_close(p, expected.expand_as(p))


def both_baselines(runtime, data: str) -> dict[str, Tensor]:
    found = {}
    for name, keys in (("screen", []), ("preset", ["method.labels=drawn"])):
        # Adam would make steps of rounding where a gradient is zero, as those of biases before a normalisation are.
        every = [f"data.root={data}", "train.steps=20", *screen.BUDGET, *SMALL, *keys, "optim.name=sgd", "optim.lr=0.1"]
        config = load_config(ROOT / "configs" / "isic2017.yaml", every)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(config, Path(folder), runtime)
            method = screen.Screen(trainer, screen.Variant) if name == "screen" else trainer.method
            for index in range(20):
                train_step(trainer.engine, method, index, learning_rate(config.optim, index, 20))
            trainer.close()
        found[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return found


@pytest.mark.slow
def test_the_baseline_is_the_preset_with_labels_as_drawn(drawn_data: Path) -> None:
    [found] = run_ranks(both_baselines, 1, str(drawn_data))
    torch.testing.assert_close(found["screen"], found["preset"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_variant_runs_and_a_second_call_has_nothing_to_do(drawn_data: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/meta_gradients.py", str(drawn_data), "--steps", "20", "--seeds", "0", "1"]
    command += ["--json", str(figures), "--set", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["seed"], row["variant"]) for row in rows] == [
        (seed, name) for seed in (0, 1) for name in screen.VARIANTS
    ]
    assert all(0 < row[key] <= 1 for row in rows for key in ("val_dice", "best_val_dice", "test_dice"))
    assert all(row["best_val_dice"] >= row["val_dice"] for row in rows)
    of_seed_0 = {row["variant"]: row for row in rows if row["seed"] == 0}
    assert len({row["wrong_drawn"] for row in of_seed_0.values()}) == 1, "all variants see the same noisy images"
    assert of_seed_0["uniform"]["wrong_weight"] == pytest.approx(of_seed_0["uniform"]["wrong_drawn"])
    assert len({row["val_dice"] for row in of_seed_0.values()}) > 5, "variants differ"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.stdout == done.stdout and "mean of 2" in done.stdout
