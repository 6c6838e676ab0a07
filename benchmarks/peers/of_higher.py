"""higher (Grefenstette et al. 2019): its functional network and differentiable SGD make the virtual step."""

import contender
import higher
import torch
from torch import Tensor


def weigh(case: contender.Case) -> Tensor:
    weights = torch.zeros(case.masks.shape, requires_grad=True)
    virtual = torch.optim.SGD(case.model.parameters(), lr=contender.VIRTUAL_RATE)
    with higher.innerloop_ctx(case.model, virtual, copy_initial_weights=True) as (network, optimizer):
        optimizer.step((case.loss_map(network(case.images)) * weights).sum())
        [slope] = torch.autograd.grad(case.clean_loss(network(case.clean_images)), [weights])
    return contender.normalised(-slope)


if __name__ == "__main__":
    contender.run({"innerloop_ctx": contender.weighted(weigh)})
