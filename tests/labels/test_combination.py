"""Votes, confusion counts and scores of several annotators, pixel by pixel; and annotators whose errors are known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from distseg import ops
from distseg.data.annotators import vote
from distseg.data.batch import EveryAnnotation
from distseg.labels.calibration import calibration_sums, joint_newton_step, relative_logits
from distseg.labels.combination import (
    OWN_FROM,
    annotation_counts,
    annotator_scores,
    reliability,
)
from distseg.methods.labels.averages import MEMORY
from distseg.methods.labels.combined import Combined
from distseg.methods.part import HeldOut

IGNORE = 255
NO, YES = torch.tensor(False), torch.tensor(True)
RATES = torch.tensor([0.04, 0.1, 0.2, 0.3, 0.45])


def case(seed: int, classes: int = 2, network: float = 2.0) -> tuple[Tensor, Tensor, EveryAnnotation]:
    """Truth, logits (float64) with a margin of `network`, and three of five annotators, who differ in reliability."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (8, 6, 7), generator=g, dtype=torch.uint8)
    logits = network * torch.nn.functional.one_hot(truth.long(), classes).movedim(-1, 1).double()
    logits += torch.randn(logits.shape, generator=g, dtype=torch.float64)
    who = torch.stack([torch.randperm(5, generator=g)[:3] for _ in range(8)])
    other = (truth[:, None] + torch.randint(1, classes, (8, 3, 6, 7), generator=g)) % classes
    errs = torch.rand(8, 3, 6, 7, generator=g) < RATES[who][:, :, None, None]
    masks = torch.where(errs, other, truth[:, None]).to(torch.uint8)
    who[0, 2], masks[0, 2] = -1, IGNORE
    masks[1, 0, 0] = IGNORE
    return truth, logits, EveryAnnotation(masks, who)


def counts_of(logits: Tensor, every: EveryAnnotation) -> Tensor:
    """What annotators have drawn, against the network alone."""
    classes = logits.shape[1]
    silent, as_it_is = torch.zeros(5, classes, classes), torch.tensor([1.0, *[0.0] * (classes - 1)])
    everywhere = torch.zeros_like(every.masks[:, 0])
    return ops.correct_labels(logits, everywhere, *every, silent.double(), as_it_is.double())[1]


@pytest.mark.parametrize("classes", [2, 3])
def test_counts_scores_and_reliabilities_by_their_formula(classes: int) -> None:
    _, logits, every = case(0, classes)
    p = logits.softmax(1)
    counts, drawn = np.zeros((5, classes, classes)), np.zeros(5)
    for b, r in np.ndindex(8, 3):
        if (who := int(every.annotators[b, r])) < 0:
            continue
        drawn[who] += 1
        for h, w in np.ndindex(6, 7):
            if (m := int(every.masks[b, r, h, w])) != IGNORE:
                counts[who, :, m] += p[b, :, h, w].numpy()
    actual = counts_of(logits, every)
    np.testing.assert_allclose(actual, counts, rtol=1e-12)
    assert annotation_counts(every.annotators, 5).tolist() == drawn.tolist()

    mixed = counts + OWN_FROM * counts.sum(0) / drawn.sum()
    mixed += 1e-3 * mixed.sum(2, keepdims=True) / classes
    tables = np.log(mixed / mixed.sum(2, keepdims=True))
    actual_tables = reliability(actual, torch.as_tensor(drawn), pooled=False)
    np.testing.assert_allclose(actual_tables, tables, rtol=1e-12)
    together = reliability(actual, torch.as_tensor(drawn), pooled=True).numpy()
    assert (together == together[:1]).all() and (tables != tables[:1]).any()

    scores = np.zeros(logits.shape)
    for b, r, h, w in np.ndindex(*every.masks.shape):
        who, m = int(every.annotators[b, r]), int(every.masks[b, r, h, w])
        if who >= 0 and m != IGNORE:
            scores[b, :, h, w] += tables[who, :, m] - tables[who, 0, m]
    np.testing.assert_allclose(annotator_scores(*every, actual_tables, torch.float64), scores, rtol=1e-9, atol=1e-12)


