"""Meta-Weight-Net: a small net learns, from the clean images, which weight a pixel's loss deserves.

Shu et al. 2019, "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting", with pixels for samples. As
there, the net has one hidden layer of 100 units, learns by Adam (1e-3, weight decay 1e-4), and a step is: virtual step,
step of the net, step of the network with the new weights w/N. Their sum is at most 1.
"""

import torch
from torch import Tensor

from distseg.meta.estimators import norm
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.meta.reduction import ByFunction, OneProcess
from distseg.meta.weight_net import Hypergradient, WeightNet, hypergradient
from distseg.meta.weights import Diagnostics, WeightMap, auroc, detection_histogram
from distseg.methods.learned import Learned
from distseg.methods.step import Method, Parts, WeightedBatch
from distseg.ops import valid_pixels


class MetaWeightNet(Method):
    def __init__(self, parts: Parts) -> None:
        self.noisy, self.clean = parts.noisy_stream(), parts.clean_stream(parts.config.train.clean_batch_size)
        self.accumulation, self.virtual_lr = parts.config.train.accumulation, parts.config.method.virtual_lr
        self.sum_over_ranks = parts.sum_over_ranks
        self.model = parts.reweighter("pixel").model
        self.placement = Whole(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(parts.config.seed)
            self.net = WeightNet().to(parts.device)
        self.learned = Learned(list(self.net.parameters()), lr=parts.config.method.weight_lr, weight_decay=1e-4)

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        noisy = [self.noisy.batch(step, micro) for micro in range(self.accumulation)]
        clean = [self.clean.batch(step, micro) for micro in range(self.accumulation)]
        hyper = hypergradient(
            StatelessNetwork(self.model, self.placement),
            self.placement.trainable(),
            self.net,
            [(b.images, b.masks) for b in noisy],
            [(b.images, b.masks) for b in clean],
            self.virtual_lr,
            ByFunction(self.sum_over_ranks),
        )
        self.learned.step(hyper.by_parameter)
        with torch.no_grad():
            weights = [self.net(losses) for losses in hyper.losses]
        batches = [
            WeightedBatch(b, WeightMap(w, (1 / hyper.count).to(w.dtype).expand(len(w)), w.new_zeros(len(w))))
            for b, w in zip(noisy, weights, strict=True)
        ]
        return batches, self._diagnostics(batches, hyper) if diagnose else {}

    def _diagnostics(self, batches: list[WeightedBatch], hyper: Hypergradient) -> Diagnostics:
        numbers = []
        for weighted in batches:
            masks, truth = weighted.batch.masks, weighted.batch.true_masks
            weights = weighted.weights.full(masks).double()
            wrong = valid_pixels(masks) & valid_pixels(truth) & (masks != truth)
            numbers.append(torch.stack([weights.sum(), weights.square().sum(), (weights * wrong).sum(), wrong.sum()]))
        mass, squares, wrong_mass, wrong_count = self.sum_over_ranks(sum(numbers))
        masks, truths = [w.batch.masks for w in batches], [w.batch.true_masks for w in batches]
        histogram = self.sum_over_ranks(detection_histogram(hyper.alignments, masks, truths))
        return {
            "gradient_norm": norm(hyper.clean_gradient, OneProcess()),
            "mean_weight": mass,
            "effective_fraction": mass.square() / (hyper.count * squares),
            "noise_rate": wrong_count / hyper.count,
            "wrong_mass": wrong_mass / mass,
            "auroc": auroc(histogram),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.learned.load_state_dict(state)
