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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distseg.meta.estimators import LabelledImages, SumOverRanks, logits_along, mean_gradient
from distseg.meta.network import Forward, Network, Parameters
from distseg.ops import alignment, pixel_loss, valid_pixels, weighted_loss


class WeightNet(nn.Module):
    """ℓ ↦ w in (0, 1), of any shape: one hidden layer of 100 units with ReLU, then a sigmoid (Shu et al. 2019)."""

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(1, hidden), nn.Linear(hidden, 1)

    def forward(self, losses: Tensor) -> Tensor:
        return self.out(self.hidden(losses[..., None]).relu()).sigmoid()[..., 0]


class Hypergradient(NamedTuple):
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
    sum_over_ranks: SumOverRanks,
) -> Hypergradient:
    """dL_c(θ̂(φ))/dφ over the global batch, the same on every rank; `virtual_lr` is α. Exact."""
    dtype = next(iter(parameters.values())).dtype
    count = sum_over_ranks(sum(valid_pixels(masks).sum() for _, masks in noisy)).clamp(min=1).to(dtype)
    step = _weighted_gradient(network, parameters, net, noisy, sum_over_ranks)
    fast = {name: theta - (virtual_lr / count) * step[name] for name, theta in parameters.items()}
    gradient = mean_gradient(network, fast, clean, sum_over_ranks)

    alignments, losses, surrogate = [], [], torch.zeros((), device=count.device)
    for images, masks in noisy:
        logits, tangents = logits_along(network, parameters, gradient, images)
        alignments.append(alignment(logits, tangents, masks))  # 0 at ignored pixels
        losses.append(pixel_loss(logits, masks))
        with torch.enable_grad():
            surrogate = surrogate - (virtual_lr / count) * (alignments[-1] * net(losses[-1])).sum()
    wrt = list(net.parameters())
    gradients = torch.autograd.grad(surrogate, wrt)
    bucket = sum_over_ranks(torch.cat([part.flatten() for part in gradients]))
    parts = bucket.split([parameter.numel() for parameter in wrt])
    by_parameter = [part.view_as(parameter) for part, parameter in zip(parts, wrt, strict=True)]
    return Hypergradient(by_parameter, gradient, alignments, losses, count)


def _weighted_gradient(
    network: Network,
    parameters: Parameters,
    net: WeightNet,
    noisy: Sequence[LabelledImages],
    sum_over_ranks: SumOverRanks,
) -> Parameters:
    """Σ_p w_φ(ℓ_p) ∇ℓ_p(θ) over the global batch."""
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    total = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for images, masks in noisy:

        def gradients(forward: Forward, images: Tensor = images, masks: Tensor = masks) -> tuple[Tensor, ...]:
            logits = forward(images)
            with torch.no_grad():
                weights = net(pixel_loss(logits, masks))
            loss = weighted_loss(logits, masks, weights)
            # A parameter that the network does not use has gradient 0.
            return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

        with torch.enable_grad():
            torch._foreach_add_(total, network.run(leaves, gradients))
    bucket = sum_over_ranks(torch.cat([tensor.flatten() for tensor in total]))
    parts = bucket.split([tensor.numel() for tensor in total])
    return {name: part.view_as(leaf) for part, (name, leaf) in zip(parts, leaves.items(), strict=True)}
