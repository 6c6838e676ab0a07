import copy

import pytest
import torch
from torch import Tensor, nn

from distseg.errors import InvalidArgument
from distseg.meta.check import check_estimator
from distseg.models.unet import UNet
from tests.training.no_forward_mode import OwnOperator


class Distances(nn.Conv2d):
    """An operator of torch's own without a derivative in forward mode."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + torch.nn.functional.pdist(logits.flatten(1)).sum()


@pytest.mark.parametrize(("network", "operator"), [(OwnOperator(), "jvp"), (Distances(3, 1, 1), "_pdist")])
def test_a_network_without_forward_mode_is_refused_in_one_line(network: nn.Module, operator: str) -> None:
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(InvalidArgument, match=rf"forward mode \(.*{operator}.*\w\); use estimator=reverse") as caught:
        check_estimator("forward", network, images)
    assert "\n" not in str(caught.value)
    check_estimator("reverse", network, images)


def test_a_sound_network_is_left_as_it_is() -> None:
    network = UNet(4, 1, "batch").train()
    before, stream = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    for estimator in ("forward", "head", "reverse", "finite"):
        check_estimator(estimator, network, torch.ones(2, 3, 8, 8))
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    assert torch.random.get_rng_state().equal(stream)
    assert all(parameter.grad is None for parameter in network.parameters())
