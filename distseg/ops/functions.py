"""How autograd sees the raw operators: reverse mode, forward mode, and both of them twice.

With r = softmax(z) − onehot(y) (σ(z) − y where C = 1) and H its Jacobian in z, four operators close under
differentiation; W are the per-pixel weights w̃ = scale·w + level:

    PixelLoss      ℓ(z)             d/dz = LossGradient with W the cotangent       jvp = Alignment
    WeightedLoss   Σ W·ℓ(z)         d/dz = LossGradient, d/dw = PixelLoss          jvp = Σ W·Alignment + Σ ẇ·PixelLoss
    LossGradient   up·W·r           d/dz, d/dw, d/dup = DoubleBackward             jvp = DoubleBackward + LossGradient
    Alignment      U = ⟨r, t⟩       d/dt = LossGradient, d/dz = DoubleBackward     jvp raises

The derivatives of DoubleBackward, the third of the loss, raise; so do those of the maps that are constants to autograd.
DiceCrossEntropy is differentiable once, in the logits, in either mode; everything else raises.
Every tensor has the images first, so vmap folds its dimension into them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from distseg.ops.backends import raw_operators


class _ImageFunction(Function):
    """A Function whose tensors, arguments and results, all have the images as their first dimension."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def fold(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten(0, 1)

        results = cls.apply(*map(fold, arguments, in_dims))
        if isinstance(results, Tensor):
            return _unfold(results, info.batch_size), 0
        return tuple(_unfold(result, info.batch_size) for result in results), (0,) * len(results)


