"""Every backend against float64 eager torch, in value and in every derivative; what has no derivative is an error."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from distseg import ops
from distseg.ops import reference
from distseg.testing.operator_cases import CASES, Case, check

BACKENDS = ["csrc", "triton", "reference"]
"""Triton in its interpreter: conftest.py says so before the kernels are imported."""
FAST = ["csrc", "triton"]


LARGE = 10_000
"""Logits of a case from which on Triton's interpreter takes ten seconds."""


def is_slow(case: Case) -> bool:
    """In Triton's interpreter: large, or far from float32, three channels and contiguous in more than one way."""
    channels = case.shape[1]
    is_one_of_all = case.name.startswith(("float", "bfloat"))
    odd = (channels != 3) + (case.dtype != torch.float32) + (case.layout != "contiguous")
    is_twin = channels == 1 and (case.poisoned or "tiles" in case.name) and case.ignored < 1
    return math.prod(case.shape) > LARGE or is_twin or (is_one_of_all and odd > 1)


def backends_and_cases() -> Iterator[Any]:
    for backend, case in itertools.product(BACKENDS, CASES):
        slow = backend == "triton" and is_slow(case)
        yield pytest.param(backend, case, marks=pytest.mark.slow if slow else (), id=f"{backend}-{case.name}")


@pytest.mark.parametrize(("backend", "case"), backends_and_cases())
def test_agrees_with_float64_eager_torch(backend: str, case: Case) -> None:
    with ops.using(backend):
        check(case)


def some(channels: int) -> tuple[torch.Tensor, ...]:
    """Logits, tangents, masks and weights in float64; some pixels are ignored."""
    generator = torch.Generator().manual_seed(1)
    logits, tangents = torch.randn(2, 2, channels, 3, 5, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, max(2, channels), (2, 3, 5), generator=generator)
    masks[0, 0, :2] = ops.IGNORE
    return logits, tangents, masks, torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", FAST)
def test_derivatives_by_finite_differences(backend: str, channels: int) -> None:
    logits, tangents, masks, weights = (x.requires_grad_() if x.is_floating_point() else x for x in some(channels))
    scale, level = torch.tensor([[0.3, 0.7], [0.1, 0.2]], dtype=torch.float64)

    def loss(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.weighted_loss(z, masks, w, scale, level)

    def losses(z: torch.Tensor) -> torch.Tensor:
        return ops.pixel_loss(z, masks)

    # The interpreter takes milliseconds a launch, so there one random direction stands for the whole Jacobian; and the
    # legacy vmap of batched gradients loops over dispatcher operators alone.
    how = {"fast_mode": True} if backend == "triton" else {}
    batched = {"check_batched_grad": backend == "csrc"}
    with ops.using(backend):
        for function, inputs in ((loss, (logits, weights)), (losses, (logits,))):
            assert gradcheck(function, inputs, check_forward_ad=True, **batched, **how)
            assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **how)
        assert gradcheck(lambda z, t: ops.alignment(z, t, masks), (logits, tangents), **batched, **how)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backend", FAST)
def test_forward_mode_under_torch_func_is_no_silent_zero(backend: str, channels: int) -> None:
    logits, tangents, masks, weights = some(channels)
    expected = reference.alignment(logits, tangents, masks)
    with ops.using(backend):
        _, of_pixels = torch.func.jvp(lambda z: ops.pixel_loss(z, masks), (logits,), (tangents,))
        _, of_sum = torch.func.jvp(lambda z: ops.weighted_loss(z, masks, weights), (logits,), (tangents,))
    torch.testing.assert_close(of_pixels, expected)
    torch.testing.assert_close(of_sum, (weights * expected).sum())
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("backend", FAST)
def test_vmap_and_hessian_under_torch_func(backend: str) -> None:
    logits, tangents, masks, weights = some(3)

    def loss(operators, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if operators is reference:
            return reference.weighted_loss(z, masks, w, torch.ones(2).double(), torch.zeros(2).double()).sum()
        return ops.weighted_loss(z, masks, w)

    many = torch.stack([logits, tangents, 2 * logits])
    expected = torch.stack([loss(reference, z, weights) for z in many])
    hessian = torch.func.hessian(lambda z: loss(reference, z, weights))(logits)
    with ops.using(backend):
        actual = torch.func.vmap(lambda z: loss(ops, z, weights))(many)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.func.hessian(lambda z: loss(ops, z, weights))(logits), hessian)


