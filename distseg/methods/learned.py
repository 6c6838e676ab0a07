"""Parameters that a method learns beside the network's, with an Adam of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Learned:
    """A few tensors under Adam (Kingma and Ba 2015): fed with the same gradients, every rank makes the same step."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, weight_decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, weight_decay=weight_decay)

    def step(self, gradients: Sequence[Tensor], lr: float | None = None) -> None:
        """One update; a gradient that is not finite counts as 0, since one bad batch must not end what is learned."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = torch.where(gradient.isfinite().all(), gradient, 0.0).to(parameter.dtype)
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """`{"0.parameter": …, "0.exp_avg": …, …}`, flat; a parameter that no step has moved has no averages yet."""
        state = {}
        for index, parameter in enumerate(self.parameters):
            state[f"{index}.parameter"] = parameter.detach().clone()
            slots = self.optimizer.state.get(parameter, {})
            state |= {f"{index}.{name}": value.detach().clone() for name, value in slots.items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for index, parameter in enumerate(self.parameters):
            own = {key.removeprefix(f"{index}."): v for key, v in state.items() if key.startswith(f"{index}.")}
            with torch.no_grad():
                parameter.copy_(own.pop("parameter"))
            # Adam keeps its counter on the CPU.
            self.optimizer.state[parameter] = {
                name: (value if name == "step" else value.to(parameter.device)).clone() for name, value in own.items()
            }
