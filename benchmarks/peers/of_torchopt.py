"""TorchOpt (Ren et al. 2023): its MetaSGD makes the virtual step on the network itself, which is then put back."""

import contender
import torch
import torchopt
from torch import Tensor


def weigh(case: contender.Case) -> Tensor:
    weights = torch.zeros(case.masks.shape, requires_grad=True)
    optimizer = torchopt.MetaSGD(case.model, lr=contender.VIRTUAL_RATE)
    before = torchopt.extract_state_dict(case.model, by="reference")
    optimizer.step((case.loss_map(case.model(case.images)) * weights).sum())
    [slope] = torch.autograd.grad(case.clean_loss(case.model(case.clean_images)), [weights])
    torchopt.recover_state_dict(case.model, before)
    return contender.normalised(-slope)


if __name__ == "__main__":
    contender.run({"MetaSGD": contender.weighted(weigh)})
