"""distseg's own estimators, as anyone's training loop calls them."""

from collections.abc import Callable
from functools import partial

import contender
from torch import Tensor

from distseg import PixelReweighter, weighted_loss


def build(estimator: str, case: contender.Case) -> Callable[[], Tensor]:
    reweighter = PixelReweighter(case.model, estimator=estimator)

    def step() -> Tensor:
        weights = reweighter(case.images, case.masks, case.clean_images, case.clean_masks)
        case.optimizer.zero_grad(set_to_none=False)
        weighted_loss(case.model(case.images), case.masks, weights).backward()
        case.optimizer.step()
        return weights

    return step


if __name__ == "__main__":
    estimators = {name: partial(build, name) for name in ("forward", "reverse", "finite")}
    contender.run({"plain": contender.plain, **estimators})
