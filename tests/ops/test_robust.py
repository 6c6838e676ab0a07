"""The robust losses in float64, against closed forms written out here, and their derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from distseg.ops import pixel_loss
from distseg.ops.robust import generalised_cross_entropy, student_t_loss


def case(channels: int):
    generator = torch.Generator().manual_seed(channels)
    logits = 3 * torch.randn(3, channels, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, max(channels, 2), (3, 5, 7), generator=generator, dtype=torch.uint8)
    masks[0, 0] = 255
    return logits, masks


def probability_of(label: int, z: list[float]) -> float:
    if len(z) == 1:
        p = 1 / (1 + math.exp(-z[0]))
        return p if label else 1 - p
    return math.exp(z[label]) / sum(math.exp(v) for v in z)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("q", [0.2, 0.7, 1.0])
def test_generalised_cross_entropy_is_its_closed_form(channels: int, q: float) -> None:
    logits, masks = case(channels)
    actual = generalised_cross_entropy(logits, masks, q)
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(7)).tolist():
        b, h, w = index
        label = masks[b, h, w].item()
        expected = 0.0 if label == 255 else (1 - probability_of(label, logits[b, :, h, w].tolist()) ** q) / q
        assert actual[b, h, w].item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("channels", [1, 3])
def test_generalised_cross_entropy_weighs_the_gradient_of_cross_entropy_by_belief(channels: int) -> None:
    logits, masks = case(channels)
    z = logits.requires_grad_()
    upstream = torch.rand(masks.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    [actual] = torch.autograd.grad(generalised_cross_entropy(z, masks, 0.7), z, upstream)
    belief = torch.exp(-pixel_loss(logits, masks)).detach() ** 0.7
    [expected] = torch.autograd.grad(pixel_loss(z, masks), z, upstream * belief)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
    assert gradcheck(lambda z: generalised_cross_entropy(z, masks, 0.7), (z,))


def test_generalised_cross_entropy_tends_to_cross_entropy_and_is_bounded() -> None:
    logits, masks = case(1)
    torch.testing.assert_close(
        generalised_cross_entropy(logits, masks, 1e-9), pixel_loss(logits, masks), rtol=1e-7, atol=1e-7
    )
    assert generalised_cross_entropy(100 * logits, masks, 0.7).max() <= 1 / 0.7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("nu", [0.5, 1.0, 30.0])
def test_t_loss_is_minus_the_log_density_of_student_t(channels: int, nu: float) -> None:
    logits, masks = case(channels)
    actual = student_t_loss(logits, masks, torch.tensor(math.log(nu), dtype=torch.float64))
    for b in range(3):
        errors = []
        for h in range(5):
            for w in range(7):
                label, z = masks[b, h, w].item(), logits[b, :, h, w].tolist()
                if label == 255:
                    continue
                classes = [1] if channels == 1 else range(channels)
                errors += [probability_of(c, z) - (label == c) for c in classes]
        d, squares = len(errors), sum(e * e for e in errors)
        density = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - d / 2 * math.log(nu * math.pi)
        density -= (nu + d) / 2 * math.log(1 + squares / nu)
        assert actual[b].item() == pytest.approx(-density, rel=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_t_loss_is_differentiable_in_logits_and_nu(channels: int) -> None:
    logits, masks = case(channels)
    log_nu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z, n: student_t_loss(z, masks, n), (logits.requires_grad_(), log_nu))


def test_the_gradient_in_nu_is_in_double_precision() -> None:
    """512×512 pixels: each of its terms is a hundred thousand times as large as their sum."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(1, 1, 512, 512, generator=generator)
    masks = torch.bernoulli(logits[:, 0].sigmoid(), generator=generator).to(torch.uint8)

    def gradient(z: torch.Tensor) -> float:
        log_nu = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        student_t_loss(z, masks, log_nu).sum().backward()
        return log_nu.grad.item()

    assert gradient(logits) == pytest.approx(gradient(logits.double()), rel=1e-5)


def test_a_wrong_image_pulls_less_under_heavy_tails() -> None:
    """The gradient on an image whose every label is wrong, over that on one whose labels are right."""
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    logits = torch.stack([torch.full((1, 8, 8), v, dtype=torch.float64) for v in (-2.0, 2.0)]).requires_grad_()

    def ratio(loss: torch.Tensor) -> float:
        [gradient] = torch.autograd.grad(loss, logits)
        right, wrong = gradient.abs().sum((1, 2, 3)).tolist()
        return wrong / right

    heavy = ratio(student_t_loss(logits, masks, torch.tensor(0.0, dtype=torch.float64)).sum())
    assert heavy < ratio(pixel_loss(logits, masks).sum()) / 5


def test_ignored_pixels_count_for_nothing_even_where_the_logit_is_not_a_number() -> None:
    logits, masks = case(1)
    logits[0, :, 0] = math.nan
    log_nu = torch.zeros((), dtype=torch.float64)
    assert torch.isfinite(generalised_cross_entropy(logits, masks, 0.7)).all()
    z = logits.requires_grad_()
    loss = student_t_loss(z, masks, log_nu).sum() + generalised_cross_entropy(z, masks, 0.7).sum()
    [gradient] = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert gradient[0, :, 0].abs().sum() == 0


def test_a_label_that_is_no_class_is_an_error() -> None:
    logits, masks = case(3)
    masks[1, 1, 1] = 3
    for loss in (
        lambda: student_t_loss(logits, masks, torch.zeros((), dtype=torch.float64)),
        lambda: generalised_cross_entropy(logits, masks, 0.7),
    ):
        with pytest.raises(ValueError, match="neither a class id below 3 nor 255"):
            loss()
