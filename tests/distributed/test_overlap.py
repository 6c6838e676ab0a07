"""The clean gradient leaves in buckets while the backward pass that makes it goes on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distseg.distributed.collectives import AllReduce, sum_over_ranks
from distseg.meta import estimators
from distseg.meta.reduction import ByFunction
from distseg.testing.ranks import run_ranks

ORDER = ("bucket", "backward reaches the first layer")


def gradients(runtime) -> dict[str, Tensor]:
    """g with and without buckets, and the order of what happened in the last backward pass."""
    torch.manual_seed(0)
    parameters = {"first": torch.randn(4, 3, 3, 3), "unused": torch.randn(7), "last": torch.randn(1, 4, 3, 3)}
    events: list[str] = []

    def network(theta: dict[str, Tensor], images: Tensor) -> Tensor:
        features = F.conv2d(images, theta["first"], padding=1)
        features.register_hook(lambda _: events.append(ORDER[1]))
        return F.conv2d(features.relu(), theta["last"], padding=1)

    class Pure:
        def run(self, theta: dict[str, Tensor], compute: Callable) -> Any:
            return compute(lambda images: network(theta, images))

    class Noting(AllReduce):
        def begin_sum(self, bucket: Tensor) -> Callable[[], Tensor]:
            events.append(ORDER[0])
            return super().begin_sum(bucket)

    torch.manual_seed(1 + runtime.shard.rank)
    batches = [(torch.randn(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))) for _ in range(2)]
    batches[0][1][0, : 3 + runtime.shard.rank] = 255
    together = estimators.mean_gradient(Pure(), parameters, batches, ByFunction(sum_over_ranks)).gradient
    estimators.BUCKET_ELEMENTS = 30  # "last" has 36 elements, "unused" and "first" 115
    events.clear()
    in_buckets = estimators.mean_gradient(Pure(), parameters, batches, Noting()).gradient
    out = {f"together {name}": value for name, value in together.items()}
    out |= {f"in buckets {name}": value for name, value in in_buckets.items()}
    return out | {"events": torch.tensor([ORDER.index(event) for event in events])}


def test_a_bucket_leaves_before_the_backward_pass_has_made_the_next() -> None:
    for actual in run_ranks(gradients, 2):
        # Of two micro-batches only the last sends: the last layer's gradient leaves before the first's is there.
        assert actual["events"].tolist() == [1, 0, 1, 0]
        for name in ("first", "last", "unused"):
            expected = actual[f"together {name}"]
            assert actual[f"in buckets {name}"].equal(expected)
            assert expected.abs().max() > 0 or name == "unused"
