"""Parameters that a method learns beside the network's, with an Adam of their own."""

import copy
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

LearnedModule = TypeVar("LearnedModule", bound=nn.Module)


class Learned(Generic[LearnedModule]):
    """A small module under Adam (Kingma and Ba 2015): fed with the same gradients, every rank makes the same step."""

    def __init__(self, module: LearnedModule, lr: float, weight_decay: float = 0.0) -> None:
        self.module = module
        self.optimizer = torch.optim.Adam(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        for parameter in module.parameters():  # from zero, so that the state is whole before the first step
            slots = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = slots | {"step": torch.zeros((), device=parameter.device)}

    def stepped(self, gradients: Sequence[Tensor], lr: float | None = None) -> "Learned[LearnedModule]":
        """A copy that is one update further; at the rate `lr`, if it is given."""
        ahead = copy.deepcopy(self)
        for parameter, gradient in zip(ahead.module.parameters(), gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        if lr is not None:
            ahead.optimizer.param_groups[0]["lr"] = lr
        ahead.optimizer.step()
        ahead.optimizer.zero_grad()
        return ahead

    def adopt(self, ahead: "Learned[LearnedModule]", unless: Tensor) -> None:
        """Become `ahead`, unless the scalar `unless` is true or some of it is not finite. The host does not wait."""
        new = ahead.state_dict()
        finite = torch.stack([value.isfinite().all() for value in new.values()]).all()
        for name, value in self._state().items():
            value.copy_(torch.where(finite & ~unless, new[name], value))

    def state_dict(self) -> dict[str, Tensor]:
        """`{"NAME.parameter": …, "NAME.exp_avg": …, "NAME.exp_avg_sq": …, "NAME.step": …, …}`; copies."""
        return {name: value.clone() for name, value in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self._state().items():
            value.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.module.named_parameters():
            state[f"{name}.parameter"] = parameter.detach()
            state |= {f"{name}.{slot}": value for slot, value in self.optimizer.state[parameter].items()}
        return state
