"""MONAI, training without weights: its Dice and cross-entropy loss, and the SGD of nnU-Net."""

from collections.abc import Callable

import contender
import torch
from monai.losses import DiceCELoss


def build(case: contender.Case) -> Callable[[], None]:
    loss = DiceCELoss(sigmoid=True, batch=True)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-2, momentum=0.99, weight_decay=3e-5, nesterov=True)
    labels = case.masks[:, None].float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss(case.model(case.images), labels).backward()
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), 12)
        optimizer.step()

    return step


if __name__ == "__main__":
    contender.run({"Dice and cross-entropy": build})
