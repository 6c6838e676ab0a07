"""The alignment map U of a noisy batch, three ways (Mirikharaji et al. 2019; Ren et al. 2018).

    U_p = ⟨g, ∇_θ ℓ_p(θ)⟩,   g = ∇_θ of the mean clean loss

U_p says how much a small step against pixel p's gradient would lower the clean loss. The paper reaches it as −∂L_c/∂W_p
through a virtual SGD step of size α taken with weights W = 0; that derivative is α·U_p, and α cancels when the weights
are normalised, so U is without it here.

The virtual step may start elsewhere, at the same weight w₀ on every valid pixel. θ̂ is linear in W, so that U_p is still
⟨g, ∇_θ ℓ_p(θ)⟩, with g = ∇L_c taken at the fast weights θ̂(w₀); there α matters.

Everything is a pure function of (network, parameters, batches), see distseg/meta/network.py. What a network computes
under `torch.no_grad()` or detaches is a constant to `reverse` and to `forward`. It is none to `finite`, which is
not for such networks. Images (B, 3, H, W), masks and U (B, H, W).

Where parameters are sharded (distseg/meta/placement.py), `Parameters` are this rank's shards, and so are gradients and
fast weights: the network gathers, and its derivative by a shard has come back summed over the ranks. Nothing else
changes but what the reduction (distseg/meta/reduction.py) does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from distseg.meta.network import Forward, Network, Parameters, tangents_stop_with_gradients
from distseg.meta.reduction import Reduction
from distseg.meta.weights import class_factors
from distseg.ops import pixel_loss, valid_pixels, weighted_loss

LabelledImages = tuple[Tensor, Tensor]
SummedLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits (B, C, H, W) and masks (B, H, W) to a loss summed over valid pixels, a scalar."""

BUCKET_ELEMENTS = 25 * 2**20 // 4
"""Gradients travel in buckets of about so many: 25 MiB of float32, as those of DistributedDataParallel."""


def summed_loss(logits: Tensor, masks: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Σ ℓ over the valid pixels, a scalar; Σ v·ℓ with class weights v (classes,)."""
    if class_weights is not None:
        return weighted_loss(logits, masks, class_factors(masks, class_weights))
    return weighted_loss(logits, masks, level=torch.ones(len(masks), device=masks.device))


def valid_count(batches: Sequence[LabelledImages]) -> Tensor:
    """The number of valid pixels of all micro-batches of this rank, a scalar."""
    return torch.stack([valid_pixels(masks).sum() for _, masks in batches]).sum()


class MeanLoss(NamedTuple):
    """A loss averaged over the valid pixels of the global batch."""

    gradient: Parameters
    loss: Tensor
    """This process's part of its value, a scalar: the parts add up to the mean."""


def mean_gradient(
    network: Network,
    parameters: Parameters,
    batches: Sequence[LabelledImages],
    reduction: Reduction,
    loss: SummedLoss = summed_loss,
) -> MeanLoss:
    """A loss averaged over the valid pixels of every micro-batch of every rank, and its gradient: g, of clean batches.

    Sums travel, not means: the summed gradient in buckets, each as soon as the last backward pass has made it, and the
    count of valid pixels in the last of them; or the count alone where gradients need no sum over the ranks. 0 where
    there is no valid pixel at all.
    """
    assert batches, "a batch is needed"
    leaves = _leaves(parameters)
    own: dict[str, Tensor] = {}
    values: list[Tensor] = []

    def noted(logits: Tensor, masks: Tensor) -> Tensor:
        value = loss(logits, masks)
        values.append(value.detach())
        return value

    for images, masks in batches[:-1]:
        own = _added(own, _summed_gradient(network, leaves, images, masks, noted))
    dtype = next(iter(parameters.values())).dtype
    count = valid_count(batches).to(dtype)
    if reduction.sums_gradients:
        buckets = _Buckets(leaves, own, count, reduction)
        buckets.fill(_summed_gradient(network, leaves, *batches[-1], noted))
        total, count = buckets.sums()
    else:
        total = _added(own, _summed_gradient(network, leaves, *batches[-1], noted))
        count = reduction.sum(count)
    count = count.clamp(min=1)
    # Quotients own their memory; forward mode would copy a tangent that views a larger storage, and hold both.
    gradient = {name: total.pop(name) / count for name in parameters}
    return MeanLoss(gradient, torch.stack(values).sum() / count)


def fast_weights(parameters: Parameters, noisy_gradient: Parameters, virtual_lr: float, weight: float) -> Parameters:
    """θ̂ = θ − α ∇ Σ W·ℓ for W = weight/N at each of the N valid pixels of the global noisy batch; constants.

    noisy_gradient: `mean_gradient` of the noisy micro-batches.
    """
    return {
        name: torch.sub(theta, noisy_gradient[name], alpha=virtual_lr * weight) for name, theta in parameters.items()
    }


def logits_along(
    network: Network, parameters: Parameters, gradient: Parameters, images: Tensor
) -> tuple[Tensor, Tensor]:
    """`forward`: z and ż (B, C, H, W), the logits and their Jacobian-vector product along g; constants to autograd.

    One forward-mode pass; U = Σ_c ∂ℓ/∂z_c · ż_c (distseg.ops.alignment) is exact.
    """

    def with_tangents(forward: Forward) -> Tensor:
        with tangents_stop_with_gradients():
            return forward(images)

    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(apart(theta), gradient[name]) for name, theta in parameters.items()}
        logits, tangents = forward_ad.unpack_dual(network.run(dual, with_tangents))
    return logits.detach(), torch.zeros_like(logits) if tangents is None else tangents.detach()


