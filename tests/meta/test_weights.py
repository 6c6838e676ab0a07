"""What a weight map always is: non-negative, normalised, silent where nobody vouches for the label, and described."""

import itertools

import numpy as np
import pytest
import torch
from oracle import IGNORE, loss_map, pixelwise_alignment
from torch import Tensor, nn

from distseg import PixelReweighter, pixel_loss, weighted_loss

ESTIMATORS = ["forward", "reverse", "finite"]
GRANULARITIES = ["pixel", "patch(3)", "image"]
NORMALISE = ["batch", "image"]


def batch(count: int, height: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Lesion where the first channel is positive."""
    images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return images, (images[:, 0] > 0).to(torch.uint8)


def pixelwise(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 1, 1).to(dtype)


def with_wrong_pixels(masks: Tensor, fraction: float, seed: int) -> Tensor:
    wrong = torch.rand(masks.shape, generator=torch.Generator().manual_seed(seed)) < fraction
    return torch.where(wrong, 1 - masks, masks)


def pixelwise_case(height: int, width: int) -> tuple[nn.Conv2d, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A network; three images with true masks and with wrong ones, a row of them ignored; and a clean batch."""
    images, truth = batch(3, height, width, seed=1)
    masks = with_wrong_pixels(truth, 0.25, seed=2)
    masks[0, 0] = IGNORE
    return pixelwise(seed=1), images, truth, masks, batch(2, 5, 5, seed=3)


def opposed() -> tuple:
    """A network that knows only a bias, clean images all lesion, noisy ones all background: every U is negative.

    b = 0: e_q = σ(0) − 1 = −½, g_b = −½; e_p = σ(0) − 0 = ½; U_p = g_b e_p = −¼.
    """
    model = BiasOnly().double()
    images = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    background, lesion = torch.zeros(2, 4, 5, dtype=torch.uint8), torch.ones(2, 4, 5, dtype=torch.uint8)
    return model, (images, background), (images, lesion)


class BiasOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias.expand(images.shape[0], 1, *images.shape[2:])


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_non_negative_normalised_constant(estimator: str, granularity: str, normalise: str) -> None:
    model = pixelwise()
    images, truth = batch(3, 8, 7, seed=1)
    masks = with_wrong_pixels(truth, 0.2, seed=2)
    masks[0, :, 0] = IGNORE
    reweighter = PixelReweighter(model, estimator=estimator, granularity=granularity, normalise=normalise)
    weights = reweighter(images, masks, *batch(2, 5, 5, seed=3))
    assert weights.shape == masks.shape
    assert weights.dtype == images.dtype
    assert not weights.requires_grad
    assert (weights >= 0).all()
    assert (weights[masks == IGNORE] == 0).all()
    assert weights.sum().item() == pytest.approx(1, rel=1e-12)
    if normalise == "image":
        torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert reweighter.diagnostics["zero_maps"].item() == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_single_precision_is_close_to_double(estimator: str) -> None:
    model = pixelwise()
    (images, masks), (clean_images, clean_masks) = batch(2, 8, 8, seed=1), batch(2, 8, 8, seed=2)
    masks = with_wrong_pixels(masks, 0.3, seed=3)
    expected = PixelReweighter(model)(images, masks, clean_images, clean_masks)
    reweighter = PixelReweighter(model.float(), estimator=estimator)
    actual = reweighter(images.float(), masks, clean_images.float(), clean_masks)
    assert actual.dtype == torch.float32
    tolerance = (2e-2 if estimator == "finite" else 1e-5) * expected.max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_skip_gives_a_zero_map_weight_zero(estimator: str, granularity: str, normalise: str) -> None:
    model, noisy, clean = opposed()
    reweighter = PixelReweighter(
        model, estimator=estimator, granularity=granularity, normalise=normalise, on_zero="skip"
    )
    weights = reweighter(*noisy, *clean)
    assert torch.equal(weights, torch.zeros_like(weights))
    assert reweighter.diagnostics["zero_maps"].item() > 0
    assert reweighter.diagnostics["zero_fraction"].item() == 1
    assert all(torch.isfinite(value) for value in reweighter.diagnostics.values())


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_uniform_gives_a_zero_map_equal_weights(estimator: str, granularity: str, normalise: str) -> None:
    model, noisy, clean = opposed()
    noisy[1][0, 0, :] = IGNORE
    reweighter = PixelReweighter(
        model, estimator=estimator, granularity=granularity, normalise=normalise, on_zero="uniform"
    )
    weights = reweighter(*noisy, *clean)
    valid = noisy[1] != IGNORE
    expected = valid / (valid.sum() if normalise == "batch" else 2 * valid.sum(dim=(1, 2), keepdim=True))
    torch.testing.assert_close(weights, expected.double())
    assert reweighter.diagnostics["zero_maps"].item() > 0
    if normalise == "batch":
        assert reweighter.diagnostics["zero_maps"].item() == 1
        assert reweighter.diagnostics["effective_fraction"].item() == pytest.approx(1)


@pytest.mark.parametrize("on_zero", ["skip", "uniform"])
def test_image_normalisation_acts_on_the_one_image_without_weight(on_zero: str) -> None:
    model, (images, masks), clean = opposed()
    masks[1] = 1
    reweighter = PixelReweighter(model, normalise="image", on_zero=on_zero)
    weights = reweighter(images, masks, *clean)
    share = {"skip": 0.0, "uniform": 0.5}[on_zero]
    expected = torch.stack([torch.full((4, 5), share / 20), torch.full((4, 5), 0.5 / 20)]).double()
    torch.testing.assert_close(weights, expected)
    assert reweighter.diagnostics["zero_maps"].item() > 0


@pytest.mark.parametrize("on_zero", ["skip", "uniform"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_vanishing_clean_gradient_is_a_zero_map(estimator: str, on_zero: str) -> None:
    """Clean errors −½ and +½ on the same input cancel: g = 0."""
    model, (images, masks), (clean_images, clean_masks) = opposed()
    clean_masks[0] = 0
    reweighter = PixelReweighter(model, estimator=estimator, on_zero=on_zero)
    weights = reweighter(images, masks, clean_images, clean_masks)
    assert reweighter.diagnostics["gradient_norm"].item() == 0
    assert reweighter.diagnostics["zero_maps"].item() == 1
    torch.testing.assert_close(weights, torch.full_like(weights, {"skip": 0, "uniform": 1 / masks.numel()}[on_zero]))


@pytest.mark.parametrize("on_zero", ["skip", "uniform"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_clean_batch_of_ignored_pixels_is_a_zero_map(estimator: str, on_zero: str) -> None:
    model = pixelwise()
    images, masks = batch(2, 4, 5, seed=1)
    clean_images, clean_masks = batch(2, 4, 4, seed=2)
    reweighter = PixelReweighter(model, estimator=estimator, on_zero=on_zero)
    weights = reweighter(images, masks, clean_images, torch.full_like(clean_masks, IGNORE))
    torch.testing.assert_close(weights, torch.full_like(weights, {"skip": 0, "uniform": 1 / masks.numel()}[on_zero]))
    assert reweighter.diagnostics["zero_maps"].item() == 1
    assert reweighter.diagnostics["gradient_norm"].item() == 0


@pytest.mark.parametrize("on_zero", ["skip", "uniform"])
@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_noisy_batch_of_ignored_pixels_has_no_weight(granularity: str, normalise: str, on_zero: str) -> None:
    images, masks = batch(2, 4, 5, seed=1)
    ignored = torch.full_like(masks, IGNORE)
    reweighter = PixelReweighter(pixelwise(), granularity=granularity, normalise=normalise, on_zero=on_zero)
    weights = reweighter(images, ignored, *batch(2, 4, 4, seed=2), ignored)
    assert torch.equal(weights, torch.zeros_like(weights))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_clean_image_and_one_noisy_image(estimator: str, granularity: str) -> None:
    """K = 1: the noisy image is the clean one, so its gradients agree with g in sum and the weights exist."""
    images, masks = batch(1, 6, 6, seed=1)
    weights = PixelReweighter(pixelwise(), estimator=estimator, granularity=granularity)(images, masks, images, masks)
    assert weights.sum().item() == pytest.approx(1)
    if granularity == "image":
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 36))


class NanWhere(nn.Module):
    """A network whose logits are NaN where an image's first channel is 99, whatever the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = pixelwise()

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).masked_fill(images[:, :1] == 99, torch.nan)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_logits_at_ignored_pixels_do_not_leak(estimator: str, granularity: str) -> None:
    model = NanWhere()
    (images, masks), (clean_images, clean_masks) = batch(2, 7, 6, seed=1), batch(2, 5, 5, seed=2)
    masks = with_wrong_pixels(masks, 0.3, seed=3)
    masks[:, 2:4, 1] = IGNORE
    clean_masks[0, 1] = IGNORE
    reweighter = PixelReweighter(model, estimator=estimator, granularity=granularity)
    expected = reweighter(images, masks, clean_images, clean_masks)
    images[:, 0][masks == IGNORE] = 99
    clean_images[:, 0][clean_masks == IGNORE] = 99
    assert model(images).isnan().any()
    assert model(clean_images).isnan().any()
    actual = reweighter(images, masks, clean_images, clean_masks)
    torch.testing.assert_close(actual, expected)
    assert all(torch.isfinite(value) for value in reweighter.diagnostics.values())


@pytest.mark.parametrize("estimator", ["forward", "finite"])
def test_nan_image_pixels_do_not_leak_through_a_pixelwise_network(estimator: str) -> None:
    # `reverse` is left out: its virtual step sums 0 · NaN over the pixels into the parameters, as any backward pass
    # does.
    model = pixelwise()
    images, masks = batch(2, 7, 6, seed=1)
    masks[:, 2:4, 1] = IGNORE
    clean = batch(2, 5, 5, seed=2)
    reweighter = PixelReweighter(model, estimator=estimator)
    expected = reweighter(images, masks, *clean)
    images.movedim(1, -1)[masks == IGNORE] = torch.nan
    torch.testing.assert_close(reweighter(images, masks, *clean), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("transform", ["clamp", "root", "sign"])
def test_transforms_by_their_formulas(transform: str, estimator: str, granularity: str) -> None:
    """Transformed pixel by pixel, then summed over each cell, clamped and spread evenly over its valid pixels."""
    model, images, _, masks, clean = pixelwise_case(7, 6)
    alignment, _ = pixelwise_alignment(model, (images, masks), clean)
    scores = {"clamp": alignment, "root": np.sign(alignment) * np.abs(alignment) ** 0.5, "sign": np.sign(alignment)}
    valid = masks.numpy() != IGNORE
    side = {"pixel": 1, "patch(3)": 3, "image": 7}[granularity]
    expected = np.zeros(masks.shape)
    for b, top, left in itertools.product(range(3), range(0, 7, side), range(0, 6, side)):
        cell = (b, slice(top, top + side), slice(left, left + side))
        share = max((scores[transform][cell] * valid[cell]).sum(), 0) / max(valid[cell].sum(), 1)
        expected[cell] = share * valid[cell]
    how = {"granularity": granularity, "transform": transform, "finite_step": 1e-6}  # for a smooth network
    actual = PixelReweighter(model, estimator=estimator, **how)(images, masks, *clean)
    rtol = 1e-5 if estimator == "finite" else 1e-9
    np.testing.assert_allclose(actual.numpy(), expected / expected.sum(), rtol=rtol, atol=1e-12)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def area_under_curve(scores: np.ndarray, positives: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties half: the O(n²) definition."""
    differences = scores[positives][:, None] - scores[~positives][None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).double().numpy()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_diagnostics_by_their_formulas(estimator: str, granularity: str) -> None:
    model, images, truth, masks, clean = pixelwise_case(9, 7)
    alignment, gradient_norm = pixelwise_alignment(model, (images, masks), clean)
    reweighter = PixelReweighter(model, estimator=estimator, granularity=granularity)
    weights = reweighter(images, masks, *clean, truth).numpy()

    valid = masks.numpy() != IGNORE
    wrong = valid & (masks != truth).numpy()
    expected = {
        "gradient_norm": gradient_norm,
        "effective_fraction": 1 / (valid.sum() * (weights**2).sum()),
        "zero_fraction": (weights[valid] == 0).mean(),
        "zero_maps": 0.0,
        "wrong_mass": weights[wrong].sum(),
        "noise_rate": wrong.sum() / valid.sum(),
        # U, not W: the detector is asked about pixels also where the weights are of patches or images.
        "auroc": area_under_curve(-rounded_to_bfloat16(alignment)[valid], wrong[valid]),
    }
    assert set(reweighter.diagnostics) == set(expected)
    assert all(value.ndim == 0 for value in reweighter.diagnostics.values())
    actual = {name: value.item() for name, value in reweighter.diagnostics.items()}
    assert actual == pytest.approx(expected, rel=1e-6)
    exact = area_under_curve(-alignment[valid], wrong[valid])
    assert actual["auroc"] == pytest.approx(exact, abs=5e-3)


def test_without_true_masks_only_what_is_known() -> None:
    reweighter = PixelReweighter(pixelwise())
    images, masks = batch(2, 6, 6, seed=1)
    reweighter(images, masks, *batch(2, 5, 5, seed=2), masks)
    reweighter(images, masks, *batch(2, 5, 5, seed=2))
    assert set(reweighter.diagnostics) == {"gradient_norm", "effective_fraction", "zero_fraction", "zero_maps"}


def test_auroc_counts_ties_half() -> None:
    """Two distinct values of U, each shared by wrong and right pixels.

    Bias-only network, clean all lesion: U = ¼ where the label is 1 and −¼ where it is 0. Truth: 20 pixels labelled 1,
    of which 5 wrong; 20 labelled 0, of which 10 wrong. P(−U_wrong > −U_right) = (10/15)(15/25) = 0.4, ties (10·10 +
    5·15)/(15·25) = 7/15.
    """
    model, (images, masks), clean = opposed()
    masks[1] = 1
    truth = masks.clone()
    truth[0, :2] = 1
    truth[1, 0] = 0
    reweighter = PixelReweighter(model)
    weights = reweighter(images, masks, *clean, truth)
    actual = {name: value.item() for name, value in reweighter.diagnostics.items()}
    assert actual["auroc"] == pytest.approx(0.4 + 0.5 * 7 / 15, rel=1e-6)
    assert actual["noise_rate"] == pytest.approx(15 / 40)
    assert actual["wrong_mass"] == pytest.approx(5 / 20)
    assert actual["effective_fraction"] == pytest.approx(0.5)
    assert actual["zero_fraction"] == pytest.approx(0.5)
    assert weights.sum().item() == pytest.approx(1)


def test_a_clean_gradient_detects_wrong_pixels() -> None:
    model = pixelwise()
    images, truth = batch(4, 8, 8, seed=1)
    masks = with_wrong_pixels(truth, 0.3, seed=2)
    reweighter = PixelReweighter(model)
    reweighter(images, masks, *batch(4, 8, 8, seed=3), truth)
    assert reweighter.diagnostics["auroc"] > 0.8
    assert reweighter.diagnostics["wrong_mass"] < 0.5 * reweighter.diagnostics["noise_rate"]


# --- the losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_losses_by_their_formula(classes: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, classes, 5, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, max(2, classes), (2, 5, 3), dtype=torch.uint8)
    masks[0, 0] = IGNORE
    weights = torch.rand(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(pixel_loss(logits, masks), loss_map(logits, masks), rtol=1e-12, atol=1e-14)
    expected = (weights * loss_map(logits, masks)).sum()
    actual = weighted_loss(logits, masks, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    [actual_gradient] = torch.autograd.grad(actual, logits)
    [expected_gradient] = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_losses_are_deaf_to_ignored_logits(classes: int, poison: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, classes, 4, 4, dtype=torch.float64)
    masks = torch.zeros(1, 4, 4, dtype=torch.long)
    masks[0, 1] = IGNORE
    logits[0, :, 1] = poison
    logits.requires_grad_()
    assert (pixel_loss(logits, masks)[0, 1] == 0).all()
    loss = weighted_loss(logits, masks, torch.full((1, 4, 4), 1 / 12, dtype=torch.float64))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, :, 1] == 0).all()


def test_large_logits_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([1e4, -1e4]).view(1, 1, 1, 2)
    wrong = torch.tensor([[[0, 1]]])
    torch.testing.assert_close(pixel_loss(logits, wrong), torch.full((1, 1, 2), 1e4))
    torch.testing.assert_close(pixel_loss(logits, 1 - wrong), torch.zeros(1, 1, 2))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"estimator": "backward"},
        {"granularity": "patch"},
        {"granularity": "patch(0)"},
        {"granularity": "superpixel"},
        {"normalise": "pixel"},
        {"on_zero": "ignore"},
        {"transform": "square"},
    ],
)
def test_unknown_words_are_refused(wrong: dict[str, str]) -> None:
    [word] = wrong.values()
    with pytest.raises(ValueError, match=word.replace("(", r"\(").replace(")", r"\)")):
        PixelReweighter(pixelwise(), **wrong)


def test_masks_that_do_not_fit_are_refused() -> None:
    reweighter = PixelReweighter(pixelwise())
    images, masks = batch(2, 6, 6, seed=1)
    with pytest.raises(ValueError):
        reweighter(images, masks[:1], images, masks)
    with pytest.raises(ValueError):
        reweighter(images, masks, images, masks[:, None])
    with pytest.raises(ValueError):
        reweighter(images, masks.double(), images, masks)
