"""How good a mask is: against counting all truths by hand, and against what is known of discs."""

import itertools

import numpy as np
import pytest
import torch

from distseg.data.agreement import dice
from distseg.labels.quality import LEVELS, drawn_probability, expected_dice, softmin_score


def two_classes(lesion: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - lesion, lesion])


def test_expected_dice_is_the_mean_over_level_sets() -> None:
    rng = np.random.default_rng(0)
    for classes in (2, 3, 4):
        p = torch.from_numpy(rng.dirichlet(np.ones(classes), (7, 5))).permute(2, 0, 1)
        mask = rng.integers(0, classes, (7, 5)).astype(np.uint8)
        mask[0, :2] = 255
        found = []
        for level in range(LEVELS):
            u = (level + 0.5) / LEVELS
            truth = np.zeros_like(mask)
            for row, column in itertools.product(range(7), range(5)):
                low = 0.0
                for label in (*range(1, classes), 0):
                    low += p[label, row, column].item()
                    if u < low:
                        truth[row, column] = label
                        break
            found.append(dice(mask, np.where(mask == 255, 255, truth).astype(np.uint8)))
        assert expected_dice(p, torch.from_numpy(mask)) == pytest.approx(np.mean(found), abs=1e-12)


def test_an_object_that_may_not_be_there_is_not_one_of_half_the_size() -> None:
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[5:15, 5:15] = 1
    p = two_classes(0.5 * mask.double())
    assert expected_dice(p, mask) == pytest.approx(0.5)  # 1 where it is there, 0 where not
    assert expected_dice(p, torch.zeros_like(mask)) == pytest.approx(0.5)
    assert 2 * p[1][mask == 1].sum() / (mask.sum() + p[1].sum()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("drawn", [0, 1])
def test_sure_probabilities_give_the_dice(drawn: int) -> None:
    truth = torch.zeros(8, 8, dtype=torch.uint8)
    truth[2:5, 2:6] = 1
    mask = drawn * truth.roll(1, 0)
    p = two_classes(truth.double())
    assert expected_dice(p, mask) == pytest.approx(dice(mask.numpy(), truth.numpy()))
    assert expected_dice(two_classes(torch.zeros(8, 8)), torch.zeros_like(truth)) == 1


def test_ignored_pixels_count_nowhere() -> None:
    p = two_classes(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)))
    mask = torch.zeros(6, 6, dtype=torch.uint8)
    mask[2:4, 2:4] = 1
    mask[0] = 255
    other = p.clone()
    other[:, 0] = 0.5
    assert expected_dice(p, mask) == expected_dice(other, mask)
    assert softmin_score(p, mask) == softmin_score(other, mask)
    assert (drawn_probability(p, mask)[0] == 1).all()
    assert softmin_score(p, torch.full_like(mask, 255)) == 1


def test_softmin_is_the_formula() -> None:
    p = two_classes(torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    mask = torch.eye(4, dtype=torch.uint8)
    s = [p[int(mask[i, j]), i, j].item() for i in range(4) for j in range(4)]
    weights = np.exp([(1 - each) / 0.1 for each in s])
    assert softmin_score(p, mask) == pytest.approx((weights * s).sum() / weights.sum(), rel=1e-12)
