"""Invariants 3 and 4 for a loss that is no sum over pixels, and for class weights, against a reference in plain torch.

{ZeRO 0, 1, 2, 3} × {1, 2, 4 ranks} × accumulation {1, 2}: weights by the clean gradient of the weighted cross-entropy,
then updates by Dice plus cross-entropy under these weights. One of the images shows no lesion.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_ranks import (
    GLOBAL_NOISY,
    LR,
    STAGES,
    assemble,
    engine_for,
    global_batches,
    make_model,
    micro_batches,
    whole_again,
)
from torch import Tensor
from torch.func import functional_call

from distseg.distributed.collectives import AllReduce, sum_over_ranks
from distseg.distributed.engine import gradients_put_away
from distseg.meta import PixelReweighter
from distseg.methods.losses.dice_cross_entropy import DiceCrossEntropy
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.training.train_step import train_step

DICE, SMOOTH, CLASS_WEIGHTS = 0.6, 1e-3, (0.5, 4.0)
STEPS = 3


def batches(step: int, dtype: torch.dtype):
    (images, masks), clean = global_batches(step, dtype)
    masks[3] = torch.where(masks[3] == 1, 0, masks[3])
    return (images, masks), clean


def reference(dice: float = DICE, class_weights: tuple[float, float] = CLASS_WEIGHTS) -> dict[str, Tensor]:
    """One process in float64: the paper's virtual step at W = 0, and SGD on the loss image by image."""
    model = make_model(torch.float64, "group")
    factors = torch.tensor([*class_weights, 0.0], dtype=torch.float64)
    out = {}
    for step in range(STEPS):
        (x, y), (xc, yc) = batches(step, torch.float64)
        names, params = zip(*model.named_parameters(), strict=True)

        def losses(theta, images, masks, names=names):
            logits = functional_call(model, dict(zip(names, theta, strict=True)), (images,))[:, 0]
            full = F.binary_cross_entropy_with_logits(logits, (masks == 1).double(), reduction="none")
            return logits, factors[masks.long().clamp(max=2)] * full

        w = torch.zeros(y.shape, dtype=torch.float64, requires_grad=True)
        inner = torch.autograd.grad((w * losses(params, x, y)[1]).sum(), params, create_graph=True)
        fast = [p - 0.1 * g for p, g in zip(params, inner, strict=True)]
        [minus_u] = torch.autograd.grad(losses(fast, xc, yc)[1].sum() / (yc != 255).sum(), w)
        weights = (-minus_u).clamp(min=0)
        weights /= weights.sum()
        logits, per_pixel = losses(params, x, y)
        loss = (1 - dice) * (weights * per_pixel).sum()
        for image in range(GLOBAL_NOISY):
            own, p, lesion = weights[image], logits[image].sigmoid(), (y[image] == 1).double()
            if (own * lesion).sum() > 0:
                more = SMOOTH * own.sum()
                score = (2 * (own * p * lesion).sum() + more) / ((own * (p + lesion)).sum() + more)
                loss = loss + dice * own.sum() * (1 - score)
        with torch.no_grad():
            for parameter, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                parameter -= LR * gradient
        out |= {f"{step}.weights": weights, f"{step}.loss": loss.detach()}
        out |= {f"{step}.parameter.{name}": p.detach().clone() for name, p in model.named_parameters()}
    return out


def train(runtime) -> dict[str, Tensor]:
    """`stage accumulation:step.quantity` and its value, in single precision."""
    out = {}
    class_weights = torch.tensor(CLASS_WEIGHTS)
    loss = DiceCrossEntropy(DICE, SMOOTH, class_weights)
    for stage, accumulation in itertools.product(STAGES, (1, 2)):
        engine, shadow, placement = engine_for(runtime, stage, accumulation, torch.float32, "group")
        reweighter = PixelReweighter(
            shadow, class_weights=class_weights, reduction=AllReduce(placement.sharded), placement=placement
        )
        for step in range(STEPS):
            noisy, clean = (micro_batches(pair, runtime, accumulation) for pair in batches(step, torch.float32))
            with gradients_put_away(engine):
                maps = reweighter.weigh(noisy, clean)
            images, masks = zip(*noisy, strict=True)
            outcome = train_step(engine, GivenSteps(images, masks, lambda maps=maps: maps, loss), step, LR)
            case = f"ZeRO-{stage} {accumulation}:{step}"
            full = [w.full(y) for w, y in zip(maps, masks, strict=True)]
            out[f"{case}.weights"] = assemble(full, runtime, accumulation)
            out[f"{case}.loss"] = sum_over_ranks(outcome.loss.clone())
            for name, value in whole_again(placement.trainable(), placement, shadow).items():
                out[f"{case}.parameter.{name}"] = value
    return out


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_rank_or_many_whole_or_sharded_accumulated_or_not(world_size: int) -> None:
    expected, plain, unweighted = reference(), reference(dice=0.0), reference(class_weights=(1.0, 1.0))
    last = f"{STEPS - 1}.parameter."
    for other in (plain, unweighted):
        change = max((expected[key] - other[key]).abs().max().item() for key in expected if key.startswith(last))
        assert change > 1e-3, "the loss hardly matters"
    wrong = []
    for rank, actual in enumerate(run_ranks(train, world_size)):
        for key, value in actual.items():
            case, quantity = key.split(":")
            right = expected[quantity]
            error = ((value - right).abs().max() / right.abs().max().clamp(min=1e-3)).item()
            if not error < 2e-5:
                wrong.append(f"rank {rank} of {world_size}: {case}, {quantity}: {error:.1e}")
    assert not wrong, "\n".join(wrong)