def test_an_annotator_is_believed_by_how_much_there_is_of_him() -> None:
    good, bad = torch.tensor([[99.0, 1.0], [1.0, 99.0]]), torch.tensor([[60.0, 40.0], [40.0, 60.0]])
    for images, share in ((0.0, 0.0), (OWN_FROM, 0.5), (1e9, 1.0)):
        counts = torch.stack([images * good, 1e6 * bad]).double()
        found = reliability(counts, torch.tensor([images, 1e6], dtype=torch.float64), pooled=False)[0].exp()
        all_of_them = counts.sum(0) / counts.sum(0).sum(1, keepdim=True)
        expected = share * good / 100 + (1 - share) * all_of_them
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_joint_fit_is_the_maximum_of_the_likelihood(classes: int) -> None:
    """By torch's own optimiser, on the sum over pixels plus the prior."""
    truth, logits, every = case(3, classes)
    truth[0, :2] = IGNORE
    z = relative_logits(logits)
    s = annotator_scores(*every, reliability(counts_of(logits, every), torch.ones(5), False), z.dtype)
    theta = torch.cat([torch.ones(1), torch.zeros(classes)]).double()
    for _ in range(30):
        theta = joint_newton_step(theta, calibration_sums(z, truth, theta, s))

    best = torch.cat([torch.ones(1), torch.zeros(classes)]).double().requires_grad_()
    optimiser = torch.optim.LBFGS([best], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        shift = torch.cat([torch.zeros(1), best[2:]])[:, None, None]
        labels = torch.where(truth == IGNORE, -100, truth.long())
        nll = torch.nn.functional.cross_entropy(best[0] * z + best[1] * s + shift, labels, reduction="sum")
        centre = torch.cat([torch.ones(1), torch.zeros(classes)])
        total = nll + 0.5 * 1e-3 * (truth != IGNORE).sum() * (best - centre).square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    torch.testing.assert_close(theta, best.detach(), rtol=1e-5, atol=1e-6)


def test_a_network_that_knows_nothing_gets_no_weight_below_zero() -> None:
    truth, logits, every = case(4, network=-3.0)  # it says the contrary
    tables = reliability(counts_of(logits, every), torch.ones(5), True)
    z, s = relative_logits(logits), annotator_scores(*every, -tables, torch.float64)
    theta = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for _ in range(30):
        theta = joint_newton_step(theta, calibration_sums(z, truth, theta, s))
    alone = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64)
    for _ in range(30):
        alone = joint_newton_step(alone, calibration_sums(torch.zeros_like(z), truth, alone, s))
    assert theta[0] == 0 and theta[1] > 0.3
    torch.testing.assert_close(theta[1:], alone[1:], rtol=1e-2, atol=1e-2)


# --- the model --------------------------------------------------------------------------------------------------------


def model_of(classes: int = 2, least_gain: float = 0.05, pooled: bool = False) -> Combined:
    return Combined(torch.device("cpu"), classes, 5, 100, least_gain, 20, pooled)


def learn(model: Combined, steps: range, network: float = 2.0, skipped: Tensor = NO, paired: bool = True) -> dict:
    found = {}
    for seed in steps:
        _, logits, every = case(seed, model.classes, network)
        truth, clean_logits, clean = case(seed + 1000, model.classes, network)
        if not paired:
            clean = EveryAnnotation(torch.full_like(clean.masks, IGNORE), torch.full_like(clean.annotators, -1))
        _, evidence = model.correct(
            logits,
            vote(every.masks, model.classes),
            every,
            HeldOut(clean_logits, truth, torch.arange(len(truth)) % 10, truth, clean),
        )
        found = model.learn(evidence, skipped, 0.1)
    return found


def wrong_of(model: Combined, network: float = 2.0) -> tuple[float, float]:
    """The model's share of wrong labels, and the vote's."""
    wrong = torch.zeros(2)
    for seed in range(500, 520):
        truth, logits, every = case(seed, model.classes, network)
        labels, _ = model.correct(logits, vote(every.masks, model.classes), every, None)
        wrong += torch.stack([(each != truth).double().mean() for each in (labels, vote(every.masks, model.classes))])
    return tuple((wrong / 20).tolist())


@pytest.mark.parametrize("classes", [2, 3])
def test_a_network_that_adds_something_is_heard_and_annotators_are_told_apart(classes: int) -> None:
    model = model_of(classes)
    assert learn(model, range(19))["labels/corrects"] == 0, "too early"
    mine, votes = wrong_of(model)
    assert mine == votes
    assert learn(model, range(19, 90))["labels/corrects"] == 1
    mine, votes = wrong_of(model)
    assert mine < 0.6 * votes
    tables = reliability(MEMORY * model.counts, MEMORY * model.drawn, False).exp()
    errs = 1 - tables.diagonal(dim1=1, dim2=2).mean(1)
    assert errs.argsort().tolist() == [0, 1, 2, 3, 4]
    together = model_of(classes, pooled=True)
    learn(together, range(90))
    assert mine < wrong_of(together)[0] < votes


def test_a_network_that_adds_nothing_leaves_the_vote() -> None:
    model = model_of(pooled=True)
    assert learn(model, range(60), network=0.0)["labels/corrects"] == 0
    mine, votes = wrong_of(model, network=0.0)
    assert mine == votes


def test_clean_images_that_nobody_has_annotated_leave_the_vote() -> None:
    model = model_of()
    found = learn(model, range(40), paired=False)
    assert found["labels/corrects"] == 0 and model.known == 0 and found["labels/scale"] == 1
    mine, votes = wrong_of(model)
    assert mine == votes


def test_the_last_word_stands_when_the_clean_images_are_learned_from() -> None:
    model = model_of()
    learn(model, range(60))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, logits, every = case(70)
    model.learn(model.correct(logits, vote(every.masks, model.classes), every, None)[1], NO, 0.1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {"counts", "drawn"} and model.corrects == 1


@pytest.mark.parametrize("fault", ["skipped", "noisy", "clean"])
def test_a_step_that_is_skipped_or_not_finite_leaves_all_of_the_state(fault: str) -> None:
    model = model_of()
    learn(model, range(30))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, logits, every = case(70)
    truth, clean_logits, clean = case(71)
    {"skipped": logits, "noisy": logits, "clean": clean_logits}[fault][0, 0, 3, 3] = torch.nan
    _, evidence = model.correct(
        logits,
        vote(every.masks, model.classes),
        every,
        HeldOut(clean_logits, truth, torch.arange(len(truth)) % 10, truth, clean),
    )
    if fault == "skipped":
        evidence = torch.zeros_like(evidence)
    model.learn(evidence, YES if fault == "skipped" else NO, 0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    other = model_of()
    other.load_state_dict(before)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
