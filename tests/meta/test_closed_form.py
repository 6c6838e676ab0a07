r"""Weights against U of a 1×1 convolution (logistic regression of each pixel), derived by hand.

One channel: z_p = w·x_p + b and ∂ℓ_p/∂z_p = e_p = σ(z_p) − y_p, so ∇_{(w,b)} ℓ_p = e_p (x_p, 1). The clean gradient
over the N valid clean pixels is g = (1/N) Σ_q e_q (x_q, 1), hence

    U_p = ⟨g, ∇ℓ_p⟩ = (1/N) Σ_q e_p e_q (x_p·x_q + 1):

a pixel's weight is how often its error and its input point the same way as those of the clean pixels. The cells of
`patch(k)` and `image` are summed here by explicit loops.
"""

import numpy as np
import pytest
import torch
from oracle import IGNORE, pixelwise_alignment
from torch import Tensor, nn

from distseg import PixelReweighter

ESTIMATORS = ["forward", "reverse", "finite"]


def problem(classes: int = 1, height: int = 11, width: int = 7, seed: int = 0) -> tuple:
    """A 1×1 convolution, a noisy batch of 3 with unequal numbers of valid pixels, and a clean batch of 2."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Conv2d(3, classes, 1).double()

    def batch(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator)
        masks = torch.randint(0, max(2, classes), (count, height, width), generator=generator, dtype=torch.uint8)
        return images, masks

    noisy, clean = batch(3, height, width), batch(2, 5, 6)
    noisy[1][0, :4] = IGNORE
    noisy[1][1, torch.rand(height, width, generator=generator) < 0.3] = IGNORE
    clean[1][0, 0] = IGNORE
    return model, noisy, clean


def cell_weights(alignment: np.ndarray, masks: np.ndarray, cell_height: int, cell_width: int) -> np.ndarray:
    """max(Σ U, 0) of each cell, spread evenly over its valid pixels; not yet normalised."""
    weights = np.zeros_like(alignment)
    count, height, width = alignment.shape
    for image in range(count):
        for top in range(0, height, cell_height):
            for left in range(0, width, cell_width):
                pixels = [
                    (image, row, column)
                    for row in range(top, min(top + cell_height, height))
                    for column in range(left, min(left + cell_width, width))
                    if masks[image, row, column] != IGNORE
                ]
                total = max(sum(alignment[pixel] for pixel in pixels), 0.0)
                for pixel in pixels:
                    weights[pixel] = total / len(pixels)
    return weights


def assert_close(actual: Tensor, expected: np.ndarray, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, rtol=rtol, atol=rtol * expected.max())


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pixel_weights(estimator: str, classes: int) -> None:
    model, noisy, clean = problem(classes)
    alignment, gradient_norm = pixelwise_alignment(model, noisy, clean)
    expected = np.maximum(alignment, 0) / np.maximum(alignment, 0).sum()
    reweighter = PixelReweighter(model, estimator=estimator)
    assert_close(reweighter(*noisy, *clean), expected, rtol=1e-3 if estimator == "finite" else 1e-10)
    assert reweighter.diagnostics["gradient_norm"].item() == pytest.approx(gradient_norm, rel=1e-10)


def test_two_pixels_by_hand() -> None:
    """θ = 0 and one lesion pixel x = (1, 0, 0), y = 1 as clean batch: e_q = −½, g = −½ (1, 0, 0, 1).

    Noisy pixels, all at z = 0: x = (1, 0, 0) labelled 1 has U = −½ · −½ · 2 = ½; x = (−½, 0, 0) labelled 1 has U = ⅛;
    x = (1, 0, 0) labelled 0 has U = −½ and loses its weight. W = (½, ⅛, 0) / ⅝ = (⅘, ⅕, 0).
    """
    model = nn.Conv2d(3, 1, 1).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    images = torch.zeros(1, 3, 1, 3, dtype=torch.float64)
    images[0, 0, 0] = torch.tensor([1.0, -0.5, 1.0])
    masks = torch.tensor([[[1, 1, 0]]])
    clean_images = torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    weights = PixelReweighter(model)(images, masks, clean_images, torch.ones(1, 1, 1, dtype=torch.long))
    torch.testing.assert_close(weights, torch.tensor([[[0.8, 0.2, 0.0]]], dtype=torch.float64), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("normalise", ["batch", "image"])
@pytest.mark.parametrize(
    "granularity, cell",
    # 11×7 images: 2 and 4 leave ragged edges on both axes, 7 on one, 64 is larger than the image.
    [("patch(1)", 1), ("patch(2)", 2), ("patch(4)", 4), ("patch(7)", 7), ("patch(64)", 64), ("image", 11)],
)
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_cells(estimator: str, granularity: str, cell: int, normalise: str) -> None:
    # Under `image` normalisation every image needs some weight left; this seed leaves it (asserted below).
    model, noisy, clean = problem(seed=4)
    alignment, _ = pixelwise_alignment(model, noisy, clean)
    expected = cell_weights(alignment, noisy[1].numpy(), cell, cell)
    if normalise == "image":
        per_image = expected.sum(axis=(1, 2), keepdims=True)
        assert (per_image > 0).all()
        expected /= per_image * len(expected)
    else:
        expected /= expected.sum()
    weights = PixelReweighter(model, estimator=estimator, granularity=granularity, normalise=normalise)(*noisy, *clean)
    assert_close(weights, expected)


def test_a_patch_of_one_pixel_is_pixel() -> None:
    model, noisy, clean = problem(classes=4)
    pixel = PixelReweighter(model, granularity="pixel")(*noisy, *clean)
    assert_close(PixelReweighter(model, granularity="patch(1)")(*noisy, *clean), pixel.numpy())


def test_the_share_of_an_image_does_not_grow_with_its_valid_pixels() -> None:
    """`image`: max(ΣU, 0) whatever the number of valid pixels (Ren et al. 2018), read off the image's sum."""
    model, noisy, clean = problem(seed=4)
    alignment, _ = pixelwise_alignment(model, noisy, clean)
    shares = np.maximum(alignment.sum(axis=(1, 2)), 0)
    assert (shares > 0).sum() >= 2
    weights = PixelReweighter(model, granularity="image")(*noisy, *clean)
    np.testing.assert_allclose(weights.sum(dim=(1, 2)).numpy(), shares / shares.sum(), rtol=1e-10)


def test_clean_gradient_is_the_mean_over_all_valid_pixels_not_a_mean_of_means() -> None:
    model, noisy, clean = problem()
    clean[1][0, 1:] = IGNORE
    clean[1][0, 1, 0] = 1
    alignment, gradient_norm = pixelwise_alignment(model, noisy, clean)
    reweighter = PixelReweighter(model)
    assert_close(reweighter(*noisy, *clean), np.maximum(alignment, 0) / np.maximum(alignment, 0).sum())
    assert reweighter.diagnostics["gradient_norm"].item() == pytest.approx(gradient_norm, rel=1e-10)
