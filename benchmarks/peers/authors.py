"""The procedure of the paper: a new network at every step, a virtual SGD step with its graph, a clean loss behind it.

Written from Mirikharaji, Yan and Hamarneh (2019, arXiv 1906.03815), section 2, and Ren et al. (2018), algorithm 1.
"""

import contender
import torch
from torch import Tensor
from torch.func import functional_call


def weigh(case: contender.Case) -> Tensor:
    network = case.build()
    network.load_state_dict(case.model.state_dict())
    weights = torch.zeros(case.masks.shape, requires_grad=True)
    parameters = dict(network.named_parameters())
    loss = (case.loss_map(network(case.images)) * weights).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    fast = {
        name: parameter - contender.VIRTUAL_RATE * gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
    clean_loss = case.clean_loss(functional_call(network, fast, (case.clean_images,)))
    [slope] = torch.autograd.grad(clean_loss, [weights])
    return contender.normalised(-slope)


if __name__ == "__main__":
    contender.run({"virtual step": contender.weighted(weigh)})
