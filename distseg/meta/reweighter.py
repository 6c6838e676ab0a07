"""PixelReweighter: weight maps for any nn.Module, in anyone's own training loop."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distseg.errors import InvalidArgument
from distseg.meta import estimators
from distseg.meta.estimators import BeginSum, LabelledImages, SumOverRanks, one_process
from distseg.meta.network import Network, Parameters, StatelessNetwork, stopped_gradient
from distseg.meta.placement import Placement, Whole
from distseg.meta.weights import (
    TRANSFORMS,
    Cells,
    Diagnostics,
    WeightMap,
    WeightRule,
    auroc,
    detection_histogram,
    weight_maps,
)


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
    finite_step: relative step of `finite`.
    sum_over_ranks: sums a tensor over the processes that share the global batch, for instance an all-reduce.
    begin_sum: begins such a sum and returns what waits for its result. With it the clean gradient travels while the
        backward pass that makes it goes on.
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
        finite_step: float | None = None,
        sum_over_ranks: SumOverRanks = one_process,
        begin_sum: BeginSum | None = None,
        placement: Placement | None = None,
    ) -> None:
        if not (virtual_lr > 0 and initial_weight >= 0):
            raise ValueError(f"virtual_lr {virtual_lr} must be above 0, initial_weight {initial_weight} not below")
        self.placement = placement or Whole(model)
        sum_over_shards = sum_over_ranks if self.placement.sharded else one_process
        choices = {
            "forward": estimators.forward,
            "reverse": estimators.reverse,
            "finite": partial(estimators.finite, relative_step=finite_step, sum_over_shards=sum_over_shards),
        }
        if estimator not in choices:
            raise ValueError(f"estimator {estimator!r}: {', '.join(choices)}")
        self.model = model
        self.estimate = choices[estimator]
        self.virtual_lr, self.initial_weight = virtual_lr, initial_weight
        self.rule = WeightRule(granularity, normalise, on_zero, transform)
        self.sum_over_ranks, self.begin_sum, self.sum_over_shards = sum_over_ranks, begin_sum, sum_over_shards
        self.diagnostics: Diagnostics = {}
        self._unchecked = estimator == "finite"

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
        diagnostics. Raises ValueError for shapes and dtypes that do not fit.
        """
        truths = None if true_masks is None else [true_masks]
        [weights] = self.weigh([(images, masks)], [(clean_images, clean_masks)], truths)
        return weights.full(masks)

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None = None,
    ) -> list[WeightMap]:
        """Weight maps of a step's noisy micro-batches, with g from all its clean ones: the same as one large batch."""
        for images, masks in (*noisy, *clean):
            _check(images, masks)
        network = StatelessNetwork(self.model, self.placement)
        parameters = self.placement.trainable()
        masks = [labels for _, labels in noisy]
        with self.placement.saving_shards():
            if self._unchecked:
                self._check_derivatives(network, parameters, noisy[0][0])
            gradient = self._clean_gradient(network, parameters, noisy, clean)

            # U itself is needed for patches, for AUROC and for its transforms; else forward mode goes from logits to W⁺
            # in one pass.
            in_one_pass = self.estimate is estimators.forward and true_masks is None and self.rule.transform == "clamp"
            if in_one_pass and not self.rule.granularity.startswith("patch"):
                cells = [
                    Cells.of_tangents(
                        *estimators.logits_along(network, parameters, gradient, images), y, self.rule.granularity
                    )
                    for images, y in noisy
                ]
            else:
                alignments = [self.estimate(network, parameters, gradient, images, y).detach() for images, y in noisy]
                transform = TRANSFORMS[self.rule.transform]
                pairs = zip(alignments, masks, strict=True)
                cells = [Cells.of_alignment(transform(u), y, self.rule.granularity) for u, y in pairs]

        weights, self.diagnostics = weight_maps(
            cells,
            masks,
            estimators.norm(gradient, self.sum_over_shards),
            self.rule,
            self.sum_over_ranks,
            true_masks,
        )
        if true_masks is not None:
            histogram = self.sum_over_ranks(detection_histogram(alignments, masks, true_masks))
            self.diagnostics["auroc"] = auroc(histogram)
        return weights

    def _check_derivatives(self, network: Network, parameters: Parameters, images: Tensor) -> None:
        """Raise InvalidArgument, on every rank, for a model whose differences are not its derivatives."""
        stopped, whole = self.sum_over_ranks(stopped_gradient(network, parameters, images)).tolist()
        if stopped > torch.finfo(next(iter(parameters.values())).dtype).eps * whole:
            raise InvalidArgument(
                "method.estimator finite: the network stops gradients (torch.no_grad, detach, .data or item), which "
                "differences of its values do not see; use estimator=forward, or reverse"
            )
        self._unchecked = False

    def _clean_gradient(
        self,
        network: Network,
        parameters: Parameters,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
    ) -> Parameters:
        """g, at the parameters that the virtual step starts with: the present ones if it has moved nothing yet."""

        def mean_gradient(at: Parameters, batches: Sequence[LabelledImages]) -> Parameters:
            return estimators.mean_gradient(
                network, at, batches, self.sum_over_ranks, self.placement.sharded, self.begin_sum
            )

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
