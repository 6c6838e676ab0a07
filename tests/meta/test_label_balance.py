"""The factors of the labels, against the rule written out in numpy, and what becomes of them in the weights."""

import math

import numpy as np
import pytest
import torch
from oracle import IGNORE, pixelwise_alignment
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.meta.estimators import one_process
from distseg.meta.label_balance import LARGEST_RATIO, LabelBalance

RATE = 0.3


def labelled(count: int, seed: int, classes: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 6, 5, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (count, 6, 5), generator=generator, dtype=torch.uint8)
    masks[0, :2] = IGNORE
    return images, masks


def moved(a: np.ndarray, alignment: np.ndarray, masks: np.ndarray, rate: float) -> np.ndarray:
    present = [c for c in range(len(a)) if (masks == c).any()]
    mean = {c: alignment[masks == c].mean() for c in present}
    scale = sum(abs(value) for value in mean.values())
    middle = sum(mean.values()) / len(present)
    out = a.copy()
    for c in present:
        out[c] += rate * (mean[c] - middle) / scale
    return np.clip(out, -math.log(LARGEST_RATIO) / 2, math.log(LARGEST_RATIO) / 2)


@pytest.mark.parametrize("transform", ["clamp", "root", "sign", "flat"])
@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_by_the_rule(channels: int, estimator: str, transform: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, channels, 1).double()
    reweighter = PixelReweighter(model, estimator=estimator, transform=transform, label_rate=RATE)
    classes = max(2, channels)
    a = np.zeros(classes)
    for step in range(4):
        (images, masks), clean = labelled(3, step, classes), labelled(2, 100 + step, classes)
        alignment, _ = pixelwise_alignment(model, (images, masks), clean)
        labels = masks.numpy()
        a = moved(a, alignment, labels, RATE)
        positive = np.maximum(alignment, 0)
        scores = {"clamp": positive, "root": np.sqrt(positive), "sign": positive > 0, "flat": np.ones_like(positive)}
        expected = np.where(labels == IGNORE, 0, scores[transform] * np.exp(a)[np.where(labels == IGNORE, 0, labels)])
        actual = reweighter(images, masks, *clean).numpy()
        tolerance = 1e-6 if estimator == "finite" else 1e-10
        np.testing.assert_allclose(actual, expected / expected.sum(), rtol=tolerance, atol=tolerance * 1e-2)
        np.testing.assert_allclose(reweighter.label_balance.log_factors[:classes], a, rtol=tolerance)
        assert (reweighter.label_balance.log_factors[classes:] == 0).all()
        assert reweighter.diagnostics["label_ratio"].item() == pytest.approx(math.exp(a[1] - a[0]), rel=1e-5)
    assert len(np.unique(a)) == classes


def test_the_ratio_of_two_labels_is_bounded() -> None:
    balance = LabelBalance(rate=1.0)
    masks = torch.tensor([[[0, 1]]])
    for _ in range(20):
        balance.update([torch.tensor([[[-1.0, 1.0]]])], [masks], one_process)
    background, lesion = balance.factors(masks).flatten().tolist()
    assert lesion / background == pytest.approx(LARGEST_RATIO)
    for _ in range(20):
        balance.update([torch.tensor([[[1.0, -1.0]]])], [masks], one_process)
    background, lesion = balance.factors(masks).flatten().tolist()
    assert background / lesion == pytest.approx(LARGEST_RATIO)


@pytest.mark.parametrize(
    ("alignment", "labels"),
    [
        ([0.0, 0.0], [0, 1]),
        ([1.0, math.nan], [0, 1]),
        ([1.0, 2.0], [1, 1]),  # one label has nothing to be weighed against
        ([1.0, 2.0], [IGNORE, IGNORE]),
    ],
)
def test_a_step_that_says_nothing_moves_nothing(alignment: list[float], labels: list[int]) -> None:
    balance = LabelBalance(RATE)
    balance.update([torch.tensor([[[-1.0, 3.0]]])], [torch.tensor([[[0, 1]]])], one_process)
    before = balance.log_factors.clone()
    assert before[1] > before[0]
    balance.update([torch.tensor([[alignment]])], [torch.tensor([[labels]])], one_process)
    assert torch.equal(balance.log_factors, before)


def test_micro_batches_are_one_batch() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 1, 1).double()
    (images, masks), clean = labelled(4, 1), labelled(2, 2)
    whole, parts = (PixelReweighter(model, transform="flat", label_rate=RATE) for _ in range(2))
    whole.weigh([(images, masks)], [clean])
    parts.weigh([(images[:1], masks[:1]), (images[1:], masks[1:])], [clean])
    torch.testing.assert_close(parts.label_balance.log_factors, whole.label_balance.log_factors, rtol=1e-12, atol=0)


def test_masks_that_miss_most_of_the_lesion_make_its_label_count_more() -> None:
    """The lesion is where the first channel is positive; the noisy masks miss three of five of its pixels."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 1, 1).double()
    images, clean_images = (torch.randn(8, 3, 16, 16, dtype=torch.float64) for _ in range(2))
    truth, clean_masks = ((x[:, 0] > 0).to(torch.uint8) for x in (images, clean_images))
    noisy = truth * (torch.rand(truth.shape) < 0.4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    reweighter = PixelReweighter(model, transform="flat", label_rate=0.1)
    for _ in range(100):
        weights = reweighter(images, noisy, clean_images, clean_masks)
        optimizer.zero_grad()
        weighted_loss(model(images), noisy, weights).backward()
        optimizer.step()
    background, lesion, *_ = reweighter.label_balance.log_factors.tolist()
    assert lesion > background + 0.5
    right = ((model(images)[:, 0] > 0) == truth).double().mean()
    assert (noisy == truth).double().mean() < 0.75 < 0.9 < right


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rate -1"):
        LabelBalance(-1)
