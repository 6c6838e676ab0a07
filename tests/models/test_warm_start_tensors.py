"""Which tensors of another network are taken, and under which names."""

import pytest
import torch
from torch import nn

from distseg.errors import UserError
from distseg.models.unet import UNet
from distseg.models.warm_start import take_tensors


def drawn(seed: int, **options: int | str) -> UNet:
    torch.manual_seed(seed)
    return UNet(**{"width": 4, "depth": 2, "norm": "batch"} | options)


def test_all_of_the_same_network() -> None:
    source, network = drawn(0), drawn(1)
    source.stem[1].running_mean.fill_(3)
    found = take_tensors(network, source.state_dict())
    for name, tensor in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert len(found.taken) == len(source.state_dict()) and not (found.other_shape or found.absent or found.unused)


def test_other_classes_leave_the_head_as_drawn() -> None:
    source, network = drawn(0), drawn(1, out_channels=3)
    head = network.head.weight.clone()
    found = take_tensors(network, source.state_dict())
    assert torch.equal(network.head.weight, head) and torch.equal(network.stem[0].weight, source.stem[0].weight)
    assert [each.split()[0] for each in found.other_shape] == ["head.weight", "head.bias"]
    assert "head.weight (1, 4, 1, 1) there, (3, 4, 1, 1) here" in str(found)


class Encoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own = drawn(1), nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_encoder_behind_a_prefix(wrapped: bool) -> None:
    source, network = drawn(0), Encoded()
    tensors = source.state_dict() if not wrapped else {f"module.{k}": v for k, v in source.state_dict().items()}
    target = network if not wrapped else network.encoder
    found = take_tensors(target, tensors | {"other": torch.zeros(1)})
    assert torch.equal(network.encoder.stem[0].weight, source.stem[0].weight)
    assert len(found.taken) == len(source.state_dict()) and found.unused == ("other",)
    assert found.absent == (() if wrapped else ("own.weight", "own.bias"))


def test_nothing_fits() -> None:
    network = drawn(0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for source in ({}, {"a": torch.zeros(3)}, {"stem.1.num_batches_tracked": torch.tensor(9)}):
        with pytest.raises(UserError, match="another architecture"):
            take_tensors(network, source)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
