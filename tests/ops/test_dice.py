"""Dice plus cross-entropy against its closed form written out pixel by pixel, its derivatives, and what it is for."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from distseg import ops
from distseg.ops import reference

BACKENDS = ["csrc", "triton", "reference"]
FAST = ["csrc", "triton"]


def some(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, masks, weights and class weights in float64: image 2 shows no class but the background."""
    generator = torch.Generator().manual_seed(channels)
    classes = max(2, channels)
    logits = 2 * torch.randn(3, channels, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, classes, (3, 5, 7), generator=generator, dtype=torch.uint8)
    masks[0, 0] = ops.IGNORE
    masks[1][masks[1] == classes - 1] = 0  # of three classes one is missing in image 1
    masks[1, 2, 3] = 1
    masks[2] = 0
    weights = torch.rand(3, 5, 7, generator=generator, dtype=torch.float64)
    return logits, masks, weights, 0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)


def probabilities(z: list[float]) -> list[float]:
    if len(z) == 1:
        p = 1 / (1 + math.exp(-z[0]))
        return [1 - p, p]
    total = sum(math.exp(v) for v in z)
    return [math.exp(v) / total for v in z]


def written_out(
    logits: Tensor, masks: Tensor, weights: Tensor, class_weights: Tensor, dice: float, smooth: float
) -> float:
    """The loss by its definition, with Python's numbers."""
    total = 0.0
    for z, labels, w in zip(logits, masks.tolist(), weights.tolist(), strict=True):
        pixels = [
            (w[i][j], labels[i][j], probabilities(z[:, i, j].tolist()))
            for i in range(len(labels))
            for j in range(len(labels[0]))
            if labels[i][j] != 255
        ]
        mass = sum(weight for weight, _, _ in pixels)
        scores = []
        for c in range(1, len(class_weights)):
            shown = sum(weight for weight, y, _ in pixels if y == c)
            if shown:
                both = sum(weight * p[c] for weight, y, p in pixels if y == c)
                size = sum(weight * p[c] for weight, _, p in pixels) + shown
                scores.append((2 * both + smooth * mass) / (size + smooth * mass))
        entropy = sum(-weight * class_weights[y].item() * math.log(p[y]) for weight, y, p in pixels)
        missed = mass * (1 - sum(scores) / len(scores)) if scores else 0.0
        total += (1 - dice) * entropy + dice * missed
    return total


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(("dice", "smooth"), [(0.5, 1e-5), (0.3, 0.1), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_its_closed_form(backend: str, dice: float, smooth: float, channels: int) -> None:
    logits, masks, weights, class_weights = some(channels)
    with ops.using(backend):
        actual = ops.dice_cross_entropy(logits, masks, weights, dice=dice, smooth=smooth, class_weights=class_weights)
    expected = written_out(logits, masks, weights, class_weights, dice, smooth)
    assert actual.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("backend", FAST)
def test_derivatives_by_finite_differences(backend: str, channels: int) -> None:
    logits, masks, weights, class_weights = some(channels)
    scale, level = torch.tensor([[0.3, 0.7, 0.2], [0.1, 0.2, 0.0]], dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return ops.dice_cross_entropy(
            z, masks, weights, scale, level, dice=0.7, smooth=0.01, class_weights=class_weights
        )

    # As for the other operators: the interpreter takes milliseconds a launch.
    how = {"fast_mode": True} if backend == "triton" else {}
    with ops.using(backend):
        assert gradcheck(
            loss,
            (logits.requires_grad_(),),
            check_forward_ad=True,
            check_batched_grad=backend == "csrc",
            **how,
        )


@pytest.mark.parametrize("backend", FAST)
def test_vmap_maps_over_images_and_their_class_weights(backend: str) -> None:
    logits, masks, weights, class_weights = some(3)
    many = torch.stack([logits, -logits])

    def loss(z: Tensor) -> Tensor:
        return ops.dice_cross_entropy(z, masks, weights, class_weights=class_weights)

    with ops.using(backend):
        expected = torch.stack([loss(z) for z in many])
        torch.testing.assert_close(torch.func.vmap(loss)(many), expected)


@pytest.mark.parametrize("backend", FAST)
def test_what_has_no_derivative_raises(backend: str) -> None:
    logits, masks, weights, class_weights = some(1)
    z = logits.clone().requires_grad_()
    with ops.using(backend):
        [first] = torch.autograd.grad(ops.dice_cross_entropy(z, masks, weights), z, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once, not twice"):
            torch.autograd.grad(first.sum(), z)
        with pytest.raises(RuntimeError, match="differentiable once, not twice"):
            torch.func.jvp(torch.func.grad(lambda x: ops.dice_cross_entropy(x, masks, weights)), (logits,), (logits,))
        for name, value in (("weights", weights), ("class_weights", class_weights)):
            leaf = value.clone().requires_grad_()
            given = {"weights": weights} | {name: leaf}
            with pytest.raises(RuntimeError, match="differentiable in the logits alone"):
                ops.dice_cross_entropy(z, masks, **given).backward()
        with pytest.raises(RuntimeError, match="differentiable in the logits alone"):
            torch.func.jvp(lambda w: ops.dice_cross_entropy(logits, masks, w), (weights,), (weights,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_without_weight_or_without_foreground(backend: str) -> None:
    """The first adds nothing at all, the second its cross-entropy, whatever the smoothing."""
    logits, masks, weights, _ = some(3)
    weights[0] = 0
    with ops.using(backend):
        for smooth in (0.0, 0.1):
            z = logits.clone().requires_grad_()
            loss = ops.dice_cross_entropy(z, masks, weights, dice=0.5, smooth=smooth)
            [gradient] = torch.autograd.grad(loss, z)
            x = logits.clone().requires_grad_()
            [of_entropy] = torch.autograd.grad(ops.weighted_loss(x, masks, weights), x)
            assert loss.isfinite() and gradient.isfinite().all()
            assert gradient[0].abs().max() == 0
            torch.testing.assert_close(gradient[2], 0.5 * of_entropy[2], rtol=1e-12, atol=1e-15)
            only = ops.dice_cross_entropy(logits[2:], masks[2:], weights[2:], dice=1.0, smooth=smooth)
            assert only.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_batch_add_up_and_a_factor_of_the_weights_is_one_of_the_loss(backend: str) -> None:
    """What ranks, accumulation and the share of a stream rest on."""
    logits, masks, weights, _ = some(3)
    with ops.using(backend):
        whole = ops.dice_cross_entropy(logits, masks, weights)
        parts = sum(
            ops.dice_cross_entropy(logits[i : i + 1], masks[i : i + 1], weights[i : i + 1]).item() for i in range(3)
        )
        eightfold = ops.dice_cross_entropy(logits, masks, 8e-6 * weights)
    assert whole.item() == pytest.approx(parts, rel=1e-13)
    assert eightfold.item() == pytest.approx(8e-6 * whole.item(), rel=1e-12)


def test_a_gradient_in_float16_does_not_underflow_under_a_loss_scale() -> None:
    logits = torch.zeros(1, 1, 4, 4, dtype=torch.float16, requires_grad=True)
    masks, weights = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 1e-8)
    masks[0, 0, 0] = 1
    (2.0**16 * ops.dice_cross_entropy(logits, masks, weights)).backward()
    exact = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (2.0**16 * ops.dice_cross_entropy(exact, masks, weights.double())).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2e-3, atol=0)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 97, 101, generator=generator)
    masks = torch.randint(0, 4, (3, 97, 101), generator=generator, dtype=torch.uint8)
    weights, threads = torch.rand(3, 97, 101, generator=generator), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            z = logits.clone().requires_grad_()
            loss = ops.dice_cross_entropy(z, masks, weights)
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(loss, results[0][0]) and torch.equal(dz, results[0][1]) for loss, dz in results)


@pytest.mark.parametrize("label", [7, 254, -1, 2**32, 2**32 + 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_label_that_is_no_class_is_an_error_on_the_cpu_and_nan_where_nobody_looks(channels: int, label: int) -> None:
    logits, masks, weights, class_weights = some(channels)
    masks = masks.long()
    masks[1, 1, 1] = label
    for backend in BACKENDS:
        with ops.using(backend), pytest.raises(ValueError, match="neither a class id below"):
            ops.dice_cross_entropy(logits, masks, weights)
    from distseg import kernels

    given = logits, masks, weights, torch.ones(3).double(), torch.zeros(3).double(), class_weights.expand(3, -1)
    sums = kernels.dice_cross_entropy_sums(*given)
    slopes = torch.ones(3, channels, dtype=torch.float64)
    gradient = kernels.dice_cross_entropy_gradient(*given, slopes, slopes)
    assert sums[:, 0].isnan().tolist() == [False, True, False]
    assert gradient[1, :, 1, 1].isnan().all() and gradient.isnan().sum() == channels
    eager = reference.dice_cross_entropy(*given, 0.5, 1e-5)
    assert eager.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_that_do_not_fit_are_an_error(backend: str) -> None:
    logits, masks, weights, _ = some(1)
    with ops.using(backend), pytest.raises(ValueError, match=r"class_weights \(3,\): need one for each of 2 classes"):
        ops.dice_cross_entropy(logits, masks, weights, class_weights=torch.ones(3))


def test_where_a_network_knows_the_share_of_lesion_and_nothing_else_dice_still_pulls() -> None:
    """There cross-entropy rests: its pull towards lesion on 2 % of the pixels is that towards skin on the others."""
    share = 0.02
    masks = torch.zeros(1, 50, 50, dtype=torch.uint8)
    masks.view(-1)[: round(share * 2500)] = 1
    weights = torch.full((1, 50, 50), 1 / 2500, dtype=torch.float64)
    logits = torch.full((1, 1, 50, 50), math.log(share / (1 - share)), dtype=torch.float64)

    def pulls(dice: float) -> tuple[float, float]:
        z = logits.clone().requires_grad_()
        [gradient] = torch.autograd.grad(ops.dice_cross_entropy(z, masks, weights, dice=dice, smooth=0.0), z)
        lesion = gradient[:, 0][masks == 1].sum().item()
        return lesion, gradient.sum().item() - lesion

    lesion, skin = pulls(0.0)
    assert lesion + skin == pytest.approx(0, abs=1e-15)
    lesion, skin = pulls(1.0)
    # D = 2I / (P + Y) with P = Y = s and I = s²: the slope in p is 1/s − 1/2 on lesion and −1/2 elsewhere.
    assert lesion == pytest.approx(-share * (1 / share - 0.5) * share * (1 - share), rel=1e-9)
    assert skin == pytest.approx((1 - share) * 0.5 * share * (1 - share), rel=1e-9)
    assert -lesion > 1.9 * skin


def test_a_classifier_of_overlapping_pixels_marks_small_lesions_under_dice_alone() -> None:
    """A feature N(0, 1) on skin and N(1.5, 1) on the 2 % that are lesion: next to no pixel is more likely lesion."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4, 50, 50, dtype=torch.uint8)
    masks.view(4, -1)[:, :50] = 1
    feature = torch.randn(4, 50, 50, generator=generator, dtype=torch.float64) + 1.5 * masks
    weights = torch.full((4, 50, 50), 1 / masks.numel(), dtype=torch.float64)

    def share_found(dice: float, class_weights: Tensor | None = None) -> float:
        """Of the lesions, after 300 steps."""
        line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([line], lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            logits = (line[0] * feature + line[1])[:, None]
            ops.dice_cross_entropy(logits, masks, weights, dice=dice, class_weights=class_weights).backward()
            optimizer.step()
        marked = line[0] * feature + line[1] > 0
        return marked[masks == 1].double().mean().item()

    assert share_found(0.0) < 0.03
    assert share_found(0.9) > 0.2
    assert share_found(0.0, torch.tensor([1.0, 49.0])) > 0.6