def reverse(network: Network, parameters: Parameters, gradient: Parameters, images: Tensor, masks: Tensor) -> Tensor:
    """U as the paper writes it: a double backward through the virtual step θ̂(W) = θ − α ∇_θ Σ W·ℓ. Exact.

    `gradient` is ∇L_c at θ̂, so the chain rule −∂L_c/∂W = −⟨g, ∂θ̂/∂W⟩ = α⟨g, ∂(∇_θ Σ W·ℓ)/∂W⟩ needs no second clean
    pass. The inner gradient is linear in W: its derivative, taken here at W = 0, is the same wherever the step starts.
    Its value is never looked at, and not kept.
    """
    leaves = _leaves(parameters)
    for leaf in leaves.values():  # a hook, which autograd calls as soon as it has the leaf's gradient
        leaf.register_hook(_PlaceOf.apply)

    def along_g(forward: Forward) -> Tensor:
        logits = forward(images)
        weights = torch.zeros(masks.shape, dtype=logits.dtype, device=logits.device, requires_grad=True)
        loss = weighted_loss(logits, masks, weights)
        inner = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        used = [(step, gradient[name]) for name, step in zip(leaves, inner, strict=True) if step.requires_grad]
        steps, directions = zip(*used, strict=True)
        (u,) = torch.autograd.grad(steps, weights, grad_outputs=directions)
        return u

    with torch.enable_grad():
        return network.run(leaves, along_g)


def finite(
    network: Network,
    parameters: Parameters,
    gradient: Parameters,
    images: Tensor,
    masks: Tensor,
    relative_step: float | None,
    reduction: Reduction,
) -> Tensor:
    """U by a central difference of ℓ at θ ± h·g, h = relative_step · ‖θ‖/‖g‖: the network is only evaluated.

    The default step is ε^⅓/400, 1.2e-5 in float32; ε is the parameters' machine epsilon. Rounding costs ε/h, and units
    that switch on or off on the way cost h, not h²: ε^⅓, right for smooth functions, is far too much for U-Nets.
    """
    if relative_step is None:
        relative_step = torch.finfo(next(iter(parameters.values())).dtype).eps ** (1 / 3) / 400
    scale, slope = norm(parameters, reduction), norm(gradient, reduction)
    h = relative_step * torch.where(slope > 0, scale.clamp(min=1e-3) / slope, 1.0)

    def loss_at(sign: int) -> Tensor:
        moved = {name: torch.addcmul(theta, gradient[name], sign * h) for name, theta in parameters.items()}
        return pixel_loss(network(moved, images), masks)

    return (loss_at(+1) - loss_at(-1)) / (2 * h)


def norm(tensors: Parameters, reduction: Reduction) -> Tensor:
    """Euclidean norm of all tensors together, a scalar on their device."""
    own = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors.values()))))
    return reduction.sum_over_shards(own.double().square()).sqrt().to(own.dtype)


