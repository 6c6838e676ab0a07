"""The one way to make a step: trainer, dry run, benchmarks and tests call it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.distributed.engine import (
    add_gradient,
    gradients_put_away,
    reduced_gradients,
    skip_update_if,
    skipped_by_engine,
)
from distseg.distributed.network_state import KeptBuffers, share_buffers
from distseg.meta.weights import Diagnostics
from distseg.methods.step import Step
from distseg.training.guard import not_finite


class BeginsSteps(Protocol):
    """What makes steps: distseg.methods.method.Method."""

    def begin(self, index: int, diagnose: bool) -> Step: ...


@dataclass(frozen=True)
class Outcome:
    step: Step
    loss: Tensor
    """This rank's part of Σ W·ℓ over the global batch, a scalar."""
    bad: Tensor
    """`not_finite`'s flags; the step was skipped where any of them is set."""
    diagnostics: Diagnostics


def train_step(engine: Any, method: BeginsSteps, index: int, lr: float, diagnose: bool = False) -> Outcome:
    """One optimiser step on Σ W·ℓ over the images of all ranks, or none where that is not finite on one of them.

    A skipped step changes nothing at all, on any rank: neither parameters nor buffers, nor the optimiser's state, nor
    what the method has learned. Nothing here waits for a GPU.
    """
    world_size = dist.get_world_size()
    with gradients_put_away(engine):
        step = method.begin(index, diagnose)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    buffers = KeptBuffers(engine.module)
    total = torch.zeros((), device=engine.device)
    for k in range(len(step.micro_batches)):
        logits = step.forward(engine, k)
        # The engine averages gradients over ranks; the weights already sum to 1 over ranks and micro-batches.
        loss = step.loss(k, logits, scale=world_size)
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach()
        if k + 1 < len(step.micro_batches):
            engine.step()
    if step.clean:
        add_gradient(engine, step.clean.mean.gradient, step.clean.share)
        total += step.clean.mean.loss * (step.clean.share * world_size)
    bad = not_finite(total, reduced_gradients(engine), dist.get_rank(), world_size)
    skip_update_if(engine, bad.any())
    engine.step()
    if skipped_by_engine(engine):
        bad[-1] = 1
    skipped = bad.any()
    buffers.restore_where(skipped)
    share_buffers(engine.module)
    return Outcome(step, total / world_size, bad, step.finish(skipped, lr))
