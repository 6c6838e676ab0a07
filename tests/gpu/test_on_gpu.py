"""The operators' matrix on a GPU, and that no step waits for it."""

import pytest
import torch

from distseg import PixelReweighter, ops, weighted_loss
from distseg.data.batch import Batch
from distseg.methods.labels.corrected import Corrected
from distseg.testing.operator_cases import CASES, MASK_CASES, Case, MaskCase, check, check_bins
from distseg.testing.steps import method_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64_eager_torch(case: Case) -> None:
    assert ops.backend("cuda") == "triton"
    check(case, "cuda")


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: case.name)
def test_bins_are_those_of_eager_torch_on_the_cpu(case: MaskCase) -> None:
    check_bins(case, "cuda")


def test_offsets_beyond_32_bits() -> None:
    """2³¹ logits and more: 129 images of 4096² pixels in float16."""
    shape = (129, 1, 4096, 4096)
    logits = torch.zeros(shape, dtype=torch.float16, device="cuda")
    masks = torch.zeros(shape[0], *shape[2:], dtype=torch.uint8, device="cuda")
    logits[-1, 0, -1, -1] = 10
    masks[-1, -1, -1] = 1
    losses = ops.pixel_loss(logits, masks)
    assert losses[-1, -1, -1].item() == pytest.approx(4.54e-5, rel=1e-3)
    assert losses[-1, -1, -2].item() == pytest.approx(0.6931, rel=1e-3)
    loss = weighted_loss(logits, masks, level=torch.ones(shape[0], device="cuda"))
    assert loss.item() == pytest.approx(0.693147 * (losses.numel() - 1), rel=1e-3)


def test_a_step_does_not_wait_for_the_device() -> None:
    model = torch.nn.Conv2d(3, 1, 3, padding=1).cuda()
    images = torch.rand(4, 3, 32, 32, device="cuda")
    masks = (images[:, 0] > 0.5).to(torch.uint8)
    class_weights = torch.tensor([1.0, 5.0], device="cuda")
    plain, by_class = PixelReweighter(model), PixelReweighter(model, class_weights=class_weights)

    def step() -> None:
        weighted_loss(model(images), masks, plain(images, masks, images, masks)).backward()
        weights = by_class(images, masks, images, masks)
        ops.dice_cross_entropy(model(images), masks, weights, class_weights=class_weights).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clean_share", [0.5, 0.0], ids=["learned from", "held out"])
def test_a_corrected_step_does_not_wait_for_the_device(clean_share: float) -> None:
    model = torch.nn.Conv2d(3, 1, 3, padding=1).cuda()
    images = torch.rand(4, 3, 32, 32, device="cuda")
    batch = Batch(images, (images[:, 0] > 0.5).to(torch.uint8), None, ("a", "b", "c", "d"))
    label_model = Corrected(torch.device("cuda"), 2, 4, least_gain=-1, decide_after=1)
    method = method_on(batch, batch, clean_share, label_model, lambda x: model(x).detach())
    skipped = torch.zeros((), dtype=torch.bool, device="cuda")

    def step() -> None:
        made = method.begin(0, diagnose=False)
        [micro] = made.micro_batches
        made.loss(0, model(micro.batch.images)).backward()
        made.finish(skipped, 0.1)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_label_that_is_no_class_makes_the_loss_and_the_weights_nan() -> None:
    model = torch.nn.Conv2d(3, 1, 3, padding=1).cuda()
    images = torch.rand(2, 3, 16, 16, device="cuda")
    masks = (images[:, 0] > 0.5).to(torch.uint8)
    wrong = masks.clone()
    wrong[0, 3, 4] = 7
    assert weighted_loss(model(images), wrong, level=torch.ones(2, device="cuda")).isnan()
    assert PixelReweighter(model)(images, wrong, images, masks).isnan().any()
    assert PixelReweighter(model)(images, masks, images, wrong).isnan().any()
