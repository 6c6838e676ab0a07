"""Every noisy pixel counts by how well its gradient agrees with the clean gradient at the present parameters."""

from distseg.meta import PixelReweighter
from distseg.meta.weights import Diagnostics
from distseg.methods.step import Method, Parts, WeightedBatch, batches_of, evenly_weighted, mixed


class Reweighted(Method):
    """W from the clean gradient, by one reweighter.

    Two phases may frame it: `warm_up`, in which every noisy pixel counts the same, and `clean_phase`, in which every
    pixel of the clean images does and the noisy ones are left alone.
    """

    def __init__(self, parts: Parts, reweighter: PixelReweighter) -> None:
        self.noisy, self.clean = parts.noisy_stream(), parts.clean_stream(parts.config.train.clean_batch_size)
        self.accumulation = parts.config.train.accumulation
        self.reweighted_from = parts.warm_until
        self.clean_from = parts.clean_from
        self.clean_share = parts.config.method.clean_share if parts.config.method.include_clean else 0.0
        self.reweighter, self.sum_over_ranks = reweighter, parts.sum_over_ranks

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        if step >= self.clean_from:
            return evenly_weighted(batches_of(self.clean, step, self.accumulation), self.sum_over_ranks), {}
        noisy = batches_of(self.noisy, step, self.accumulation)
        if step < self.reweighted_from:
            return evenly_weighted(noisy, self.sum_over_ranks), {}
        clean = batches_of(self.clean, step, self.accumulation)
        weights = self.reweighter.weigh(
            [(b.images, b.masks) for b in noisy],
            [(b.images, b.masks) for b in clean],
            [b.true_masks for b in noisy] if diagnose else None,
        )
        weighted = [WeightedBatch(b, w) for b, w in zip(noisy, weights, strict=True)]
        if self.clean_share:
            evenly = evenly_weighted(clean, self.sum_over_ranks)
            weighted = [mixed(*pair, self.clean_share) for pair in zip(weighted, evenly, strict=True)]
        return weighted, self.reweighter.diagnostics


def pixel_reweight(parts: Parts) -> Reweighted:
    """Mirikharaji et al. 2019, at the granularity of the config."""
    method = parts.config.method
    return Reweighted(parts, parts.reweighter(method.granularity, transform=method.transform))


def image_reweight(parts: Parts) -> Reweighted:
    """Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning"."""
    return Reweighted(parts, parts.reweighter("image"))