@pytest.mark.parametrize("backend", FAST)
def test_what_has_no_derivative_raises(backend: str) -> None:
    logits, tangents, masks, weights = some(1)
    z = logits.clone().requires_grad_()
    with ops.using(backend):
        [first] = torch.autograd.grad(ops.weighted_loss(z, masks, weights), z, create_graph=True)
        [second] = torch.autograd.grad((first * tangents).sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable twice, not three times"):
            torch.autograd.grad((second * tangents).sum(), z)
        with pytest.raises(RuntimeError, match="constant to autograd"):
            ops.positive_alignment(z, tangents, masks)[0].sum().backward()
        with pytest.raises(RuntimeError, match="constant to autograd"):
            torch.func.jvp(lambda w: ops.positive_part(w, masks)[0], (weights,), (weights,))
        with pytest.raises(RuntimeError, match="no forward mode"):
            torch.func.jvp(lambda x: ops.alignment(x, tangents, masks), (logits,), (tangents,))
        scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="not differentiable in scale and level"):
            ops.weighted_loss(logits, masks, weights, scale).backward()


@pytest.mark.parametrize("backend", FAST)
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(backend: str) -> None:
    """The gradient made in the forward pass is handed out, and scaled, without being spent."""
    logits, _, masks, weights = some(3)
    z = logits.clone().requires_grad_()
    with ops.using(backend):
        loss = ops.weighted_loss(z, masks, weights)
        once, half, again = (
            torch.autograd.grad(loss, z, torch.tensor(factor).double(), retain_graph=True)[0] for factor in (1, 0.5, 1)
        )
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    torch.testing.assert_close(half, 0.5 * once)


