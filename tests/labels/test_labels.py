"""Signed-distance bins by brute force, labels by Bayes' rule pixel by pixel, and annotators whose errors are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.labels.annotators import SMOOTHING, identity_prior, log_likelihood
from distseg.labels.distances import (
    INSIDE,
    INSIDE_EDGES,
    OUTSIDE,
    OUTSIDE_EDGES,
    bin_count,
    drawn_class,
    signed_distance_bins,
)
from distseg.ops import correct_labels

IGNORE = 255
CPU = torch.device("cpu")
EDGES = [*(-edge / 20 for edge in reversed(OUTSIDE_EDGES)), 0, *(edge / 20 for edge in INSIDE_EDGES)]


def corrected(logits: Tensor, masks: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Labels, and the counts of the posterior, under an annotator of the given counts; of the network alone if None."""
    classes = max(2, logits.shape[1])
    table = torch.zeros(classes, bin_count(classes)) if counts is None else log_likelihood(counts)
    theta = torch.tensor([1.0] + [0.0] * (classes - 1))
    bins, one = signed_distance_bins(masks, classes)[:, None], torch.zeros(len(masks), 1, dtype=torch.int64)
    labels, found = correct_labels(logits, masks, bins, one, table[None], theta)
    return labels, found[0]


def case(channels: int) -> tuple[Tensor, Tensor]:
    """Logits of 1, 2 or 3 channels, and masks of as many classes, two at least; the last mask is empty."""
    generator = torch.Generator().manual_seed(channels)
    logits = 2 * torch.randn(4, channels, 9, 12, generator=generator, dtype=torch.float64)
    masks = torch.zeros(4, 9, 12, dtype=torch.uint8)
    masks[0, 2:6, 3:8], masks[1, :4, :9], masks[1, 7, 10] = 1, 1, 1
    if channels == 3:
        masks[0, 4:8, 5:7], masks[2, 1:4, 2:9] = 2, 2
    masks[0, 0] = IGNORE
    return logits, masks


def probabilities(z: np.ndarray) -> np.ndarray:
    """(C,) of the logits (C,) of a pixel, or of the one of two classes."""
    z = np.array([0.0, z[0]]) if len(z) == 1 else z
    return np.exp(z) / np.exp(z).sum()


def expected_bin(mask: np.ndarray, place: tuple[int, ...], classes: int) -> int:
    if mask[place] == IGNORE:
        return IGNORE
    objects = (mask > 0) & (mask < classes)
    if not objects.any():
        return OUTSIDE + INSIDE * (classes - 1)
    own = mask == mask[place] if objects[place] else ~objects
    others = np.argwhere(~own)
    if not len(others):
        return OUTSIDE + INSIDE * int(mask[place]) - 1
    size = own.sum() if objects[place] else objects.sum()
    distance = (np.linalg.norm(others - place, axis=1).min() - 0.5) / np.sqrt(size)
    if not objects[place]:
        return int(np.searchsorted(EDGES, -distance))
    return int(np.searchsorted(EDGES, distance)) + INSIDE * (int(mask[place]) - 1)


@pytest.mark.parametrize("classes", [2, 3])
def test_bins_are_of_the_distance_to_the_nearest_pixel_on_the_other_side(classes: int) -> None:
    _, masks = case(classes)
    bins = signed_distance_bins(masks, classes)
    for mask, found in zip(masks.numpy(), bins, strict=True):
        for place in np.ndindex(*mask.shape):
            assert found[place] == expected_bin(mask, place, classes), place
    assert (bins[-1] == bin_count(classes) - 1).all() and bins[0].unique().numel() > 8
    valid = masks != IGNORE
    assert torch.equal(drawn_class(classes, CPU)[bins[valid].long()], masks[valid].long())


def test_a_mask_that_is_all_of_one_class_lies_farthest_inside() -> None:
    for classes, index in ((2, 1), (3, 1), (3, 2)):
        masks = torch.full((1, 6, 6), index, dtype=torch.uint8)
        assert (signed_distance_bins(masks, classes) == OUTSIDE + INSIDE * index - 1).all()