def _summed_gradient(
    network: Network, leaves: Parameters, images: Tensor, masks: Tensor, loss: SummedLoss
) -> Parameters:
    """The gradient of the loss; 0 for a parameter that the network does not use."""

    def gradients(forward: Forward) -> tuple[Tensor, ...]:
        value = loss(forward(images), masks)
        return torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)

    with torch.enable_grad():
        return dict(zip(leaves, network.run(leaves, gradients), strict=True))


def _added(left: Parameters, right: Parameters) -> Parameters:
    """left + right. Both are used up, so that no third set of tensors is ever whole in memory."""
    return {name: left.pop(name) + right.pop(name) for name in list(right)} if left else right


class _Buckets:
    """Sums over ranks of `earlier` gradients (used up) plus those of one backward pass, and of a count.

    Buckets hold the parameters from the last to the first, as a backward pass reaches them, and leave in that order on
    every rank, each as soon as its gradients are there; the count is in the last one. Make it before that pass, whose
    leaves get hooks that do so.
    """

    def __init__(self, leaves: Parameters, earlier: Parameters, count: Tensor, reduction: Reduction) -> None:
        # Not the leaves themselves: their hooks hold this object.
        self._shapes = {name: leaf.shape for name, leaf in leaves.items()}
        self._earlier, self._count, self._reduction = earlier, count, reduction
        self._buckets = _buckets(leaves)
        self._missing = [set(names) for names in self._buckets]
        self._bucket_of = {name: index for index, names in enumerate(self._buckets) for name in names}
        self._made: Parameters = {}
        self._under_way: list[Callable[[], Tensor]] = []
        for name, leaf in leaves.items():
            leaf.register_hook(partial(self._ready, name))

    def fill(self, gradients: Parameters) -> None:
        """What the pass returned: the gradients that no hook has seen, of parameters that the network does not use."""
        for name, gradient in gradients.items():
            if name in self._missing[self._bucket_of[name]]:
                self._ready(name, gradient)

    def sums(self) -> tuple[Parameters, Tensor]:
        """Wait for the results; once."""
        total: Parameters = {}
        for names in self._buckets:
            sizes = [self._shapes[name].numel() for name in names]
            *parts, rest = self._under_way.pop(0)().split([*sizes, int(names is self._buckets[-1])])
            total |= {name: part.view(self._shapes[name]) for name, part in zip(names, parts, strict=True)}
        return total, rest.squeeze()

    def _ready(self, name: str, gradient: Tensor) -> Tensor:
        self._made[name] = gradient + self._earlier.pop(name) if self._earlier else gradient
        self._missing[self._bucket_of[name]].discard(name)
        while len(self._under_way) < len(self._buckets) and not self._missing[len(self._under_way)]:
            parts = [self._made.pop(name).flatten() for name in self._buckets[len(self._under_way)]]
            if len(self._under_way) == len(self._buckets) - 1:
                parts.append(self._count.reshape(1))
            self._under_way.append(self._reduction.begin_sum(torch.cat(parts)))
        return _without_memory(gradient)


def _buckets(leaves: Parameters) -> list[list[str]]:
    """Names from the last parameter to the first, in runs of at least BUCKET_ELEMENTS elements but for the last."""
    buckets: list[list[str]] = [[]]
    size = 0
    for name in reversed(leaves):
        if size >= BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += leaves[name].numel()
    return buckets


def _without_memory(tensor: Tensor) -> Tensor:
    """Zeros in the place of a tensor of which only shape and dtype matter, all of them the same element."""
    return tensor.new_zeros(()).expand_as(tensor)


class _PlaceOf(torch.autograd.Function):
    """A gradient that is to be differentiated and not looked at: its place in the graph, without its memory."""

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return _without_memory(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> Tensor:
        return direction


def owns_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def apart(tensor: Tensor) -> Tensor:
    """The same memory as a storage of its own.

    Forward mode gives a tangent the storage size of its primal. Under ZeRO a parameter, or its shard, is a view of one
    flat buffer, and every tangent would be as large as that.
    """
    if owns_storage(tensor):
        return tensor
    return torch.from_dlpack(tensor.detach()) if tensor.numel() else tensor.new_empty(tensor.shape)


def _leaves(parameters: Parameters) -> Parameters:
    return {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
