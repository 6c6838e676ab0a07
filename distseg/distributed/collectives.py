"""What ranks say to each other. Tensors only: nothing that travels is pickled."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place, and return it; every rank gets the same bits."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0: a network may keep statistics of what each rank sees."""
    if dist.get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class FailedElsewhere(Exception):
    """Rank 0 could not do what all ranks need, and has said why."""


def main_rank_first(task: Callable[[], Result], device: torch.device) -> Result:
    """Run `task` on rank 0 and, once it has succeeded there, on the others, which then find its files in place.

    If it raises on rank 0, that exception goes up there and FailedElsewhere on every other rank: nobody waits for a
    rank that has gone.
    """
    main = dist.get_rank() == 0
    failed = torch.zeros((), device=device)
    try:
        if main:
            result = task()
    except BaseException:
        failed += 1
        raise
    finally:
        if dist.get_world_size() > 1:
            dist.broadcast(failed, src=0)
    if failed:
        raise FailedElsewhere
    return result if main else task()
