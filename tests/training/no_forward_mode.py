"""A network with an operator of its own that has a derivative in reverse mode alone."""

import torch
from torch import Tensor, nn


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


class OwnOperator(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return Doubled.apply(super().forward(images))
