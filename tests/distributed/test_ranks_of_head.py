"""N ranks = 1 rank and accumulation = one large batch for the estimator `head`, under an engine of each ZeRO stage."""

import itertools

import torch
from test_ranks import STAGES, engine_for, global_batches, make_model, reweighter_of, weigh
from torch import Tensor

from distseg.meta import PixelReweighter
from distseg.testing.ranks import run_ranks


def weights_by_head(runtime) -> dict[str, Tensor]:
    found = {}
    for stage, accumulation in itertools.product(STAGES, (1, 2)):
        _, shadow, placement = engine_for(runtime, stage, accumulation, torch.float64, "group")
        reweighter = reweighter_of(shadow, placement, "head", "paper")
        *_, weights = weigh(reweighter, runtime, accumulation, 0, torch.float64)
        norm = reweighter.diagnostics["gradient_norm"]
        found |= {f"{stage} {accumulation} weights": weights, f"{stage} {accumulation} norm": norm}
    return found


def test_one_rank_or_two_whole_or_sharded_accumulated_or_not() -> None:
    reweighter = PixelReweighter(make_model(torch.float64, "group"), estimator="head")
    noisy, clean = global_batches(0, torch.float64)
    expected = {"weights": reweighter(*noisy, *clean), "norm": reweighter.diagnostics["gradient_norm"]}
    for found in run_ranks(weights_by_head, 2):
        for case, actual in found.items():
            right = expected[case.split()[-1]]
            torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-10 * right.max().item(), msg=case)
