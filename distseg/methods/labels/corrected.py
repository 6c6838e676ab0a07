"""The labels of the noisy images as they most probably are, by the label model of distseg/labels.

How annotators err is counted over the last steps, from the logits that the loss needs anyway, in the warm-up too. A
step costs as much as one with the labels as drawn.
"""

from typing import Literal

import torch
from torch import Tensor

from distseg.labels.annotators import expected_counts, identity_prior, most_probable_labels
from distseg.labels.distances import signed_distance_bins
from distseg.meta.weights import Diagnostics
from distseg.methods.context import Context
from distseg.methods.part import LabelModel
from distseg.section import Section

DECAY = 0.9
"""Of the counts' exponential moving average, a step: they remember about ten."""


class CorrectedConfig(Section):
    kind: Literal["corrected"] = "corrected"

    def build(self, context: Context) -> LabelModel:
        return Corrected(context.device)


class Corrected(LabelModel):
    def __init__(self, device: torch.device) -> None:
        self.counts = identity_prior(device)
        """(2, BINS) float64, the same on every rank; before anything is known, what was drawn is the truth."""

    def bins(self, masks: Tensor) -> Tensor:
        return signed_distance_bins(masks)

    def labels(self, logits: Tensor, masks: Tensor, bins: Tensor) -> Tensor:
        return most_probable_labels(logits, masks, bins, self.counts)

    def evidence(self, logits: Tensor, masks: Tensor, bins: Tensor) -> Tensor:
        return expected_counts(logits, masks, bins).flatten()

    def learn(self, evidence: Tensor, skipped: Tensor, lr: float) -> Diagnostics:
        average = DECAY * self.counts + (1 - DECAY) * evidence.view_as(self.counts)
        self.counts = torch.where(average.isfinite().all() & ~skipped, average, self.counts)
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"].to(self.counts)
