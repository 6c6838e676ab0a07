"""T-Loss on the noisy stream: heavy tails for wrong pixels, and how heavy is learned. No clean image.

Gonzalez-Jimenez, Lionetti, Gottfrois, Gröger, Navarini, Pouly 2023, "Robust T-Loss for Medical Image Segmentation". As
there, ν starts at 1 and log ν is learned beside the network at the network's rate, here always by Adam. The loss is
divided by the number of pixels, as every loss of distseg: Adam does not see a constant factor, SGD's rate does.
"""

import torch
from torch import Tensor

from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.learned import Learned
from distseg.methods.step import Parts, WeightedBatch
from distseg.methods.uniform import Uniform
from distseg.ops.robust import student_t_loss


class TLoss(Uniform):
    def __init__(self, parts: Parts) -> None:
        stream = parts.noisy_stream()
        super().__init__(parts, lambda step: [stream])
        # In double precision: one number, whose gradient is a small difference of large ones.
        self.log_nu = torch.zeros((), dtype=torch.float64, device=parts.device, requires_grad=True)
        self.learned = Learned([self.log_nu], lr=parts.config.optim.lr)
        self.gradient = torch.zeros_like(self.log_nu, requires_grad=False)

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        batches, _ = super().draw(step, diagnose)
        return batches, {"nu": self.log_nu.detach().exp()}

    def loss(self, logits: Tensor, masks: Tensor, weights: WeightMap) -> Tensor:
        # Σ over images of −log t / N: W = 1/N is one number an image.
        loss = (weights.level.to(logits.dtype) * student_t_loss(logits, masks, self.log_nu)).sum()
        # By itself, since the engine's backward is of the network alone; the graph between the two is a few scalars.
        [gradient] = torch.autograd.grad(loss, [self.log_nu], retain_graph=True)
        self.gradient += gradient
        return loss

    def finish_step(self, lr: float) -> None:
        # The trainer multiplies the weights by the number of ranks, so that the mean over ranks is the global gradient.
        total, ranks = self.sum_over_ranks(torch.stack([self.gradient, torch.ones_like(self.gradient)]))
        self.learned.step([total / ranks], lr)
        self.gradient.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.learned.load_state_dict(state)
