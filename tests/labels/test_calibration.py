"""The calibration is the maximum of its likelihood, whatever the batches; its gain is that of the images' losses."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distseg.labels.calibration import (
    PRIOR,
    calibrated,
    calibration_sums,
    dice_gain_sums,
    gain_sums,
    identity,
    mean_gain,
    newton_step,
    relative_gain,
    relative_logits,
)

CPU = torch.device("cpu")
TRUTH = {2: torch.tensor([0.6, -1.2]), 3: torch.tensor([0.6, 0.8, -1.2])}
"""θ = (a, b_1 …) that masks are drawn from."""


def case(classes: int, images: int = 6) -> tuple[Tensor, Tensor]:
    """Logits, and masks that are drawn from the probabilities that a·z + b are the logits of."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(images, classes, 16, 16, generator=generator, dtype=torch.float64)
    wanted = calibrated(relative_logits(logits), TRUTH[classes].double()).softmax(1).movedim(1, -1)
    masks = torch.multinomial(wanted.reshape(-1, classes), 1, generator=generator).view(images, 16, 16)
    masks = masks.to(torch.uint8)
    masks[0, :3] = 255
    return logits, masks


def fitted(relative: Tensor, masks: Tensor, steps: int = 20, shifts: bool = True) -> Tensor:
    theta = identity(relative.shape[1], CPU)
    for _ in range(steps):
        theta = newton_step(theta, calibration_sums(relative, masks, theta), shifts)
    return theta


def by_descent(relative: Tensor, masks: Tensor, shifts: bool) -> Tensor:
    """The same maximum by an optimiser that knows nothing but the loss."""
    theta = identity(relative.shape[1], CPU)
    start = theta.clone()
    free = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        used = free if shifts else torch.cat([free[:1], torch.zeros_like(free[1:])])
        value = cross_entropy(calibrated(relative, used), masks.long(), ignore_index=255)
        value = value + PRIOR / 2 * (used - start).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return free.detach() if shifts else torch.cat([free.detach()[:1], torch.zeros(len(free) - 1).double()])


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_maximum_of_the_likelihood(classes: int, shifts: bool) -> None:
    logits, masks = case(classes)
    relative = relative_logits(logits)
    actual = fitted(relative, masks, shifts=shifts)
    torch.testing.assert_close(actual, by_descent(relative, masks, shifts), rtol=1e-5, atol=1e-6)
    if shifts:
        torch.testing.assert_close(actual, TRUTH[classes].double(), rtol=0.2, atol=0.1)


def test_sums_by_their_derivatives() -> None:
    """Σ H and Σ (Hθ − g) of the negative log-likelihood, by autograd."""
    logits, masks = case(3)
    relative, theta = relative_logits(logits), torch.tensor([0.7, 0.2, -0.4], dtype=torch.float64)

    def loss(theta: Tensor) -> Tensor:
        return cross_entropy(calibrated(relative, theta), masks.long(), ignore_index=255, reduction="sum")

    gradient, hessian = torch.func.grad(loss)(theta), torch.func.hessian(loss)(theta)
    actual = calibration_sums(relative, masks, theta)
    assert actual[0] == (masks != 255).sum()
    torch.testing.assert_close(actual[1:4], hessian @ theta - gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[4:].view(3, 3), hessian, rtol=1e-9, atol=1e-9)


def test_sums_add_up_over_images() -> None:
    logits, masks = case(3)
    relative, theta = relative_logits(logits), TRUTH[3].double()
    parts = [calibration_sums(relative[part], masks[part], theta) for part in (slice(2), slice(2, None))]
    torch.testing.assert_close(sum(parts), calibration_sums(relative, masks, theta), rtol=1e-12, atol=1e-9)
    parts = [gain_sums(relative[part], masks[part], theta, theta / 2) for part in (slice(2), slice(2, None))]
    torch.testing.assert_close(sum(parts), gain_sums(relative, masks, theta, theta / 2), rtol=1e-12, atol=1e-12)


