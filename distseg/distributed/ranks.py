"""The one owner of rank arithmetic: which positions of a global order belong to which rank."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShardSpec:
    """`rank` of `world_size` processes; `local_rank` is this process's device index on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and self.local_rank >= 0):
            raise ValueError(f"no such shard: {self}")

    def micro_batch(self, step: int, micro: int, accumulation: int, batch_size: int) -> range:
        """Positions, in the stream's endless global order, of this rank's `micro`-th batch of `step`.

        A step consumes `accumulation * world_size * batch_size` consecutive positions, micro-batch by micro-batch and
        rank by rank in each, so the *set* that a step sees depends only on that product and not on how it is cut.
        """
        first = ((step * accumulation + micro) * self.world_size + self.rank) * batch_size
        return range(first, first + batch_size)

    def evaluation_batches(self, count: int, batch_size: int) -> list[range]:
        """This rank's contiguous share of `range(count)`, cut into batches; each index falls to exactly one rank."""
        first = count * self.rank // self.world_size
        last = count * (self.rank + 1) // self.world_size
        return [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
