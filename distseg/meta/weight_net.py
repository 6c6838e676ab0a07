"""Learned weights: a small network maps a pixel's loss to its weight, taught by the clean loss (Shu et al. 2019).

Meta-Weight-Net takes the virtual step with the weights that the net gives now, and asks how the clean loss after it
depends on the net's parameters φ:

    θ̂(φ) = θ − α/N Σ_p w_φ(ℓ_p) ∇ℓ_p(θ)
    dL_c(θ̂)/dφ = ⟨ĝ, dθ̂/dφ⟩ = −α/N Σ_p ⟨ĝ, ∇ℓ_p(θ)⟩ ∂w_φ(ℓ_p)/∂φ = −α/N Σ_p U_p ∂w_φ(ℓ_p)/∂φ,     ĝ = ∇L_c(θ̂)

The inner products are the alignment map U along ĝ, which one forward-mode pass yields; what is left is an ordinary
backward through the small net alone. So the hypergradient is exact, with no graph of a graph: a virtual step, a clean
gradient at the fast weights, and a Jacobian-vector product. (ℓ_p is constant in φ.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distseg.meta.estimators import LabelledImages, logits_along, mean_gradient, summed_loss, valid_count
from distseg.meta.network import Network, Parameters
from distseg.meta.reduction import Reduction
from distseg.meta.weights import class_factors
from distseg.ops import alignment, pixel_loss, weighted_loss


class WeightNet(nn.Module):
    """ℓ ↦ w in (0, 1), of any shape: one hidden layer of 100 units with ReLU, then a sigmoid (Shu et al. 2019)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        return self.out(self.hidden(losses[..., None]).relu()).sigmoid()[..., 0]


@dataclass(frozen=True)
class Hypergradient:
    """dL_c/dφ by parameter of the net, and what it was made of: ĝ, and per micro-batch U and ℓ (B, H, W), and N."""

    by_parameter: list[Tensor]
    clean_gradient: Parameters
    alignments: list[Tensor]
    losses: list[Tensor]
    count: Tensor


def hypergradient(
    network: Network,
    parameters: Parameters,
    net: WeightNet,
    noisy: Sequence[LabelledImages],
    clean: Sequence[LabelledImages],
    virtual_lr: float,
    reduction: Reduction,
    class_weights: Tensor | None = None,
) -> Hypergradient:
    """dL_c(θ̂(φ))/dφ over the global batch, the same on every rank; `virtual_lr` is α. Exact.

    With class weights v (classes,), ℓ is v·ℓ throughout: what the net is shown, both losses, and U. The net is left as
    it is: a caller steps with `by_parameter` if the step is kept.
    """

    def by_class(values: Tensor, masks: Tensor) -> Tensor:
        return values if class_weights is None else values * class_factors(masks, class_weights.to(values.dtype))

    def weighed_by_net(logits: Tensor, masks: Tensor) -> Tensor:
        with torch.no_grad():
            weights = by_class(net(by_class(pixel_loss(logits, masks), masks)), masks)
        return weighted_loss(logits, masks, weights)

    dtype = next(iter(parameters.values())).dtype
    count = reduction.sum(valid_count(noisy)).clamp(min=1).to(dtype)
    step = mean_gradient(network, parameters, noisy, reduction, weighed_by_net).gradient
    fast = {name: theta - virtual_lr * step.pop(name) for name, theta in parameters.items()}
    clean_loss = partial(summed_loss, class_weights=class_weights)
    gradient = mean_gradient(network, fast, clean, reduction, clean_loss).gradient

    alignments, losses, surrogate = [], [], torch.zeros((), device=count.device)
    for images, masks in noisy:
        logits, tangents = logits_along(network, parameters, gradient, images)
        alignments.append(by_class(alignment(logits, tangents, masks), masks))  # 0 at ignored pixels
        losses.append(by_class(pixel_loss(logits, masks), masks))
        with torch.enable_grad():
            surrogate = surrogate - (virtual_lr / count) * (alignments[-1] * net(losses[-1])).sum()
    wrt = list(net.parameters())
    gradients = torch.autograd.grad(surrogate, wrt)
    bucket = reduction.sum(torch.cat([part.flatten() for part in gradients]))
    parts = bucket.split([parameter.numel() for parameter in wrt])
    by_parameter = [part.view_as(parameter) for part, parameter in zip(parts, wrt, strict=True)]
    return Hypergradient(by_parameter, gradient, alignments, losses, count)