def test_two_classes_as_one_and_as_two_logits_are_equal() -> None:
    logits, masks = case(2)
    one = (logits[:, 1] - logits[:, 0])[:, None]
    assert torch.equal(relative_logits(one), relative_logits(logits))
    assert torch.equal(fitted(relative_logits(one), masks), fitted(relative_logits(logits), masks))


def test_without_a_pixel_it_stays_and_separated_pixels_keep_it_finite() -> None:
    relative, masks = relative_logits(case(2)[0]), torch.full((6, 16, 16), 255, dtype=torch.uint8)
    theta = torch.tensor([0.4, 2.0], dtype=torch.float64)
    assert torch.equal(newton_step(theta, calibration_sums(relative, masks, theta)), theta)
    assert torch.equal(newton_step(theta, torch.zeros(7, dtype=torch.float64)), theta)
    separated = fitted(relative, relative.argmax(1).to(torch.uint8))
    assert separated.isfinite().all() and separated[0] > 1
    opposite = fitted(relative, relative.argmin(1).to(torch.uint8))
    assert opposite[0] == 0, "a network that is wrong everywhere says nothing; it is not turned round"


def test_nan_at_ignored_pixels_does_not_leak() -> None:
    logits, masks = case(3)
    theta = TRUTH[3].double()

    def found() -> tuple[Tensor, Tensor]:
        relative = relative_logits(logits)
        return calibration_sums(relative, masks, theta), gain_sums(relative, masks, theta, theta / 2)

    before = found()
    logits[0, :, :3] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(before, found(), strict=True))


def test_gain_in_dice_is_of_the_images_that_show_an_object() -> None:
    """Against Dice of one image and class after the other, three classes."""
    generator = torch.Generator().manual_seed(4)
    masks, labels, before = (torch.randint(0, 3, (6, 8, 8), generator=generator).byte() for _ in range(3))
    masks[0] = 0
    masks[1] = 255
    masks[2][masks[2] == 2] = 0  # class 2 is in the labels there, and not asked for
    masks[3, :3] = 255

    def dice(found: Tensor, mask: Tensor) -> float:
        known = mask != 255
        shown = [c for c in (1, 2) if (mask == c).any()]
        common = [((found == c) & (mask == c)).sum().item() for c in shown]
        both = [((found == c) & known).sum().item() + (mask == c).sum().item() for c in shown]
        return sum(2 * n / total for n, total in zip(common, both, strict=True)) / len(shown)

    d = torch.tensor([dice(labels[k], masks[k]) - dice(before[k], masks[k]) for k in range(2, 6)]).double()
    sums = dice_gain_sums(labels, before, masks, 3)
    torch.testing.assert_close(sums, torch.stack([torch.tensor(4.0).double(), d.sum(), d.square().sum()]))
    parts = [dice_gain_sums(labels[part], before[part], masks[part], 3) for part in (slice(2), slice(2, None))]
    torch.testing.assert_close(sum(parts), sums)
    gain, error = mean_gain(sums / 10, 4)  # an average over steps
    torch.testing.assert_close(torch.stack([gain, error]), torch.stack([d.mean(), d.std() / 2]))
    assert all(value == 0 for value in mean_gain(torch.zeros(3, dtype=torch.float64), 4))


def test_gain_is_of_the_images_losses_with_its_standard_error() -> None:
    logits, masks = case(2)
    masks[5] = 255  # an image of which nothing is known
    relative = relative_logits(logits)
    theta, scale = fitted(relative, masks), fitted(relative, masks, shifts=False)

    def of_images(theta: Tensor) -> Tensor:
        pixels = cross_entropy(calibrated(relative, theta), masks.long(), ignore_index=255, reduction="none")
        return torch.stack([image[mask != 255].mean() for image, mask in zip(pixels[:5], masks[:5], strict=True)])

    losses = of_images(scale), of_images(theta)
    d = losses[0] - losses[1]
    gain, error = relative_gain(gain_sums(relative, masks, theta, scale), 5)
    torch.testing.assert_close(gain, d.mean() / losses[0].mean())
    torch.testing.assert_close(error, d.std() / 5**0.5 / losses[0].mean())
    assert gain > 0.1 and all(value == 0 for value in relative_gain(torch.zeros(4, dtype=torch.float64), 5))
