"""PixelReweighter: weight maps for any nn.Module, in anyone's own training loop."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import distseg.meta.estimators as estimators
from distseg.errors import InvalidArgument
from distseg.meta.estimators import LabelledImages
from distseg.meta.head import Head, HeadGradient
from distseg.meta.loss import BinaryMasks
from distseg.meta.network import Network, Parameters, StatelessNetwork, stopped_gradient
from distseg.meta.placement import Placement, Whole
from distseg.meta.reduction import ByFunction, OneProcess, Reduction, SumOverRanks
from distseg.meta.weights import (
    TRANSFORMS,
    Cells,
    Diagnostics,
    Granularity,
    WeightMap,
    WeightRule,
    auroc,
    class_factors,
    detection_histogram,
    weight_maps,
)
from distseg.ops import alignment


class PixelReweighter:
    """Weights every pixel of a noisy batch by how well its loss gradient agrees with the clean gradient.

        reweighter = PixelReweighter(model)
        weights = reweighter(images, masks, clean_images, clean_masks)
        loss = weighted_loss(model(images), masks, weights)

    model: (B, 3, H, W) → logits (B, C, H, W), C = 1 binary. Its training flag is respected; its parameters, buffers,
        gradients, RNG streams and hooks on parameters are left alone. Frozen parameters are constants.
    estimator: `forward` (exact, the default), `reverse` (exact, the paper's double backward), `finite` (central
        difference, for networks with operators that have no forward-mode formula) or `head` (the last layer's part of
        U, by forward passes alone, for networks that end in a 1×1 convolution). `finite` cannot see where a network
        stops gradients: its first call checks that the model does not, which takes two backward passes and waits for
        the device. The first call of `head` raises InvalidArgument for a network that ends otherwise.
    granularity, normalise, on_zero, transform: see WeightRule.
    virtual_lr, initial_weight: the virtual step is of size α = virtual_lr, with the weight initial_weight/N on each of
        the N valid pixels of the global noisy batch. The paper starts at 0, and α then does not matter. Elsewhere the
        clean gradient is taken at the fast weights, which costs one more backward pass of the noisy batch.
    class_weights: (classes,) numbers above 0 on the model's device, background first: the loss of a pixel is then v·ℓ,
        v that of its label, on noisy and clean images alike; U along the gradient of that clean loss is v times as
        much. `weighted_loss` does not know of them: give it weights times v.
    finite_step: relative step of `finite`.
    precision: of the network in the meta pass: `fp32`, as it is, or `bf16`: parameters, tangents and images are cast;
        not for `finite`, whose differences that would drown, nor for sharded parameters.
    sum_over_ranks: sums a tensor over the processes that share the global batch, for instance an all-reduce.
    reduction: the same as an object, which may also sum in the background: the clean gradient then travels while the
        backward pass that makes it goes on. One of the two at most.
    placement: where the model's parameters are; by default whole, in the model itself.

    After each call `diagnostics` holds 0-dim tensors on the model's device, see weight_maps. Source: Mirikharaji, Yan,
    Hamarneh, "Learning to Segment Skin Lesions from Noisy Annotations", 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str = "forward",
        granularity: str = "pixel",
        normalise: str = "batch",
        on_zero: str = "skip",
        transform: str = "clamp",
        virtual_lr: float = 1.0,
        initial_weight: float = 0.0,
        class_weights: Tensor | None = None,
        finite_step: float | None = None,
        precision: str = "fp32",
        sum_over_ranks: SumOverRanks | None = None,
        reduction: Reduction | None = None,
        placement: Placement | None = None,
    ) -> None:
        if not (virtual_lr > 0 and initial_weight >= 0):
            raise ValueError(f"virtual_lr {virtual_lr} must be above 0, initial_weight {initial_weight} not below")
        if estimator not in ("forward", "reverse", "finite", "head"):
            raise ValueError(f"estimator {estimator!r}: forward, reverse, finite, head")
        if estimator == "head" and initial_weight:
            raise ValueError("estimator head: knows no fast weights; leave initial_weight at 0")
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {precision!r}: fp32 or bf16")
        if precision == "bf16" and (estimator == "finite" or (placement is not None and placement.sharded)):
            raise ValueError("precision bf16: not for estimator finite, nor for sharded parameters; use fp32")
        if sum_over_ranks and reduction:
            raise ValueError("sum_over_ranks and reduction say the same: give one of them")
        self.model = model
        self.placement = placement or Whole(model)
        if sum_over_ranks:
            reduction = ByFunction(sum_over_ranks, sharded=self.placement.sharded)
        self.reduction = reduction or OneProcess()
        self.estimator, self.finite_step = estimator, finite_step
        self.virtual_lr, self.initial_weight = virtual_lr, initial_weight
        self.class_weights = class_weights
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.rule = WeightRule(Granularity.parse(granularity), normalise, on_zero, transform)
        self.diagnostics: Diagnostics = {}
        self._unchecked = estimator == "finite"
        self._head = Head(model)
        self._binary_masks = BinaryMasks()

    def __call__(
        self,
        images: Tensor,
        masks: Tensor,
        clean_images: Tensor,
        clean_masks: Tensor,
        true_masks: Tensor | None = None,
    ) -> Tensor:
        """The weight map (B, H, W) of one noisy batch: ≥ 0, sum 1 over the global batch, constant to autograd.

        images (B, 3, H, W) float; masks (B, H, W) integer class ids, 255 = ignore; the clean batch likewise, of any
        size. true_masks (B, H, W), where the noise is simulated, adds noise_rate, wrong_mass and auroc to the
        diagnostics. Raises ValueError for shapes and dtypes that do not fit, on the CPU for labels that are no class
        id (on a GPU the weights are then NaN), and, with C = 1, for first masks that hold 0 and 255 alone.
        """
        for batch in ((images, masks), (clean_images, clean_masks)):
            _check(*batch)
        if self._binary_masks.look(masks, clean_masks) and self._channels(images) == 1:
            BinaryMasks.refuse()
        truths = None if true_masks is None else [true_masks]
        [weights] = self.weigh([(images, masks)], [(clean_images, clean_masks)], truths)
        return weights.full(masks)

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None = None,
    ) -> list[WeightMap]:
        """Weight maps of a step's noisy micro-batches, with g from all its clean ones: the same as one large batch.

        The maps are the same bits with and without `true_masks`, which only add to the diagnostics.
        """
        for images, masks in (*noisy, *clean):
            _check(images, masks)
        network = StatelessNetwork(self.model, self.placement, self.dtype)
        parameters = self.placement.trainable()
        labels = [masks for _, masks in noisy]
        with self.placement.saving_shards():
            if self._unchecked:
                self._check_derivatives(network, parameters, noisy[0][0])
            gradient = self._clean_gradient(network, parameters, noisy, clean)
            aligned = [
                self._aligned(network, parameters, gradient, *batch, with_map=true_masks is not None) for batch in noisy
            ]
        weights, self.diagnostics = weight_maps(
            [cells for cells, _ in aligned],
            labels,
            gradient.norm() if isinstance(gradient, HeadGradient) else estimators.norm(gradient, self.reduction),
            self.rule,
            self.reduction,
            true_masks,
        )
        if true_masks is not None:
            alignments = [u for _, u in aligned if u is not None]
            histogram = self.reduction.sum(detection_histogram(alignments, labels, true_masks))
            self.diagnostics["auroc"] = auroc(histogram)
        return weights

    def _aligned(
        self,
        network: Network,
        parameters: Parameters,
        gradient: Parameters | HeadGradient,
        images: Tensor,
        masks: Tensor,
        with_map: bool,
    ) -> tuple[Cells, Tensor | None]:
        """Cells of a micro-batch; and U (B, H, W), always if `with_map`.

        Where the rule needs no map of U, logits and tangents become cells in one pass, and U is made beside.
        """
        granularity = self.rule.granularity
        if isinstance(gradient, HeadGradient) or self.estimator == "forward":
            if isinstance(gradient, HeadGradient):
                logits, tangents = self._head.logits_along(network, parameters, gradient, images)
            else:
                logits, tangents = estimators.logits_along(network, parameters, gradient, images)
            if self.rule.transform == "clamp" and not granularity.needs_alignment and self.class_weights is None:
                cells = Cells.of_tangents(logits, tangents, masks, granularity)
                return cells, alignment(logits, tangents, masks) if with_map else None
            u = alignment(logits, tangents, masks)
        elif self.estimator == "reverse":
            u = estimators.reverse(network, parameters, gradient, images, masks).detach()
        else:
            step = self.finite_step
            u = estimators.finite(network, parameters, gradient, images, masks, step, self.reduction).detach()
        if self.class_weights is not None:
            u = u * class_factors(masks, self.class_weights.to(u.dtype))
        return Cells.of_alignment(TRANSFORMS[self.rule.transform](u), masks, granularity), u

    def _channels(self, images: Tensor) -> int:
        """C of the model's logits."""
        with torch.no_grad():
            return StatelessNetwork(self.model, self.placement)(self.placement.trainable(), images).shape[1]

    def _check_derivatives(self, network: Network, parameters: Parameters, images: Tensor) -> None:
        """Raise InvalidArgument, on every rank, for a model whose differences are not its derivatives."""
        stopped, whole = self.reduction.sum(stopped_gradient(network, parameters, images)).tolist()
        if stopped > torch.finfo(next(iter(parameters.values())).dtype).eps * whole:
            raise InvalidArgument(
                "estimator finite: the network stops gradients (torch.no_grad, detach, .data or item), which "
                "differences of its values do not see; use estimator=forward, or reverse"
            )
        self._unchecked = False

    def _clean_gradient(
        self,
        network: Network,
        parameters: Parameters,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
    ) -> Parameters | HeadGradient:
        """g, at the parameters that the virtual step starts with: the present ones if it has moved nothing yet."""

        loss = partial(estimators.summed_loss, class_weights=self.class_weights)
        if self.estimator == "head":
            return self._head.gradient(network, parameters, clean, self.reduction, loss)

        def mean_gradient(at: Parameters, batches: Sequence[LabelledImages]) -> Parameters:
            return estimators.mean_gradient(network, at, batches, self.reduction, loss)

        if self.initial_weight:
            parameters = estimators.fast_weights(
                parameters, mean_gradient(parameters, noisy), self.virtual_lr, self.initial_weight
            )
        return mean_gradient(parameters, clean)


def _check(images: Tensor, masks: Tensor) -> None:
    if images.ndim != 4 or masks.shape != (images.shape[0], *images.shape[2:]):
        shapes = f"images {tuple(images.shape)} and masks {tuple(masks.shape)}"
        raise ValueError(f"{shapes}: need (B, C, H, W) and (B, H, W)")
    if masks.is_floating_point() or masks.dtype == torch.bool:
        raise ValueError(f"masks are {masks.dtype}: need integer class ids, 255 = ignore")
