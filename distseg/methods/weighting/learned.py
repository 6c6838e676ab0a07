"""A pixel counts by its loss, through a small net that learns on the clean images what a loss is worth.

Shu, Xie, Yi, Zhao, Zhou, Xu, Meng 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting". As there,
the net has one hidden layer of 100 units, learns by Adam (1e-3, weight decay 1e-4), and a step is: virtual step, step
of the net, step of the network with the new weights w/N. Their sum is at most 1.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distseg.meta.estimators import LabelledImages, norm
from distseg.meta.network import StatelessNetwork
from distseg.meta.weight_net import Hypergradient, WeightNet, hypergradient
from distseg.meta.weights import Diagnostics, WeightMap, auroc, detection_histogram
from distseg.methods.context import Context
from distseg.methods.learned import Learned
from distseg.methods.part import Weighed, Weighting
from distseg.ops import valid_pixels
from distseg.section import Section


class LearnedConfig(Section):
    kind: Literal["learned"] = "learned"
    weight_lr: Annotated[float, Field(gt=0)] = 1e-3
    """The rate of the net that maps losses to weights."""
    virtual_lr: Annotated[float, Field(gt=0)] = 0.1
    """α, the size of the virtual SGD step that the net learns through."""

    needs_clean: ClassVar[bool] = True
    by_pixel: ClassVar[bool] = True
    estimator: ClassVar[str] = "forward"
    """What its inner products with the clean gradient come from."""

    def build(self, context: Context, class_weights: Tensor | None) -> Weighting:
        return LossWeights(context, self.weight_lr, self.virtual_lr, class_weights)


class LossWeights(Weighting):
    """Needs whole parameters on every rank."""

    def __init__(self, context: Context, weight_lr: float, virtual_lr: float, class_weights: Tensor | None) -> None:
        self.network, self.placement = StatelessNetwork(context.model, context.placement), context.placement
        self.reduction, self.virtual_lr, self.class_weights = context.reduction, virtual_lr, class_weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            net = WeightNet()
        self.learned = Learned(net.to(context.device), lr=weight_lr, weight_decay=1e-4)

    def weigh(
        self,
        noisy: Sequence[LabelledImages],
        clean: Sequence[LabelledImages],
        true_masks: Sequence[Tensor] | None,
    ) -> Weighed:
        hyper = hypergradient(
            self.network,
            self.placement.trainable(),
            self.learned.module,
            noisy,
            clean,
            self.virtual_lr,
            self.reduction,
            self.class_weights,
        )
        ahead = self.learned.stepped(hyper.by_parameter)
        with torch.no_grad():
            weights = [ahead.module(losses) for losses in hyper.losses]
        maps = [WeightMap(w, (1 / hyper.count).to(w.dtype).expand(len(w)), w.new_zeros(len(w))) for w in weights]
        masks = [labels for _, labels in noisy]
        diagnostics = self._diagnostics(maps, masks, true_masks, hyper) if true_masks is not None else {}
        return Weighed(maps, diagnostics, ahead)

    def learn(self, evidence: Learned[WeightNet], skipped: Tensor, lr: float) -> Diagnostics:
        self.learned.adopt(evidence, unless=skipped)
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.learned.load_state_dict(state)

    def _diagnostics(
        self, maps: Sequence[WeightMap], masks: Sequence[Tensor], truths: Sequence[Tensor], hyper: Hypergradient
    ) -> Diagnostics:
        numbers = []
        for weight_map, labels, truth in zip(maps, masks, truths, strict=True):
            weights = weight_map.full(labels).double()
            wrong = valid_pixels(labels) & valid_pixels(truth) & (labels != truth)
            numbers.append(torch.stack([weights.sum(), weights.square().sum(), (weights * wrong).sum(), wrong.sum()]))
        mass, squares, wrong_mass, wrong_count = self.reduction.sum(torch.stack(numbers).sum(0))
        histogram = self.reduction.sum(detection_histogram(hyper.alignments, masks, truths))
        return {
            "gradient_norm": norm(hyper.clean_gradient, self.reduction),
            "mean_weight": mass,
            "effective_fraction": mass.square() / (hyper.count * squares),
            "noise_rate": wrong_count / hyper.count,
            "wrong_mass": wrong_mass / mass,
            "auroc": auroc(histogram),
        }
