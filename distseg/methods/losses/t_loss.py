"""T-Loss: heavy tails for wrong pixels, and how heavy is learned.

Gonzalez-Jimenez, Lionetti, Gottfrois, Gröger, Navarini, Pouly 2023, "Robust T-Loss for Medical Image Segmentation". As
there, ν starts at 1 and log ν is learned beside the network at the network's rate, here always by Adam. The loss is
divided by the number of pixels, as every loss of distseg: Adam does not see a constant factor, SGD's rate does.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.context import Context
from distseg.methods.learned import Learned
from distseg.methods.part import Loss
from distseg.ops.robust import student_t_loss
from distseg.section import Section


class TLossConfig(Section):
    kind: Literal["t_loss"] = "t_loss"

    def build(self, context: Context) -> Loss:
        return TLoss(context.device)


class TLoss(Loss):
    """−log t of an image's errors as one vector: it takes one weight an image, and no map of pixels."""

    def __init__(self, device: torch.device) -> None:
        # In double precision: one number, whose gradient is a small difference of large ones.
        log_nu = nn.Parameter(torch.zeros((), dtype=torch.float64, device=device))
        self.learned = Learned(nn.ParameterDict({"log_nu": log_nu}), lr=1e-3)

    @property
    def log_nu(self) -> Tensor:
        log_nu: Tensor = self.learned.module["log_nu"]
        return log_nu

    def terms(self, logits: Tensor, labels: Tensor, weights: WeightMap) -> tuple[Tensor, Tensor]:
        """The evidence (1,) is the gradient in log ν."""
        # Σ over images of W · −log t: W = 1/N is one number an image.
        loss = (weights.level.to(logits.dtype) * student_t_loss(logits, labels, self.log_nu)).sum()
        # By itself, since the engine's backward is of the network alone; the graph between the two is a few scalars.
        [gradient] = torch.autograd.grad(loss, [self.log_nu], retain_graph=True)
        return loss, gradient.reshape(1)

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        before = self.log_nu.detach().exp()
        self.learned.adopt(self.learned.stepped([evidence.squeeze()], lr), unless=skipped)
        return {"nu": before}

    def state_dict(self) -> dict[str, Tensor]:
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.learned.load_state_dict(state)
