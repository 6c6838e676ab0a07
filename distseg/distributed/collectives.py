"""What ranks say to each other. Tensors only: nothing that travels is pickled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distseg.errors import BadFileError, UserError

Result = TypeVar("Result")


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place, and return it; every rank gets the same bits."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def begin_sum_over_ranks(tensor: Tensor) -> Callable[[], Tensor]:
    """`sum_over_ranks` in the background; call what it returns for the result. Every rank begins sums in one order."""
    work = dist.all_reduce(tensor, async_op=True) if dist.get_world_size() > 1 else None

    def result() -> Tensor:
        if work is not None:
            work.wait()
        return tensor

    return result


@dataclass(frozen=True)
class AllReduce:
    """Sums over the ranks of the process group: a Reduction as `distseg.meta` understands it."""

    sharded: bool = False
    """Whether a rank has only its shards of the parameters (ZeRO-3)."""

    @property
    def sums_gradients(self) -> bool:
        return not self.sharded and dist.get_world_size() > 1

    def sum(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor)

    def begin_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        return begin_sum_over_ranks(tensor)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        return sum_over_ranks(tensor) if self.sharded else tensor


class FailedElsewhere(Exception):
    """Rank 0 could not do what all ranks need, and has said why."""


def main_rank_first(task: Callable[[], Result], device: torch.device) -> Result:
    """Run `task` on rank 0 and, once it has succeeded there, on the others, which then find its files in place.

    If it raises on rank 0, that exception goes up there and FailedElsewhere on every other rank: nobody waits for a
    rank that has gone. A UserError of another rank alone becomes a BadFileError that names the rank, which tells it.
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
    if main:
        return result
    try:
        return task()
    except UserError as error:
        raise BadFileError(f"rank {dist.get_rank()}: {error}") from None


def decided_by_main(decide: Callable[[], int], device: torch.device) -> int:
    """The number that rank 0 decides on, on every rank. Exceptions go up as those of `main_rank_first` do."""
    answer = torch.zeros((), dtype=torch.int64, device=device)

    def on_main() -> None:
        if dist.get_rank() == 0:
            answer.fill_(decide())

    main_rank_first(on_main, device)
    if dist.get_world_size() > 1:
        dist.broadcast(answer, src=0)
    return int(answer)


def gather_bytes(content: bytes, device: torch.device) -> list[bytes]:
    """What each rank brings, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [content]
    length = torch.tensor([len(content)], device=device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    rows = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(rows, padded)
    return [bytes(row[: int(n)].tolist()) for row, n in zip(rows, lengths, strict=True)]
