"""Masks as a user's own data set may have them: 255 for the lesion means that all of it is ignored."""

import pytest
import torch
from torch import nn

from distseg import PixelReweighter, weighted_loss
from distseg.meta import loss as public_loss
from distseg.meta.loss import BinaryMasks

MEND = "255 means ignore: give the lesion the value 1"


@pytest.fixture(autouse=True)
def nothing_seen_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_loss, "_masks_of_weighted_loss", BinaryMasks())


def masks_of(*values: int) -> torch.Tensor:
    return torch.tensor(values * 8, dtype=torch.uint8)[:8].view(1, 2, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_the_loss_refuses_0_and_255(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=MEND):
        weighted_loss(logits, masks_of(0, 255).to(dtype))
    weighted_loss(torch.zeros(1, 3, 2, 4), masks_of(0, 255).to(dtype))  # of several classes 0 may be all there is


def test_masks_that_have_held_a_lesion_may_be_all_background_later() -> None:
    logits = torch.zeros(1, 1, 2, 4)
    weighted_loss(logits, masks_of(0))
    weighted_loss(logits, masks_of(0, 1, 255))
    weighted_loss(logits, masks_of(0, 255))


def test_once_a_lesion_is_known_nothing_looks_at_the_device() -> None:
    seen = BinaryMasks()
    assert not seen.look(masks_of(0, 1))
    assert not seen.look(masks_of(0, 255).to("meta"))  # a look at a meta tensor raises


@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
def test_the_reweighter_refuses_0_and_255_in_both_batches(estimator: str) -> None:
    images = torch.randn(1, 3, 2, 4)
    reweighter = PixelReweighter(nn.Conv2d(3, 1, 1), estimator=estimator)
    with pytest.raises(ValueError, match=MEND):
        reweighter(images, masks_of(0, 255), images, masks_of(255, 0, 0))
    reweighter(images, masks_of(0, 255), images, masks_of(0, 1))
    reweighter(images, masks_of(0, 255), images, masks_of(0, 255))
    of_classes = PixelReweighter(nn.Conv2d(3, 2, 1), estimator=estimator)
    of_classes(images, masks_of(0, 255), images, masks_of(0, 255))


@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite"])
def test_the_reweighter_refuses_a_label_that_is_no_class_id(estimator: str) -> None:
    images = torch.randn(1, 3, 2, 4)
    reweighter = PixelReweighter(nn.Conv2d(3, 1, 1), estimator=estimator)
    for noisy, clean in ((masks_of(0, 7), masks_of(0, 1)), (masks_of(0, 1), masks_of(1, 7))):
        with pytest.raises(ValueError, match="neither a class id below 2 nor 255"):
            reweighter(images, noisy, images, clean)
