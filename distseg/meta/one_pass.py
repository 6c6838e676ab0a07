"""The weighted step's own forward pass with the tangent in it: logits with their graph, and ż, in one pass.

`estimators.logits_along` is a pass of its own, after which the weighted step computes the same logits again. Here the
parameters that the step learns are made dual numbers with gradients on, so that one pass yields the logits, the graph
that their loss is differentiated through, and the tangents that the weights are made of.

Autograd would record a graph of the tangents too. It is cut after every torch function, and what it saved is freed
there. What stays until the pass ends are the tangents themselves, which autograd keeps beside the features that it
saves: as much memory again as these take.

The two ways give the same numbers, for networks that can go both. `one_pass_agrees` tries that: a network with
activation checkpointing, for instance, saves other tensors in a pass with tangents than when it is run again.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from distseg.meta.estimators import apart, logits_along, owns_storage
from distseg.meta.network import (
    Forward,
    ForwardModeFollowsGradMode,
    Network,
    Parameters,
    tangents_stop_with_gradients,
)

TOLERANCE = 1e-3
"""Of `one_pass_agrees`, relative: far above rounding, and far below what a part that is left out makes."""


def logits_and_tangents(
    network: nn.Module, directions: Mapping[Tensor, Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """z and ż (B, C, H, W) of images (B, 3, H, W): z with its graph, ż a constant.

    directions: of each parameter of `network` that is trained, the tangent. A backward pass from z reaches these
    parameters and their hooks, as after `network(images)`; buffers and random streams change as there.
    """
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(_own_storage(parameter), directions[parameter])
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        with tangents_stop_with_gradients(_TangentsHaveNoGraph()):
            logits, tangents = forward_ad.unpack_dual(functional_call(network, duals, (images.contiguous(),)))
    return logits, torch.zeros_like(logits) if tangents is None else tangents.detach()


def one_pass_agrees(network: Network, parameters: Parameters, gradient: Parameters, images: Tensor) -> Tensor:
    """Whether one pass gives the network's logits, tangents and gradients, () bool; nothing is left changed.

    Held against two passes, with the gradient of a random projection of the logits. False too where one pass fails, as
    it does for what forward mode cannot do beside autograd, or has no memory for.
    """
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}

    def gradient_of(logits: Tensor) -> list[Tensor]:
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        projected = (logits * noise.to(logits)).sum()
        return list(torch.autograd.grad(projected, list(leaves.values()), materialize_grads=True))

    def in_one_pass() -> list[Tensor]:
        with ExitStack() as level:
            level.enter_context(forward_ad.dual_level())
            duals = {name: forward_ad.make_dual(_own_storage(leaf), gradient[name]) for name, leaf in leaves.items()}

            def compute(forward: Forward) -> list[Tensor]:
                with tangents_stop_with_gradients(_TangentsHaveNoGraph()):
                    logits, tangents = forward_ad.unpack_dual(forward(images))
                level.close()  # a training step's backward pass is outside of it
                tangents = torch.zeros_like(logits) if tangents is None else tangents.detach()
                return [logits.detach(), tangents, *gradient_of(logits)]

            return network.run(duals, compute)

    with torch.enable_grad():
        expected = [
            *logits_along(network, parameters, gradient, images),
            *network.run(leaves, lambda forward: gradient_of(forward(images))),
        ]
        try:
            actual = in_one_pass()
        except RuntimeError:
            return torch.zeros((), dtype=torch.bool, device=images.device)
    near = [(a - b).norm() <= TOLERANCE * b.norm() for a, b in zip(actual, expected, strict=True)]
    return torch.stack(near).all()


class _TangentsHaveNoGraph(ForwardModeFollowsGradMode):
    """Within, what a torch function returns has a tangent that is a constant to autograd."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.nn.functional.group_norm:
            return _with_tangent_apart(function, args, kwargs or {})
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, Tensor):
            in_place = any(result is argument for argument in args)
            return result if _cut(result) or in_place else _ConstantTangent.apply(result)
        if isinstance(result, tuple | list):
            for item in result:
                if isinstance(item, Tensor):
                    _cut(item)
        return result


def _cut(tensor: Tensor) -> bool:
    """Take the graph from the tangent of `tensor`, if there is one; whether that is done. A view's stays."""
    if not tensor.requires_grad:
        return True
    tangent = forward_ad.unpack_dual(tensor).tangent
    if tangent is None or not tangent.requires_grad:
        return True
    if tangent._is_view():
        return False
    tangent.detach_()
    return True


def _with_tangent_apart(function: Any, args: tuple, kwargs: dict) -> Tensor:
    """A function's value with its graph, and its tangent from a second call without one.

    For group normalisation, whose saved means and deviations have tangents too, with graphs that cannot be reached and
    hold several times the features (torch 2.13).
    """
    torch._C._set_fwd_grad_enabled(False)
    try:
        value = function(*args, **kwargs)
    finally:
        torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
    with torch.no_grad():
        tangent = forward_ad.unpack_dual(function(*args, **kwargs)).tangent
    # The tangent is a view made without gradients, which an in-place function of the value could not write to.
    tangent = None if tangent is None else tangent.detach()
    if tangent is None or not torch.is_grad_enabled():
        return value
    return _Joined.apply(value, tangent, *args, *kwargs.values())


class _Joined(torch.autograd.Function):
    """`value` with `tangent`; the other inputs are those that it is a function of, one of which has a tangent."""

    @staticmethod
    def forward(value: Tensor, tangent: Tensor, *inputs: Any) -> Tensor:
        return _alias(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tangent, ctx.count = inputs[1], len(inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, *[None] * (ctx.count - 1)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        tangent, ctx.tangent = ctx.tangent, None
        return tangent


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, and no view of `tensor` to autograd, which in-place functions would cost more."""
    place = tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    return tensor.new_empty(0).set_(*place)


class _ConstantTangent(torch.autograd.Function):
    """The same values, and their tangent without a graph."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return _alias(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.detach()


class _Apart(torch.autograd.Function):
    """`estimators.apart`, differentiable."""

    @staticmethod
    def forward(parameter: Tensor) -> Tensor:
        return apart(parameter.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


def _own_storage(parameter: Tensor) -> Tensor:
    # Contiguous, because group normalisation has no forward mode for channels-last features (torch 2.13).
    parameter = parameter.contiguous()
    return parameter if owns_storage(parameter) else _Apart.apply(parameter)
