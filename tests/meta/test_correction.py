"""Corrected labels by Bayes' rule written out pixel by pixel, and on annotators whose errors are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.meta.correction import corrected, expected_counts

IGNORE = 255


def case(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    logits = 2 * torch.randn(3, channels, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, max(channels, 2), (3, 5, 7), generator=generator, dtype=torch.uint8)
    masks[0, 0] = IGNORE
    return logits, masks


def expectation(z: np.ndarray) -> np.ndarray:
    z = np.concatenate([[0.0], z]) if len(z) == 1 else z
    return np.exp(z) / np.exp(z).sum()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_counts_and_labels_by_their_formula(channels: int) -> None:
    logits, masks = case(channels)
    classes = max(channels, 2)
    counts = np.zeros((classes, classes))
    for b, h, w in np.ndindex(*masks.shape):
        if masks[b, h, w] != IGNORE:
            counts[:, masks[b, h, w]] += expectation(logits[b, :, h, w].numpy())
    actual = expected_counts(logits, masks)
    np.testing.assert_allclose(actual, counts, rtol=1e-12)

    errors = torch.rand(classes, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 10
    transition = errors.numpy() / errors.numpy().sum(1, keepdims=True)
    labels = corrected(logits, masks, errors)
    assert labels.dtype == masks.dtype
    changed = 0
    for b, h, w in np.ndindex(*masks.shape):
        drawn = masks[b, h, w].item()
        expected = IGNORE
        if drawn != IGNORE:
            expected = np.argmax(expectation(logits[b, :, h, w].numpy()) * transition[:, drawn])
            changed += expected != drawn
        assert labels[b, h, w].item() == expected
    assert 0 < changed < masks.numel()


def test_annotators_without_errors_are_believed() -> None:
    logits, masks = case(3)
    assert torch.equal(corrected(logits, masks, torch.eye(3, dtype=torch.float64)), masks)


def test_annotators_who_draw_at_random_are_not() -> None:
    logits, masks = case(3)
    expected = torch.where(masks == IGNORE, IGNORE, logits.argmax(1))
    assert torch.equal(corrected(logits, masks, torch.ones(3, 3, dtype=torch.float64)).long(), expected)


def test_nan_at_ignored_pixels_does_not_leak() -> None:
    logits, masks = case(1)
    counts = expected_counts(logits, masks)
    labels = corrected(logits, masks, counts)
    logits[0, :, 0] = torch.nan
    assert torch.equal(expected_counts(logits, masks), counts)
    assert torch.equal(corrected(logits, masks, counts), labels)


def test_a_network_that_knows_finds_how_annotators_err_and_mends_it() -> None:
    """Three of five lesion pixels are missed, and nothing else is lesion. The network is sure of nine in ten pixels."""
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(8, 40, 40, generator=generator) < 0.3).to(torch.uint8)
    drawn = truth * (torch.rand(truth.shape, generator=generator) < 0.4)
    unsure = torch.rand(truth.shape, generator=generator) < 0.1
    logits = torch.where(unsure, -0.5, torch.where(truth == 1, 6.0, -6.0))[:, None].double()
    counts = expected_counts(logits, drawn)
    transition = counts / counts.sum(1, keepdim=True)
    assert transition[1, 1].item() == pytest.approx(0.4, abs=0.05) and transition[0, 1].item() < 0.05
    left = (corrected(logits, drawn, counts) != truth).double().mean().item()
    by_network_alone = ((logits[:, 0] > 0) != truth).double().mean().item()
    assert left < by_network_alone < (drawn != truth).double().mean().item()
