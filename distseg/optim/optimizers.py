"""Optimisers by name: apex's fused ones where they construct, torch's elsewhere. The only module that imports apex."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distseg.errors import UserError
from distseg.optim.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> tuple[Optimizer, str]:
    """The optimiser for `parameters` (already on their device) and what it is made of, for the log."""
    parameters = list(parameters)
    arguments: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        arguments["momentum"] = config.momentum
    if config.implementation != "torch":
        try:
            return _apex(parameters, config.name, arguments), "apex"
        except (ImportError, RuntimeError) as error:
            if config.implementation == "apex":
                raise UserError(
                    f"optim.implementation apex: {error}; build apex from source with its CUDA extensions, or use auto"
                ) from None
    cls = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return cls(parameters, fused=True, **arguments), "torch fused"


def _apex(parameters: list[nn.Parameter], name: str, arguments: dict[str, Any]) -> Optimizer:
    # A build of apex without its extensions imports but cannot construct; the `apex` on PyPI is another project.
    try:
        from apex import optimizers
    except ImportError as error:
        raise ImportError(f"apex is not installed ({error})") from None
    if name == "sgd":
        return skippable(optimizers.FusedSGD)(parameters, **arguments)
    return skippable(optimizers.FusedAdam)(parameters, adam_w_mode=name == "adamw", **arguments)


def skippable(cls: Any) -> Any:
    """An optimiser class like `cls` that skips a step where its attribute `found_inf`, a scalar tensor, is true.

    torch's fused optimisers read the flag on the device; this costs one synchronisation with the host a step.
    """

    class Skippable(cls):
        found_inf: Tensor | None = None

        def step(self, closure: Callable | None = None) -> Any:
            if self.found_inf is not None and self.found_inf.item():
                return None
            return super().step(closure)

    return Skippable
