"""Whether an estimator can take a network, told before the first step and not after a warm-up."""

from torch import Tensor, nn

from distseg.errors import InvalidArgument
from distseg.meta.estimators import logits_along
from distseg.meta.head import Head
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole


def check_estimator(estimator: str, model: nn.Module, images: Tensor) -> None:
    """Raise InvalidArgument for a network that `estimator` cannot weigh with. Nothing is left changed.

    head: its output is not that of a trained 1×1 convolution. forward: an operator has no derivative in forward mode.
    """
    placement = Whole(model)
    network, parameters = StatelessNetwork(model, placement), placement.trainable()
    if estimator == "head":
        Head(model).find(network, parameters, images)
    elif estimator == "forward":
        try:
            logits_along(network, parameters, parameters, images)  # along any direction
        except NotImplementedError as error:
            reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
            raise InvalidArgument(
                f"estimator forward: the network has an operator without a derivative in forward mode ({reason}); use "
                "estimator=reverse of weighting aligned, or give it one (autograd.Function.jvp)"
            ) from None
