"""A method: phases × weighting × loss × label model. Every method is the same update, ∇ Σ W·ℓ over the global batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
from torch import Tensor

from distseg.data.batch import Batch
from distseg.data.classes import IGNORE
from distseg.meta.reduction import Reduction
from distseg.meta.weights import WeightMap, joined, uniform_weights
from distseg.methods.config import MethodConfig
from distseg.methods.context import Context
from distseg.methods.part import HeldOut, LabelModel, Loss, Part, PendingWeights, Weighed, Weighting
from distseg.methods.phases import Phase, Phases
from distseg.methods.step import CleanTerm, Drawn, MicroBatch, Step


def build_method(config: MethodConfig, context: Context) -> "Method":
    loss = config.loss.build(context)
    return Method(
        phases=config.phases.build(context, config.weighting.needs_clean, config.labels.needs_held_out),
        weighting=config.weighting.build(context, loss.class_weights),
        loss=loss,
        label_model=config.labels.build(context),
        accumulation=context.accumulation,
        reduction=context.reduction,
        logits_of=context.logits,
        trusted=context.trusted,
        folds=context.folds,
        paired=context.paired,
        labels_first=config.weighting.needs_clean,
        one_pass=context.accumulation == 1,
        reuses_clean=context.adds_gradients and loss.is_cross_entropy,
    )


@dataclass(frozen=True)
class Method:
    """Makes steps. Between steps it keeps what `state_dict` holds and nothing else."""

    phases: Phases
    weighting: Weighting
    loss: Loss
    label_model: LabelModel | None
    accumulation: int
    reduction: Reduction
    logits_of: Callable[[Tensor], Tensor]
    """Of images, by the network as it is."""
    labels_first: bool
    """Whether weights depend on labels, which otherwise follow from the logits of the weighted pass."""
    trusted: frozenset[str] = frozenset()
    """Ids of the noisy images whose masks are references: no label model changes them, or learns from them."""
    folds: Mapping[str, int] = field(default_factory=dict)
    """Which fold each clean image is in, by id."""
    paired: frozenset[str] = frozenset()
    """Ids of the clean images that annotators have drawn too."""
    one_pass: bool = False
    """Whether weights may come from the pass that they weigh. With several micro-batches that is too late: the weights
    of the first one need the sum over all."""
    reuses_clean: bool = False
    """Whether a clean gradient that weights come from is the update's clean part too."""

    def begin(self, index: int, diagnose: bool) -> Step:
        """Step `index` (0-based); every rank makes it. `diagnose` adds diagnostics and changes nothing else."""
        phase = self.phases.at(index)
        noisy, clean, held_out = phase.batches(index, self.accumulation)
        model = self.label_model if noisy and phase.main else None
        pending = self._pending(phase, noisy, clean)
        drawn: Sequence[Drawn | None] = [None] * self.accumulation
        if model:
            labels_first = self.labels_first and not pending
            pairs = zip_longest(noisy, held_out)  # none, or as many
            drawn = [self._drawn(model, *pair, labels_first) for pair in pairs]
        weighed: Weighed | PendingWeights | None = pending
        if not pending and phase.clean_share is not None:
            weighed = self._weigh(noisy, drawn, clean, diagnose)
        term = self._clean_term(phase, weighed, clean)
        batches = noisy if weighed and (term or not phase.clean_share) else _joined(noisy, clean)
        maps = self._maps(phase, weighed, term, noisy, clean)
        return Step(
            [MicroBatch(*each) for each in zip(batches, maps, drawn, strict=True)],
            self.loss,
            self.reduction,
            weighting=self.weighting,
            weighed=weighed._replace(clean=None) if isinstance(weighed, Weighed) else weighed,
            clean=term,
            label_model=model,
            diagnose=diagnose,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What the parts have learned, the same on every rank, by `PART.NAME`; empty for most methods."""
        return {f"{part}.{name}": value for part, each in self._parts() for name, value in each.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; the tensors may be on any device."""
        for part, each in self._parts():
            prefix = f"{part}."
            each.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def _parts(self) -> list[tuple[str, Part]]:
        parts: list[tuple[str, Part]] = [("weighting", self.weighting), ("loss", self.loss)]
        return [*parts, ("labels", self.label_model)] if self.label_model else parts

    def _uniform(self, batches: Sequence[Batch]) -> list[WeightMap]:
        return uniform_weights([batch.masks for batch in batches], self.reduction, batches[0].images.dtype)

    def _pending(self, phase: Phase, noisy: Sequence[Batch], clean: Sequence[Batch]) -> PendingWeights | None:
        # Images that are joined to the noisy ones would carry tangents for nothing, and change what these are.
        if not self.one_pass or phase.clean_share is None or (phase.clean_share and not self.reuses_clean):
            return None
        labelled = [(batch.images, batch.masks) for batch in clean]
        return self.weighting.begin(noisy[0].images, labelled, bool(phase.clean_share))

    def _clean_term(
        self, phase: Phase, weighed: Weighed | PendingWeights | None, clean: Sequence[Batch]
    ) -> CleanTerm | None:
        if not (self.reuses_clean and phase.clean_share and weighed and weighed.clean):
            return None
        return CleanTerm(weighed.clean, phase.clean_share, tuple(each for batch in clean for each in batch.ids))

    def _maps(
        self,
        phase: Phase,
        weighed: Weighed | PendingWeights | None,
        term: CleanTerm | None,
        noisy: Sequence[Batch],
        clean: Sequence[Batch],
    ) -> Sequence[WeightMap | None]:
        """Of the micro-batches, as far as their weights are known."""
        if weighed is None:
            return self._uniform(_joined(noisy, clean))
        if not isinstance(weighed, Weighed):
            return [None]
        if term:
            return [weights.times(1 - term.share) for weights in weighed.maps]
        return self._beside_clean(noisy, weighed.maps, clean, phase.clean_share) if phase.clean_share else weighed.maps

    def _drawn(self, model: LabelModel, batch: Batch, held_out: Batch | None, labels_first: bool) -> Drawn:
        known, masks, every = None, batch.masks, batch.every
        if self.trusted:
            known = _flags(batch, self.trusted)[:, None, None]
            masks = torch.where(known, IGNORE, masks)
            every = every and every._replace(annotators=torch.where(known[:, 0], -1, every.annotators))
        unseen = self._unseen(held_out) if held_out else None
        drawn = Drawn(len(batch.ids), model.bins(masks, every), known, None, unseen, batch.true_masks)
        if not labels_first:
            return drawn
        labels, _ = drawn.correct(model, self.logits_of(batch.images), batch.masks, None)
        return replace(drawn, labels=labels)

    def _unseen(self, batch: Batch) -> HeldOut:
        if batch.true_masks is None:
            raise ValueError("held-out images without references")
        drawn = torch.where(_flags(batch, self.paired)[:, None, None], batch.masks, IGNORE)
        fold = torch.tensor([self.folds.get(id, 0) for id in batch.ids]).to(batch.images.device, non_blocking=True)
        return HeldOut(self.logits_of(batch.images), batch.true_masks, fold, drawn, batch.every)

    def _weigh(
        self, noisy: Sequence[Batch], drawn: Sequence[Drawn | None], clean: Sequence[Batch], diagnose: bool
    ) -> Weighed:
        labelled = [
            (batch.images, batch.masks if known is None or known.labels is None else known.labels)
            for batch, known in zip(noisy, drawn, strict=True)
        ]
        known = [batch.true_masks for batch in noisy if batch.true_masks is not None]
        truths = known if diagnose and len(known) == len(noisy) else None
        return self.weighting.weigh(labelled, [(batch.images, batch.masks) for batch in clean], truths)

    def _beside_clean(
        self, noisy: Sequence[Batch], maps: Sequence[WeightMap], clean: Sequence[Batch], share: float
    ) -> list[WeightMap]:
        """Of both streams' images, the clean ones evenly weighted and with `share` of the loss."""
        even = self._uniform(clean)
        return [
            joined([weights.times(1 - share), clean_weights.times(share)], [batch.masks, clean_batch.masks])
            for batch, weights, clean_batch, clean_weights in zip(noisy, maps, clean, even, strict=True)
        ]


def _flags(batch: Batch, ids: frozenset[str]) -> Tensor:
    """(B,) which images are of `ids`, on their device; nothing waits for it."""
    return torch.tensor([id in ids for id in batch.ids]).to(batch.images.device, non_blocking=True)


def _joined(noisy: Sequence[Batch], clean: Sequence[Batch]) -> list[Batch]:
    """Micro-batch by micro-batch the images of both streams, the noisy ones first; either stream may be empty."""
    if not (noisy and clean):
        return [*noisy, *clean]
    return [
        Batch(
            images=torch.cat([first.images, then.images]),
            masks=torch.cat([first.masks, then.masks]),
            true_masks=None
            if first.true_masks is None or then.true_masks is None
            else torch.cat([first.true_masks, then.true_masks]),
            ids=(*first.ids, *then.ids),
        )
        for first, then in zip(noisy, clean, strict=True)
    ]
