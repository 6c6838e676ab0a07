"""Sharded parameters in networks that stop gradients and that checkpoint: the weights of whole parameters."""

import itertools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distseg.distributed.collectives import AllReduce
from distseg.distributed.shards import ShardedParameters, cut
from distseg.meta import PixelReweighter
from distseg.testing.ranks import run_ranks


class Stopping(nn.Module):
    """Uses a layer under `torch.no_grad()` and with gradients, and runs one again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.first(images).exp()
        features = torch.tanh(self.first(images)) * scale
        return self.head(checkpoint(self._body, features, use_reentrant=False))

    def _body(self, features: Tensor) -> Tensor:
        return torch.tanh(self.middle(features)) * features.detach().cos()


def weights_by_placement(runtime) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, out = Stopping().double(), {}
    shards = {name: cut(p) for name, p in model.named_parameters()}
    torch.manual_seed(1 + runtime.shard.rank)
    noisy, clean = ((torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 2, (2, 8, 8))) for _ in range(2))
    for sharded, estimator, weight in itertools.product((False, True), ("forward", "reverse"), (0.0, 2.0)):
        reweighter = PixelReweighter(
            model,
            estimator=estimator,
            initial_weight=weight,
            reduction=AllReduce(sharded),
            placement=ShardedParameters(lambda: shards) if sharded else None,
        )
        [weights] = reweighter.weigh([noisy], [clean])
        out[f"{weight}/{estimator} {'sharded' if sharded else 'whole'}"] = weights.full(noisy[1])
    return out


def test_shards_stop_gradients_where_whole_parameters_do() -> None:
    for actual in run_ranks(weights_by_placement, 2):
        for name, weights in actual.items():
            expected = actual[name.partition("/")[0] + "/reverse whole"]
            torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10 * expected.max().item())
        assert not torch.allclose(actual["0.0/reverse whole"], actual["2.0/reverse whole"], rtol=1e-3)
