"""Updates that must not happen: a loss or a gradient that is not finite, on any rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distseg.distributed.collectives import gather_bytes, sum_over_ranks
from distseg.distributed.runtime import Runtime


class Diverged(Exception):
    """Too many steps in a row were not finite: one line with step, rank and images, the same on every rank."""


def not_finite(loss: Tensor, gradients: Sequence[Tensor], rank: int, world_size: int) -> Tensor:
    """(world_size + 1,) on the device, the same on every rank: whose loss is not finite, and how many gradients'.

    `loss` is this rank's, a scalar; `gradients` are what its optimiser would step on. One small all-reduce, and no
    synchronisation with the host.
    """
    flags = torch.zeros(world_size + 1, device=loss.device)
    flags[rank] = ~loss.isfinite()
    if gradients:
        # The largest magnitude: unlike a sum of squares it is finite wherever every element is.
        largest = torch.stack(torch._foreach_norm(list(gradients), float("inf")))
        flags[-1] = ~largest.isfinite().all()
    return sum_over_ranks(flags)


@dataclass
class Guard:
    """Counts skipped updates, and ends the run after `limit` in a row.

    The flags stay on the device until `check`: a skipped update leaves everything as it was, so it is no harm if the
    end comes some steps late.
    """

    limit: int
    runtime: Runtime
    skipped: int = 0
    in_a_row: int = 0
    _unread: list[tuple[int, Tensor, tuple[str, ...]]] = field(default_factory=list)

    def record(self, step: int, flags: Tensor, ids: tuple[str, ...]) -> None:
        """Note `not_finite`'s answer for `step` (1-based), and the images that this rank took."""
        self._unread.append((step, flags, ids))

    def check(self) -> None:
        """Read what was recorded, one copy to the host; every rank calls it. Raises Diverged on all of them."""
        if not self._unread:
            return
        table = torch.stack([flags for _, flags, _ in self._unread]).tolist()
        for (step, _, ids), row in zip(self._unread, table, strict=True):
            bad = any(row)
            self.skipped += bad
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if self.in_a_row >= self.limit:
                raise Diverged(self._explain(step, row, ids))
        self._unread.clear()

    def _explain(self, step: int, row: list[float], ids: tuple[str, ...]) -> str:
        images = [part.decode() for part in gather_bytes(", ".join(ids).encode(), self.runtime.device)]
        ranks = [rank for rank, bad in enumerate(row[:-1]) if bad]
        what = "the loss is not finite" if ranks else "the loss is finite on every rank, its gradient is not"
        where = "; ".join(f"rank {rank} with images {images[rank]}" for rank in ranks or range(len(images)))
        return f"step {step}: {what}, update {self.in_a_row} in a row that is skipped: {where}"
