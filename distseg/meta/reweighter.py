"""PixelReweighter: weight maps for any nn.Module, in anyone's own training loop."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import distseg.meta.estimators as estimators
from distseg.errors import InvalidArgument
from distseg.meta.estimators import LabelledImages, MeanLoss
from distseg.meta.loss import BinaryMasks
from distseg.meta.network import Network, Parameters, StatelessNetwork, stopped_gradient
from distseg.meta.one_pass import logits_and_tangents, one_pass_agrees
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

logger = logging.getLogger(__name__)


class OnePass(NamedTuple):
    """What `PixelReweighter.one_pass` returns."""

    logits: Tensor
    """(B, C, H, W) of the noisy images, with their graph."""
    weights: Tensor
    """(B, H, W) as the reweighter's own call returns them."""
    clean: MeanLoss
    """The mean loss of the clean batch and its gradient g by name, for a step that learns from it too."""


class PixelReweighter:
    """Weights every pixel of a noisy batch by how well its loss gradient agrees with the clean gradient.

        reweighter = PixelReweighter(model)
        weights = reweighter(images, masks, clean_images, clean_masks)
        loss = weighted_loss(model(images), masks, weights)

    model: (B, 3, H, W) → logits (B, C, H, W), C = 1 binary. Its training flag is respected; its parameters, buffers,
        gradients, RNG streams and hooks on parameters are left alone. Frozen parameters are constants.
    estimator: `forward` (exact, the default), `reverse` (exact, the paper's double backward) or `finite` (central
        difference, for networks with operators that have no forward-mode formula). `finite` cannot see where a network
        stops gradients: its first call checks that the model does not, which takes two backward passes and waits for
        the device.
    granularity, normalise, on_zero, transform: see WeightRule.
    virtual_lr, initial_weight: the virtual step is of size α = virtual_lr, with the weight initial_weight/N on each of
        the N valid pixels of the global noisy batch. The paper starts at 0, and α then does not matter. Elsewhere the
        clean gradient is taken at the fast weights, which costs one more backward pass of the noisy batch.
    class_weights: (classes,) numbers above 0 on the model's device, background first: the loss of a pixel is then v·ℓ,
        v that of its label, on noisy and clean images alike; U along the gradient of that clean loss is v times as
        much. `weighted_loss` does not know of them: give it weights times v.
    finite_step: relative step of `finite`.
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
        sum_over_ranks: SumOverRanks | None = None,
        reduction: Reduction | None = None,
        placement: Placement | None = None,
    ) -> None:
        if not (virtual_lr > 0 and initial_weight >= 0):
            raise ValueError(f"virtual_lr {virtual_lr} must be above 0, initial_weight {initial_weight} not below")
        if estimator not in ("forward", "reverse", "finite"):
            raise ValueError(f"estimator {estimator!r}: forward, reverse, finite")
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
        self.rule = WeightRule(Granularity.parse(granularity), normalise, on_zero, transform)
        self.diagnostics: Diagnostics = {}
        self._unchecked = estimator == "finite"
        self._agrees: bool | None = None  # until the model has been tried
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
        truths = None if true_masks is None else [true_masks]
        self._look((images, masks), (clean_images, clean_masks))
        [weights] = self.weigh([(images, masks)], [(clean_images, clean_masks)], truths)
        return weights.full(masks)

    def one_pass(
        self,
        images: Tensor,
        masks: Tensor,
        clean_images: Tensor,
        clean_masks: Tensor,
        true_masks: Tensor | None = None,
    ) -> OnePass:
        """The weights and the logits that they are for, from one forward pass of the model, which counts as its step's.

            logits, weights, clean = reweighter.one_pass(images, masks, clean_images, clean_masks)
            weighted_loss(logits, masks, weights).backward()

        It takes the place of `reweighter(…)` and `model(images)`, a forward pass less, and gives the same numbers.
        Tangents take as much memory as the features until it returns. For the estimator `forward`, without autocast;
        the first call tries whether the model can do it, and a model that cannot takes two passes. To learn from the
        clean batch too, add a share of `clean.gradient[name]` to `.grad` of each trained parameter after `backward`,
        which saves another pass. Both need an `initial_weight` of 0.
        """
        noisy, clean_batch = (images, masks), (clean_images, clean_masks)
        self._look(noisy, clean_batch)
        truths = None if true_masks is None else [true_masks]
        clean = self.clean_loss([clean_batch], [noisy])
        if not (self.may_take_one_pass and self.takes_one_pass(clean, images)):
            [weights] = self.weigh_along(clean, [noisy], truths)
            return OnePass(self.model(images), weights.full(masks), clean)
        logits, tangents = self.carry(clean, self.model, images)
        weights = self.weigh_pass(clean, logits.detach(), tangents, masks, true_masks)
        return OnePass(logits, weights.full(masks), clean)

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None = None,
    ) -> list[WeightMap]:
        """Weight maps of a step's noisy micro-batches, with g from all its clean ones: the same as one large batch.

        The maps are the same bits with and without `true_masks`, which only add to the diagnostics.
        """
        return self.weigh_along(self.clean_loss(clean, noisy), noisy, true_masks)

    def clean_loss(self, clean: Sequence[LabelledImages], noisy: Sequence[LabelledImages] = ()) -> MeanLoss:
        """The mean clean loss and g after the virtual step's start: at the present parameters if initial_weight is 0.

        The noisy micro-batches matter only where it is not.
        """
        for images, masks in (*noisy, *clean):
            _check(images, masks)
        network, parameters = self._network_and_parameters()
        loss = partial(estimators.summed_loss, class_weights=self.class_weights)

        def mean_gradient(batches: Sequence[LabelledImages]) -> MeanLoss:
            return estimators.mean_gradient(network, parameters, batches, self.reduction, loss)

        with self.placement.saving_shards():
            if self._unchecked:
                self._check_derivatives(network, parameters, clean[0][0])
            if self.initial_weight:
                parameters = estimators.fast_weights(
                    parameters, mean_gradient(noisy).gradient, self.virtual_lr, self.initial_weight
                )
            return mean_gradient(clean)

    def weigh_along(
        self, clean: MeanLoss, noisy: Sequence[LabelledImages], true_masks: Sequence[Tensor] | None = None
    ) -> list[WeightMap]:
        """Weight maps of a step's noisy micro-batches by `clean_loss`, from passes of their own."""
        network, parameters = self._network_and_parameters()
        with self.placement.saving_shards():
            aligned = [
                self._aligned(network, parameters, clean.gradient, *batch, with_map=true_masks is not None)
                for batch in noisy
            ]
        return self._weight_maps(clean, aligned, [masks for _, masks in noisy], true_masks)

    @property
    def may_take_one_pass(self) -> bool:
        """Whether the weights can come from the weighted pass itself, for all that is known before `takes_one_pass`."""
        fits = self.estimator == "forward" and not (self.initial_weight or self.placement.sharded)
        return fits and self._agrees is not False

    def takes_one_pass(self, clean: MeanLoss, images: Tensor) -> bool:
        """Whether `carry` is right for the model: every rank tries it in its first call, which waits for the device."""
        if torch.is_autocast_enabled(images.device.type):
            return False
        if self._agrees is None:
            disagrees = ~one_pass_agrees(*self._network_and_parameters(), clean.gradient, images)
            self._agrees = not self.reduction.sum(disagrees.float()).item()
            if not self._agrees:
                logger.info("the network takes no tangents beside gradients: its weights take a forward pass more")
        return self._agrees

    def carry(self, clean: MeanLoss, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits with their graph and tangents along g, (B, C, H, W), of a pass of `network` that counts as its step's.

        `network` is the model, or a module around it that has its parameters.
        """
        directions: dict[Tensor, Tensor] = {
            parameter: clean.gradient[name]
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return logits_and_tangents(network, directions, images)

    def weigh_pass(
        self, clean: MeanLoss, logits: Tensor, tangents: Tensor, masks: Tensor, true_masks: Tensor | None = None
    ) -> WeightMap:
        """The weight map of a step's one noisy micro-batch, from what `carry` returned; logits detached."""
        aligned = self._cells_along(logits, tangents, masks, with_map=true_masks is not None)
        truths = None if true_masks is None else [true_masks]
        [weights] = self._weight_maps(clean, [aligned], [masks], truths)
        return weights

    def _weight_maps(
        self,
        clean: MeanLoss,
        aligned: Sequence[tuple[Cells, Tensor | None]],
        labels: Sequence[Tensor],
        true_masks: Sequence[Tensor] | None,
    ) -> list[WeightMap]:
        weights, self.diagnostics = weight_maps(
            [cells for cells, _ in aligned],
            labels,
            estimators.norm(clean.gradient, self.reduction),
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
        gradient: Parameters,
        images: Tensor,
        masks: Tensor,
        with_map: bool,
    ) -> tuple[Cells, Tensor | None]:
        """Cells of a micro-batch; and U (B, H, W), always if `with_map`."""
        if self.estimator == "forward":
            logits, tangents = estimators.logits_along(network, parameters, gradient, images)
            return self._cells_along(logits, tangents, masks, with_map)
        if self.estimator == "reverse":
            u = estimators.reverse(network, parameters, gradient, images, masks).detach()
        else:
            step = self.finite_step
            u = estimators.finite(network, parameters, gradient, images, masks, step, self.reduction).detach()
        return self._cells(u, masks)

    def _cells_along(
        self, logits: Tensor, tangents: Tensor, masks: Tensor, with_map: bool
    ) -> tuple[Cells, Tensor | None]:
        """Where the rule needs no map of U, from logits to cells in one pass; U is then made beside, if `with_map`."""
        granularity = self.rule.granularity
        if self.rule.transform == "clamp" and not granularity.needs_alignment and self.class_weights is None:
            cells = Cells.of_tangents(logits, tangents, masks, granularity)
            return cells, alignment(logits, tangents, masks) if with_map else None
        return self._cells(alignment(logits, tangents, masks), masks)

    def _cells(self, u: Tensor, masks: Tensor) -> tuple[Cells, Tensor]:
        if self.class_weights is not None:
            u = u * class_factors(masks, self.class_weights.to(u.dtype))
        return Cells.of_alignment(TRANSFORMS[self.rule.transform](u), masks, self.rule.granularity), u

    def _network_and_parameters(self) -> tuple[Network, Parameters]:
        return StatelessNetwork(self.model, self.placement), self.placement.trainable()

    def _look(self, noisy: LabelledImages, clean: LabelledImages) -> None:
        for batch in (noisy, clean):
            _check(*batch)
        if self._binary_masks.look(noisy[1], clean[1]) and self._channels(noisy[0]) == 1:
            BinaryMasks.refuse()

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


def _check(images: Tensor, masks: Tensor) -> None:
    if images.ndim != 4 or masks.shape != (images.shape[0], *images.shape[2:]):
        shapes = f"images {tuple(images.shape)} and masks {tuple(masks.shape)}"
        raise ValueError(f"{shapes}: need (B, C, H, W) and (B, H, W)")
    if masks.is_floating_point() or masks.dtype == torch.bool:
        raise ValueError(f"masks are {masks.dtype}: need integer class ids, 255 = ignore")
