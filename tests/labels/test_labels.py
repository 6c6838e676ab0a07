"""Signed-distance bins by brute force, labels by Bayes' rule pixel by pixel, and annotators whose errors are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.labels.annotators import expected_counts, identity_prior, most_probable_labels
from distseg.labels.distances import BINS, EDGES, signed_distance_bins

IGNORE = 255
CPU = torch.device("cpu")


def case(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    logits = 2 * torch.randn(3, channels, 9, 12, generator=generator, dtype=torch.float64)
    masks = torch.zeros(3, 9, 12, dtype=torch.uint8)
    masks[0, 2:6, 3:8], masks[1, :4, :9], masks[1, 7, 10] = 1, 1, 1
    masks[0, 0] = IGNORE
    return logits, masks


def probability(z: np.ndarray) -> float:
    return 1 / (1 + np.exp(z[0] - z[1] if len(z) == 2 else -z[0]))


def test_bins_are_of_the_distance_to_the_nearest_pixel_on_the_other_side() -> None:
    _, masks = case(1)
    bins = signed_distance_bins(masks)
    for mask, found in zip(masks.numpy() == 1, bins, strict=True):
        for place in np.ndindex(*mask.shape):
            others = np.argwhere(mask != mask[place])
            expected = 0
            if len(others):
                distance = (np.linalg.norm(others - place, axis=1).min() - 0.5) / np.sqrt(mask.sum())
                expected = np.searchsorted(EDGES, distance if mask[place] else -distance)
            assert found[place] == expected
    assert bins.min() == 0 and bins[0].unique().numel() > 8


def test_a_mask_that_is_all_lesion_lies_farthest_inside() -> None:
    assert (signed_distance_bins(torch.ones(1, 6, 6, dtype=torch.uint8)) == BINS - 1).all()


def test_bins_do_not_depend_on_the_resolution() -> None:
    """Pixel centres of a finer grid are nearer to the contour, so not all of them keep their bin."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:30, 8:28] = 1
    finer = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)
    kept = signed_distance_bins(finer)[:, 1::3, 1::3] == signed_distance_bins(mask)
    assert kept.double().mean() > 0.9


@pytest.mark.parametrize("channels", [1, 2])
def test_counts_and_labels_by_their_formula(channels: int) -> None:
    logits, masks = case(channels)
    bins = signed_distance_bins(masks)
    counts = np.zeros((2, BINS))
    for b, h, w in np.ndindex(*masks.shape):
        if masks[b, h, w] != IGNORE:
            p = probability(logits[b, :, h, w].numpy())
            counts[:, bins[b, h, w]] += 1 - p, p
    np.testing.assert_allclose(expected_counts(logits, masks, bins), counts, rtol=1e-12, atol=1e-12)

    errors = 1e4 * torch.rand(2, BINS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    likelihood = errors.numpy() / errors.numpy().sum(1, keepdims=True)
    labels = most_probable_labels(logits, masks, bins, errors)
    assert labels.dtype == masks.dtype
    changed = close = 0
    for b, h, w in np.ndindex(*masks.shape):
        expected = drawn = masks[b, h, w].item()
        if drawn != IGNORE:
            p = probability(logits[b, :, h, w].numpy())
            lesion, background = np.array([p, 1 - p]) * likelihood[::-1, bins[b, h, w]]
            if abs(np.log(lesion / background)) < 0.02:  # where the smoothing may decide
                close += 1
                continue
            expected = int(lesion > background)
            changed += expected != drawn
        assert labels[b, h, w].item() == expected
    assert 0 < changed < masks.numel() and close < 5


@pytest.mark.parametrize("channels", [1, 2])
def test_annotators_without_errors_are_believed(channels: int) -> None:
    logits, masks = case(channels)
    assert torch.equal(most_probable_labels(logits / 2, masks, signed_distance_bins(masks), identity_prior(CPU)), masks)


@pytest.mark.parametrize("seen", [1.0, 0.0])
def test_annotators_who_draw_at_random_are_not_and_bins_that_never_occurred_say_nothing(seen: float) -> None:
    logits, masks = case(1)
    counts = torch.full((2, BINS), seen, dtype=torch.float64)
    if not seen:
        counts[:, -1] = torch.tensor([3000.0, 500.0])  # elsewhere; there is no such bin in the masks
        masks[masks == 1] = 0
    expected = torch.where(masks == IGNORE, IGNORE, logits[:, 0] > 0)
    assert torch.equal(most_probable_labels(logits, masks, signed_distance_bins(masks), counts).long(), expected)


def test_nan_at_ignored_pixels_does_not_leak() -> None:
    logits, masks = case(1)
    bins = signed_distance_bins(masks)
    counts = expected_counts(logits, masks, bins)
    labels = most_probable_labels(logits, masks, bins, counts)
    logits[0, :, 0] = torch.nan
    assert torch.equal(expected_counts(logits, masks, bins), counts)
    assert torch.equal(most_probable_labels(logits, masks, bins, counts), labels)


def test_three_classes_are_refused() -> None:
    logits, masks = case(3)
    with pytest.raises(ValueError, match="3 classes"):
        most_probable_labels(logits, masks, signed_distance_bins(masks), identity_prior(CPU))


def test_annotators_who_miss_the_rim_are_found_out_and_their_masks_mended() -> None:
    """Discs of two sizes, drawn with 0.7 of their radius, and a network that knows nothing of a fifth of the pixels."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    distance = ((rows - 23.5) ** 2 + (columns - 23.5) ** 2).sqrt()
    radii = torch.tensor([8.0, 16.0] * 4)[:, None, None]
    truth, drawn = ((distance < factor * radii).to(torch.uint8) for factor in (1, 0.7))
    unsure = torch.rand(truth.shape, generator=generator) < 0.2
    logits = torch.where(unsure, -1.0, torch.where(truth == 1, 4.0, -4.0))[:, None]
    bins = signed_distance_bins(drawn)
    labels = most_probable_labels(logits, drawn, bins, expected_counts(logits, drawn, bins))
    left, by_network_alone = ((wrong != truth).double().mean().item() for wrong in (labels, (logits[:, 0] > 0)))
    assert left < 0.2 * by_network_alone < 0.2 * (drawn != truth).double().mean().item()
