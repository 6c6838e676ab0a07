"""Betty's estimators of DARTS and of SAMA (Choe et al. 2023), with their own defaults for the size of their step.

Both are central differences of the weighted loss along the clean gradient. They are called as Betty's engine calls
them, without the engine: a problem is here the few attributes that they read.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import contender
import torch
from betty.configs import Config
from betty.hypergradient.darts import darts
from betty.hypergradient.sama import sama
from torch import Tensor


def weigh(estimator: Callable, case: contender.Case) -> Tensor:
    weights = torch.zeros(case.masks.shape, requires_grad=True)
    parameters = list(case.model.parameters())

    def noisy_loss(_: object) -> Tensor:
        return (case.loss_map(case.model(case.images)) * weights).sum()

    lower = SimpleNamespace(
        config=Config(),
        optimizer=torch.optim.SGD(parameters, lr=contender.VIRTUAL_RATE),
        cur_batch=None,
        training_step_exec=noisy_loss,
        meta_trainable_parameters=lambda: parameters,
        _strategy="default",
    )
    upper = SimpleNamespace(trainable_parameters=lambda: [weights])
    vector = torch.autograd.grad(case.clean_loss(case.model(case.clean_images)), parameters)
    [slope] = estimator(vector, lower, upper, False)
    return contender.normalised(-slope)


if __name__ == "__main__":
    estimators = {"darts": darts, "sama": sama}
    contender.run({name: contender.weighted(partial(weigh, function)) for name, function in estimators.items()})