class PixelLoss(_ImageFunction):
    """ℓ (B, H, W) from logits and masks."""

    @staticmethod
    def forward(logits: Tensor, masks: Tensor) -> Tensor:
        return raw_operators(logits.device).pixel_loss(logits, masks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, masks = ctx.saved_tensors
        return LossGradient.apply(logits, masks, upstream.contiguous(), *_as_they_are(upstream)), None

    @staticmethod
    def jvp(ctx: Any, tangents: Tensor, _: Any) -> Any:
        logits, masks = ctx.saved_tensors
        return Alignment.apply(logits, tangents, masks)


class WeightedLoss(_ImageFunction):
    """Σ w̃·ℓ of each image (B,), and the gradient in the logits that the same pass makes for the backward.

    The gradient is empty unless asked for. It serves a first-order backward; one that is differentiated itself goes
    through LossGradient.
    """

    @staticmethod
    def forward(
        logits: Tensor, masks: Tensor, weights: Tensor | None, scale: Tensor, level: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        return raw_operators(logits.device).weighted_loss(logits, masks, weights, scale, level, with_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.with_gradient = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
        logits, masks, weights, scale, level, gradient = ctx.saved_tensors
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            raise RuntimeError("weighted_loss is not differentiable in scale and level: detach them")
        for_logits = for_weights = None
        if upstream is not None and ctx.needs_input_grad[0]:
            if ctx.with_gradient and not torch.is_grad_enabled():
                for_logits = _times_upstream(gradient, upstream)
                ctx.with_gradient = not upstream.is_cuda  # there it was scaled in place, and is now somebody else's
            else:
                for_logits = LossGradient.apply(logits, masks, weights, scale, level, upstream)
        if upstream is not None and ctx.needs_input_grad[2]:
            for_weights = (upstream * scale)[:, None, None] * PixelLoss.apply(logits, masks)
        return for_logits, None, for_weights, None, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        logits_t: Tensor | None,
        _: Any,
        weights_t: Tensor | None,
        scale_t: Tensor | None,
        level_t: Tensor | None,
        __: Any,
    ) -> Any:
        logits, masks, weights, scale, level = ctx.saved_tensors
        if scale_t is not None or level_t is not None:
            raise RuntimeError("weighted_loss is not differentiable in scale and level: detach them")
        change = torch.zeros_like(scale)
        if logits_t is not None:
            change = change + (_weights(weights, scale, level) * Alignment.apply(logits, logits_t, masks)).sum((1, 2))
        if weights_t is not None:
            change = change + scale * (weights_t * PixelLoss.apply(logits, masks)).sum((1, 2))
        return change, None


class LossGradient(_ImageFunction):
    """upstream·w̃·r (B, C, H, W): the gradient of Σ upstream·w̃·ℓ in the logits."""

    @staticmethod
    def forward(
        logits: Tensor, masks: Tensor, weights: Tensor | None, scale: Tensor, level: Tensor, upstream: Tensor
    ) -> Tensor:
        operators = raw_operators(logits.device)
        return operators.weighted_loss(logits, masks, weights, scale * upstream, level * upstream, True)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> Any:
        if cotangent is None:
            return (None,) * 6
        in_logits, _, in_weights, *_, in_upstream = ctx.needs_input_grad
        for_logits, for_weights, for_upstream = DoubleBackward.apply(*ctx.saved_tensors, cotangent, in_logits)
        return (
            for_logits if in_logits else None,
            None,
            for_weights if in_weights else None,
            None,
            None,
            for_upstream if in_upstream else None,
        )

    @staticmethod
    def jvp(
        ctx: Any,
        logits_t: Tensor | None,
        _: Any,
        weights_t: Tensor | None,
        __: Any,
        ___: Any,
        upstream_t: Tensor | None,
    ) -> Any:
        logits, masks, weights, scale, level, upstream = ctx.saved_tensors
        change = torch.zeros_like(logits)
        if logits_t is not None:
            change = change + DoubleBackward.apply(logits, masks, weights, scale, level, upstream, logits_t, True)[0]
        moved = torch.zeros(masks.shape, dtype=scale.dtype, device=scale.device)
        if weights_t is not None:
            moved = moved + (upstream * scale)[:, None, None] * weights_t
        if upstream_t is not None:
            moved = moved + upstream_t[:, None, None] * _weights(weights, scale, level)
        return change + LossGradient.apply(logits, masks, moved, *_as_they_are(moved))


class Alignment(_ImageFunction):
    """U = ⟨r, t⟩ (B, H, W) from logits, tangents and masks."""

    @staticmethod
    def forward(logits: Tensor, tangents: Tensor, masks: Tensor) -> Tensor:
        return raw_operators(logits.device).alignment(logits, tangents, masks, False)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, tangents, masks = ctx.saved_tensors
        weights = (upstream.contiguous(), *_as_they_are(upstream))
        for_logits = for_tangents = None
        if ctx.needs_input_grad[0]:
            for_logits = DoubleBackward.apply(logits, masks, *weights, tangents, True)[0]
        if ctx.needs_input_grad[1]:
            for_tangents = LossGradient.apply(logits, masks, *weights)
        return for_logits, for_tangents, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("alignment has no forward mode: it is a derivative already")


class DoubleBackward(_ImageFunction):
    """Cotangents of logits, weights and upstream for a cotangent of LossGradient."""

    @staticmethod
    def forward(logits: Tensor, masks: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *weighted, cotangent, for_logits = arguments
        operators = raw_operators(logits.device)
        return operators.weighted_loss_double_backward(logits, masks, *weighted, cotangent.to(logits.dtype), for_logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError("the loss is differentiable twice, not three times")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("the loss is differentiable twice, not three times")


class DiceCrossEntropy(_ImageFunction):
    """The loss of each image (B,), and the slopes (B, C) that its gradient is made of: `_dice_of_sums`.

    A pass over the logits makes sums, the backward's another one the gradient. Class weights are (B, K).
    """

    @staticmethod
    def forward(
        logits: Tensor,
        masks: Tensor,
        weights: Tensor | None,
        scale: Tensor,
        level: Tensor,
        class_weights: Tensor,
        dice: float,
        smooth: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operators = raw_operators(logits.device)
        sums = operators.dice_cross_entropy_sums(logits, masks, weights, scale, level, class_weights)
        results = _dice_of_sums(sums, logits.shape[1], dice, smooth)
        loss, inside, outside = (result.to(scale.dtype) for result in results)
        return loss, inside, outside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, class_weights, dice, _ = inputs
        _, inside, outside = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(inside, outside)
        saved = (*tensors, (1 - dice) * class_weights, inside, outside)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        if any(ctx.needs_input_grad[1:]):
            raise RuntimeError("dice_cross_entropy is differentiable in the logits alone: detach its other arguments")
        gradient = None if upstream is None else DiceGradient.apply(*ctx.saved_tensors, upstream)
        return (gradient, *(None,) * 7)

    @staticmethod
    def jvp(ctx: Any, logits_t: Tensor | None, *others: Any) -> Any:
        if any(other is not None for other in others):
            raise RuntimeError("dice_cross_entropy is differentiable in the logits alone: detach its other arguments")
        scale = ctx.saved_tensors[3]
        gradient = DiceGradient.apply(*ctx.saved_tensors, torch.ones_like(scale))
        return (gradient.to(scale.dtype) * logits_t).sum((1, 2, 3)), None, None


class DiceGradient(_ImageFunction):
    """upstream · the gradient of DiceCrossEntropy in the logits (B, C, H, W)."""

    @staticmethod
    def forward(logits: Tensor, masks: Tensor, weights: Tensor | None, *vectors: Tensor) -> Tensor:
        scale, level, *slopes, upstream = vectors
        # The slopes are those of the weights as they are; the gradient is linear in the weights beside them.
        scales = scale * upstream, level * upstream
        return raw_operators(logits.device).dice_cross_entropy_gradient(logits, masks, weights, *scales, *slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError("dice_cross_entropy is differentiable once, not twice")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError("dice_cross_entropy is differentiable once, not twice")


class Constant(_ImageFunction):
    """A raw operator by name whose results are constants to autograd: differentiating them raises."""

    @staticmethod
    def forward(name: str, device: torch.device, *arguments: Any) -> Any:
        return getattr(raw_operators(device), name)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(f"{ctx.name} is a constant to autograd: detach its arguments")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(f"{ctx.name} is a constant to autograd: detach its arguments")


class ConstantOfBatch(Constant):
    """A `Constant` of which not every tensor has the images first: vmap raises."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        raise RuntimeError(f"{arguments[0]} has no vmap: its batch is the first dimension")


def _dice_of_sums(sums: Tensor, channels: int, dice: float, smooth: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each image (B,) from sums (B, 2 + 3C); and its slope in the probabilities, by W, in two parts (B, C).

    The slope in p_c is `outside`, and `inside` more where c is the label: −λ M/n ∂D_c/∂p_c of the n classes that count.
    """
    cross_entropy, mass = sums[:, 0], sums[:, 1:2]
    both, predicted, labelled = sums[:, 2:].unflatten(1, (3, channels)).unbind(1)
    counts = labelled > 0
    if channels > 1:  # class 0 is the background
        counts = counts & (torch.arange(channels, device=sums.device) > 0)
    size = torch.where(counts, predicted + labelled + smooth * mass, 1.0)
    share = torch.where(counts, dice * mass / counts.sum(1, keepdim=True).clamp(min=1), 0.0)
    missed = (predicted + labelled - 2 * both) / size
    loss = (1 - dice) * cross_entropy + (share * torch.where(counts, missed, 0.0)).sum(1)
    return loss, -2 * share / size, share * (2 * both + smooth * mass) / size.square()


def _weights(positive: Tensor | None, scale: Tensor, level: Tensor) -> Tensor:
    """w̃ without looking at the masks: for a product with a map that is 0 at ignored pixels."""
    weights = level[:, None, None]
    return weights if positive is None else scale[:, None, None] * positive + weights


def _as_they_are(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale, level and upstream under which a map of weights stands for itself."""
    ones = torch.ones(like.shape[0], dtype=like.dtype, device=like.device)
    return ones, torch.zeros_like(ones), ones


def _times_upstream(gradient: Tensor, upstream: Tensor) -> Tensor:
    if upstream.is_cuda:
        return raw_operators(upstream.device).rescale_(gradient, upstream)
    return gradient if _is_one(upstream) else gradient * upstream[:, None, None, None].to(gradient.dtype)


def _is_one(upstream: Tensor) -> bool:
    """Whether nothing multiplied the loss: the CPU can look."""
    try:
        return bool((upstream == 1).all())
    except RuntimeError:  # under vmap it is many numbers
        return False


def _unfold(result: Any, size: int) -> Tensor:
    return result.reshape(size, result.shape[0] // size, *result.shape[1:])
