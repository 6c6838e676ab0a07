"""A module as a pure function of its trainable parameters and images, and where its derivatives stop.

A network may stop gradients on purpose: by `torch.no_grad()`, by `detach()`, by `.data`. Reverse mode then takes what
it computes there for a constant. Forward mode carries tangents through `torch.no_grad()` unless it is told not to
(`tangents_stop_with_gradients`), and differences of the network's values stop nowhere (`stopped_gradient`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from distseg.meta.placement import Placement

Parameters = dict[str, Tensor]
"""The trainable parameters by name; where they are sharded, this rank's shards."""
Forward = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to logits (B, C, H, W)."""
Result = TypeVar("Result")


class Network(Protocol):
    def run(self, parameters: Parameters, compute: Callable[[Forward], Result]) -> Result:
        """compute(forward), where `forward` maps images to logits and the network has `parameters` until it returns.

        Backward passes belong into `compute`: checkpointing runs parts of the network again during them.
        """

    def __call__(self, parameters: Parameters, images: Tensor) -> Tensor:
        """The logits."""


class StatelessNetwork:
    """`module` as a pure function of (trainable parameters, images): no buffer, RNG stream or gradient changes.

    Buffers are cloned at each call, and attributes that the call assigns get their values back; random numbers come
    from a fork of the streams, so that each pass of a step, and the weighted step after it, drops the same units;
    autocast, which forward mode does not pass through, is off.
    """

    def __init__(self, module: nn.Module, placement: Placement) -> None:
        self._holder, self._placement = _Holder(module), placement

    def __call__(self, parameters: Parameters, images: Tensor) -> Tensor:
        return self.run(parameters, lambda forward: forward(images))

    def run(self, parameters: Parameters, compute: Callable[[Forward], Result]) -> Result:
        buffers = {name: buffer.detach().clone() for name, buffer in self._holder.named_buffers()}
        operands = {f"module.{name}": value for name, value in self._placement.operands(parameters).items()}
        device = next(iter(parameters.values())).device
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            attributes_kept(self._holder.module),
        ):
            return functional_call(self._holder, operands | buffers, (compute,))


class _Holder(nn.Module):
    """Runs a function of its child, so that functional_call's parameters are in place for all that it does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, compute: Callable[[Forward], Result]) -> Result:
        return compute(lambda images: self.module(images.contiguous()))


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo at the end what is assigned to attributes and buffers of the module and its children within."""
    tables = [table for child in module.modules() for table in (vars(child), child._buffers)]
    kept = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            if table.keys() != before.keys() or any(table[name] is not value for name, value in before.items()):
                table.clear()
                table.update(before)


@contextmanager
def tangents_stop_with_gradients(mode: "ForwardModeFollowsGradMode | None" = None) -> Iterator[None]:
    """Within, forward mode is off wherever gradients are: under `torch.no_grad()` tangents stop as cotangents do.

    Costs two to three microseconds for each call of a torch function (measured on a CPU). `mode` does more, if given.
    """
    with torch.enable_grad(), mode or ForwardModeFollowsGradMode():
        try:
            yield
        finally:
            torch._C._set_fwd_grad_enabled(True)


class ForwardModeFollowsGradMode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(torch.is_grad_enabled())
        return result


def stopped_gradient(network: Network, parameters: Parameters, images: Tensor) -> Tensor:
    """How much of the gradient the network stops: (2,) float64, squared norms of what is stopped and of the whole.

    The gradient is that of a random projection of the logits; the whole one is from a pass in which `torch.no_grad()`,
    `detach()` and `.data` stop nothing. Where such a pass fails, or takes a number out of the graph, (1, 0). Where
    parameters are sharded these are a rank's parts of sums.
    """
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}

    def gradient(forward: Forward) -> list[Tensor]:
        logits = forward(images)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        projected = (logits * noise.to(logits)).sum()
        return list(torch.autograd.grad(projected, list(leaves.values()), materialize_grads=True))

    def unstopped(forward: Forward) -> list[Tensor]:
        def without_stops(batch: Tensor) -> Tensor:
            with _StopsIgnored():
                return forward(batch)

        return gradient(without_stops)

    with torch.enable_grad():
        expected = network.run(leaves, gradient)
        try:
            actual = network.run(leaves, unstopped)
        except RuntimeError:
            return torch.tensor([1.0, 0.0], dtype=torch.float64, device=expected[0].device)
    both = (torch._foreach_sub(actual, expected), actual)
    return torch.stack([torch.stack(torch._foreach_norm(part)).double().square().sum() for part in both])


_DETACHES = frozenset({Tensor.detach, torch.detach, vars(torch._C.TensorBase)["data"].__get__})
_TAKES_A_NUMBER = frozenset({Tensor.item, Tensor.tolist, Tensor.__float__})


class _StopsIgnored(TorchFunctionMode):
    """Within, nothing stops a gradient; what takes a number out of the graph raises RuntimeError."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch._C._set_grad_enabled:
            return None
        if function in _DETACHES:
            return args[0].view_as(args[0])
        if function in _TAKES_A_NUMBER and args[0].requires_grad:
            raise RuntimeError(f"{function} takes a number out of the graph")
        return function(*args, **(kwargs or {}))