def test_bins_do_not_depend_on_the_resolution() -> None:
    """Pixel centres of a finer grid are nearer to the contour, so not all of them keep their bin."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, 10:30, 8:28] = 1
    finer = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)
    kept = signed_distance_bins(finer)[:, 1::3, 1::3] == signed_distance_bins(mask)
    assert kept.double().mean() > 0.9


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_counts_and_labels_by_their_formula(channels: int) -> None:
    logits, masks = case(channels)
    classes = max(channels, 2)
    bins = signed_distance_bins(masks, classes)
    counts = np.zeros((classes, bin_count(classes)))
    for b, h, w in np.ndindex(*masks.shape):
        if masks[b, h, w] != IGNORE:
            counts[:, bins[b, h, w]] += probabilities(logits[b, :, h, w].numpy())
    np.testing.assert_allclose(corrected(logits, masks)[1], counts, rtol=1e-12, atol=1e-12)

    generator = torch.Generator().manual_seed(1)
    errors = 1e4 * torch.rand(classes, bin_count(classes), dtype=torch.float64, generator=generator)
    smoothed = errors.numpy() + SMOOTHING * errors.numpy().sum(1, keepdims=True) / bin_count(classes)
    likelihood = smoothed / smoothed.sum(1, keepdims=True)
    labels, _ = corrected(logits, masks, errors)
    assert labels.dtype == masks.dtype
    changed = 0
    for b, h, w in np.ndindex(*masks.shape):
        expected = drawn = masks[b, h, w].item()
        if drawn != IGNORE:
            joint = probabilities(logits[b, :, h, w].numpy()) * likelihood[:, bins[b, h, w]]
            expected = int(joint.argmax())
            changed += expected != drawn
        assert labels[b, h, w].item() == expected
    assert 0 < changed < masks.numel()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_annotators_without_errors_are_believed(channels: int) -> None:
    logits, masks = case(channels)
    assert torch.equal(corrected(logits / 4, masks, identity_prior(max(channels, 2), CPU))[0], masks)


@pytest.mark.parametrize("seen", [1.0, 0.0])
def test_annotators_who_draw_at_random_are_not_and_bins_that_never_occurred_say_nothing(seen: float) -> None:
    logits, masks = case(1)
    counts = torch.full((2, bin_count(2)), seen, dtype=torch.float64)
    if not seen:
        counts[:, OUTSIDE + INSIDE - 1] = torch.tensor([3000.0, 500.0])  # there is no such bin in the masks
        masks[masks == 1] = 0
    expected = torch.where(masks == IGNORE, IGNORE, logits[:, 0] > 0)
    assert torch.equal(corrected(logits, masks, counts)[0].long(), expected)


def test_nan_at_ignored_pixels_does_not_leak() -> None:
    logits, masks = case(1)
    before = corrected(logits, masks)
    logits[0, :, 0] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(before, corrected(logits, masks), strict=True))


def test_annotators_who_miss_the_rim_are_found_out_and_their_masks_mended() -> None:
    """Discs of two sizes, drawn with 0.7 of their radius, and a network that knows nothing of a fifth of the pixels."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    distance = ((rows - 23.5) ** 2 + (columns - 23.5) ** 2).sqrt()
    radii = torch.tensor([8.0, 16.0] * 4)[:, None, None]
    truth, drawn = ((distance < factor * radii).to(torch.uint8) for factor in (1, 0.7))
    unsure = torch.rand(truth.shape, generator=generator) < 0.2
    logits = torch.where(unsure, -1.0, torch.where(truth == 1, 4.0, -4.0))[:, None]
    by_network, counts = corrected(logits, drawn)
    labels, _ = corrected(logits, drawn, counts)
    left, by_network_alone = ((wrong != truth).double().mean().item() for wrong in (labels, by_network))
    assert left < 0.2 * by_network_alone < 0.2 * (drawn != truth).double().mean().item()
