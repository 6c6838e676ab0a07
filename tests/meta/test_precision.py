"""A meta pass in bfloat16: near the weights in float32, leaves no trace in the network, and is refused elsewhere."""

import pytest
import torch
from torch import nn

from distseg import PixelReweighter
from distseg.models.unet import UNet


class Watched(nn.Module):
    """A network that remembers in which precision it last computed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.frozen = network, nn.Parameter(torch.ones(1, 3, 1, 1), requires_grad=False)
        self.computed_in: list[torch.dtype] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.computed_in.append((images * self.frozen).dtype)
        return self.network(images * self.frozen)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    return images, (images.sum(1) > 0).to(torch.uint8)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("estimator", ["forward", "reverse", "head"])
def test_is_near_the_weights_in_float32(estimator: str, norm: str) -> None:
    torch.manual_seed(0)
    model = Watched(UNet(8, 2, norm))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = PixelReweighter(model, estimator=estimator)(*batch(0), *batch(1))
    model.computed_in.clear()
    reweighter = PixelReweighter(model, estimator=estimator, precision="bf16")
    actual = reweighter(*batch(0), *batch(1))
    assert set(model.computed_in) == {torch.bfloat16}
    assert actual.dtype == torch.float32 and reweighter.diagnostics["gradient_norm"].dtype == torch.float32
    assert not torch.equal(actual, expected)
    similarity = torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    assert similarity > 0.95, similarity
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_is_refused_where_it_is_none() -> None:
    with pytest.raises(ValueError, match="not for estimator finite"):
        PixelReweighter(UNet(4, 1), estimator="finite", precision="bf16")
    with pytest.raises(ValueError, match="fp32 or bf16"):
        PixelReweighter(UNet(4, 1), precision="fp16")
