"""Noisy images first, then noisy images with corrected labels beside the clean ones, and clean images alone last.

What is learned besides the network is how annotators err (distseg/labels): counts over the last steps, from
the logits that the loss needs anyway. A step costs as much as an unweighted one of as many images.
"""

import torch
from torch import Tensor

from distseg.labels.annotators import expected_counts, identity_prior, most_probable_labels
from distseg.labels.distances import signed_distance_bins
from distseg.meta.weights import Diagnostics, WeightMap
from distseg.methods.step import Method, Parts, WeightedBatch, batches_of, evenly_weighted, mixed
from distseg.ops import valid_pixels, weighted_loss

MEMORY = 0.9
"""What the counts keep of themselves in a step: they remember about ten."""


class LabelCorrection(Method):
    def __init__(self, parts: Parts) -> None:
        self.noisy, self.clean = parts.noisy_stream(), parts.clean_stream(parts.config.train.clean_batch_size)
        self.noisy_count, self.accumulation = parts.config.train.batch_size, parts.config.train.accumulation
        self.mixed_from, self.clean_from = parts.warm_until, parts.clean_from
        self.clean_share, self.sum_over_ranks = parts.config.method.clean_share, parts.sum_over_ranks
        self.step, self.diagnosing, self.marks, self.truths, self.diagnostics = 0, False, [], [], {}
        self.counts = identity_prior(parts.device)
        """(2, BINS), the same on every rank; before anything is known, what was drawn is the truth."""
        self.new_counts = torch.zeros_like(self.counts)
        """This rank's of the present step; so is `wrong`: pixels of known truth, those drawn and those left wrong."""
        self.wrong = torch.zeros(3, dtype=torch.float64, device=parts.device)

    def draw(self, step: int, diagnose: bool) -> tuple[list[WeightedBatch], Diagnostics]:
        """The diagnostics are there after `finish_step`: which labels are corrected follows from the logits.

        Marks are found here, on the host, so that nothing waits for a GPU once the network runs.
        """
        self.step, self.diagnosing, self.marks, self.truths, self.diagnostics = step, diagnose, [], [], {}
        if step >= self.clean_from:
            clean = batches_of(self.clean, step, self.accumulation)
            return evenly_weighted(clean, self.sum_over_ranks), self.diagnostics
        noisy = batches_of(self.noisy, step, self.accumulation)
        weighted = evenly_weighted(noisy, self.sum_over_ranks)
        self.marks = [signed_distance_bins(batch.masks) for batch in noisy]
        if diagnose:
            self.truths = [batch.true_masks for batch in noisy]
        if step >= self.mixed_from:
            clean = evenly_weighted(batches_of(self.clean, step, self.accumulation), self.sum_over_ranks)
            weighted = [mixed(*pair, self.clean_share) for pair in zip(weighted, clean, strict=True)]
        return weighted, self.diagnostics

    def loss(self, logits: Tensor, masks: Tensor, weights: WeightMap) -> Tensor:
        if self.step < self.clean_from:
            drawn, rest = masks[: self.noisy_count], masks[self.noisy_count :]
            labels = self._labels(logits[: self.noisy_count].detach(), drawn)
            masks = torch.cat([labels, rest])
        return weighted_loss(logits, masks, *weights)

    def _labels(self, logits: Tensor, drawn: Tensor) -> Tensor:
        """What to learn from noisy images, (B, H, W); and counts for the steps to come."""
        marks = self.marks.pop(0)
        self.new_counts += expected_counts(logits, drawn, marks)
        labels = most_probable_labels(logits, drawn, marks, self.counts) if self.step >= self.mixed_from else drawn
        if self.truths:
            truth = self.truths.pop(0)
            known = valid_pixels(drawn) & valid_pixels(truth)
            pixels = (known, known & (drawn != truth), known & (labels != truth))
            self.wrong += torch.stack([part.sum() for part in pixels])
        return labels

    def finish_step(self, lr: float) -> None:
        if self.step >= self.clean_from:
            return
        both = self.sum_over_ranks(torch.cat([self.new_counts.flatten(), self.wrong]))
        counts, (known, drawn, left) = both[:-3].view_as(self.counts), both[-3:]
        # Those of a step that is not finite are not remembered.
        blend = MEMORY * self.counts + (1 - MEMORY) * counts
        self.counts = torch.where(blend.isfinite().all(), blend, self.counts)
        if self.diagnosing:
            self.diagnostics |= {"noise_rate": drawn / known, "corrected_noise_rate": left / known}
        self.new_counts.zero_()
        self.wrong.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"]