def test_a_gradient_in_float16_does_not_underflow_under_a_loss_scale() -> None:
    """Weights that sum to 1 over a batch are 1e-6 each: their gradients exist in float16 once scaled, not before."""
    logits = torch.zeros(1, 1, 4, 4, dtype=torch.float16, requires_grad=True)
    masks, weights = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 1e-8)
    (2.0**16 * ops.weighted_loss(logits, masks, weights)).backward()
    torch.testing.assert_close(logits.grad.float(), torch.full((1, 1, 4, 4), 2.0**16 * 0.5e-8), rtol=2e-3, atol=0)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, tangents = torch.randn(2, 3, 1, 97, 101, generator=generator)
    masks = torch.zeros(3, 97, 101, dtype=torch.uint8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            positive, sums = ops.positive_alignment(logits, tangents, masks)
            results.append((sums, ops.weighted_loss(logits, masks, positive)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(s, results[0][0]) and torch.equal(w, results[0][1]) for s, w in results)


@pytest.mark.parametrize(
    "name",
    ["alignment", "pixel_loss", "weighted_loss", "double_backward", "dice", "dice_gradient", "positive", "normalise"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_dispatcher_operators_keep_to_their_schemas(name: str, channels: int) -> None:
    logits, tangents, masks, weights = some(channels)
    vector = torch.rand(2, dtype=torch.float64)
    classes, slopes = torch.rand(2, max(2, channels)).double(), torch.rand(2, channels).double()
    with ops.using("csrc"):
        operators = ops.raw_operators(torch.device("cpu"))
    calls = {
        "alignment": (operators.alignment, (logits, tangents, masks, True)),
        "pixel_loss": (operators.pixel_loss, (logits, masks)),
        "weighted_loss": (operators.weighted_loss, (logits, masks, weights, vector, vector, True)),
        "double_backward": (
            operators.weighted_loss_double_backward,
            (logits, masks, weights, vector, vector, vector, tangents, True),
        ),
        "dice": (operators.dice_cross_entropy_sums, (logits, masks, weights, vector, vector, classes)),
        "dice_gradient": (
            operators.dice_cross_entropy_gradient,
            (logits, masks, weights, vector, vector, classes, slopes, slopes),
        ),
        "positive": (operators.positive_part, (weights, masks, 2)),
        "normalise": (operators.normalise, (None, masks, vector, vector)),
    }
    operator, arguments = calls[name]
    for layout in (torch.contiguous_format, torch.channels_last):
        formatted = tuple(
            a.contiguous(memory_format=layout) if isinstance(a, torch.Tensor) and a.ndim == 4 else a for a in arguments
        )
        torch.library.opcheck(operator.default, formatted)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [7, 254, -1, 2**32, 2**32 + 255])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_is_no_class_is_an_error_on_the_cpu(backend: str, label: int, channels: int) -> None:
    logits, tangents, masks, weights = some(channels)
    masks[1, 1, 1] = label
    calls = [
        lambda: ops.pixel_loss(logits, masks),
        lambda: ops.weighted_loss(logits, masks, weights),
        lambda: ops.alignment(logits, tangents, masks),
        lambda: ops.positive_alignment(logits, tangents, masks),
    ]
    with ops.using(backend):
        for call in calls:
            with pytest.raises(ValueError, match=f"neither a class id below {max(2, channels)} nor 255"):
                call()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("label", [7, 254, -1, 2**32, 2**32 + 255])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_where_nobody_looks_a_label_that_is_no_class_makes_nan_of_its_pixel(
    backend: str, label: int, channels: int
) -> None:
    """As on a GPU, which is not waited for: the raw operators."""
    logits, tangents, masks, weights = some(channels)
    wrong = torch.zeros(masks.shape, dtype=torch.bool)
    wrong[1, 1, 1] = True
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def results(labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if backend == "triton":
            from distseg import kernels

            sums, gradient = kernels.weighted_loss(logits, labels, weights, ones, zeros, True)
            aligned = kernels.alignment(logits, tangents, labels, False)[0]
            return kernels.pixel_loss(logits, labels), aligned, sums, gradient
        z = logits.clone().requires_grad_()
        sums = reference.weighted_loss(z, labels, weights, ones, zeros)
        [gradient] = torch.autograd.grad(sums.sum(), z)
        return reference.pixel_loss(z, labels), reference.alignment(logits, tangents, labels), sums, gradient

    expected = results(torch.where(wrong, 0, masks))
    for labels in (torch.where(wrong, label, masks), torch.where(wrong, label % 256, masks).to(torch.uint8)):
        if not ((labels >= max(2, channels)) & (labels != ops.IGNORE) | (labels < 0)).any():
            continue  # in a byte these are 0 and 255
        loss, aligned, sums, gradient = results(labels)
        for actual, right in ((loss, expected[0]), (aligned, expected[1]), (gradient, expected[3])):
            there = wrong if actual.ndim == 3 else wrong[:, None].expand_as(actual)
            assert actual[there].isnan().all()
            torch.testing.assert_close(actual[~there], right[~there], rtol=1e-12, atol=1e-12)
        assert sums.isnan().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(2, 5, 0), (2, 0, 5), (0, 4, 4), (2, 0, 0)])
@pytest.mark.parametrize("cell", [1, 3, 2**62])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_positive_part_of_nothing_is_nothing(backend: str, cell: int, shape: tuple[int, int, int]) -> None:
    with ops.using(backend):
        positive, sums = ops.positive_part(torch.rand(shape), torch.zeros(shape, dtype=torch.uint8), cell)
    assert positive.shape == shape and sums.shape == (shape[0], 5)
    assert sums.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_an_error(backend: str) -> None:
    logits, _, masks, weights = some(3)
    with ops.using(backend):
        with pytest.raises(ValueError, match=r"logits \(2, 3, 3, 5\) and masks \(2, 3, 4\)"):
            ops.pixel_loss(logits, masks[..., :4])
        with pytest.raises(ValueError, match="need integer class ids"):
            ops.pixel_loss(logits, masks.float())
        with pytest.raises(ValueError, match=r"weights \(3, 5\)"):
            ops.weighted_loss(logits, masks, weights[0])
