"""Every noisy pixel counts by how well its gradient agrees with the clean gradient at the present parameters."""

from distseg.meta.weights import Diagnostics, joined, uniform_weights
from distseg.training.methods.step import Method, Parts, WeightedBatch, joined_batches


class Reweighted(Method):
    """W from the clean gradient, over cells of one granularity."""

    def __init__(self, parts: Parts, granularity: str) -> None:
        self.noisy, self.clean = parts.noisy_stream(), parts.clean_stream(parts.config.train.clean_batch_size)
        self.accumulation = parts.config.train.accumulation
        self.include_clean = parts.config.method.include_clean
        self.reweighter, self.sum_over_ranks = parts.reweighter(granularity), parts.sum_over_ranks

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        noisy = [self.noisy.batch(step, micro) for micro in range(self.accumulation)]
        clean = [self.clean.batch(step, micro) for micro in range(self.accumulation)]
        weights = self.reweighter.weigh(
            [(b.images, b.masks) for b in noisy],
            [(b.images, b.masks) for b in clean],
            [b.true_masks for b in noisy] if diagnose else None,
        )
        if self.include_clean:
            clean_weights = uniform_weights([b.masks for b in clean], self.sum_over_ranks, weights[0].scale.dtype)
            pairs = list(zip(noisy, clean, strict=True))
            weights = [
                joined(maps, [batch.masks for batch in pair]).times(0.5)
                for maps, pair in zip(zip(weights, clean_weights, strict=True), pairs, strict=True)
            ]
            noisy = [joined_batches(pair) for pair in pairs]
        return [WeightedBatch(b, w) for b, w in zip(noisy, weights, strict=True)], self.reweighter.diagnostics


def pixel_reweight(parts: Parts) -> Reweighted:
    """Mirikharaji et al. 2019, at the granularity of the config."""
    return Reweighted(parts, parts.config.method.granularity)


def image_reweight(parts: Parts) -> Reweighted:
    """Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning"."""
    return Reweighted(parts, "image")
