"""A network that torch.compile has compiled gets the weights of the one as written."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from distseg import PixelReweighter, weighted_loss
from distseg.models.unet import UNet


class Square(torch.autograd.Function):
    """With a derivative in either mode, of which a compiled graph knows one."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return 2 * cotangent * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return 2 * tangent * ctx.saved_tensors[0]


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images, (images.sum(1) > 0).to(torch.uint8)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [UNet(4, 1), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Squares(), nn.Conv2d(4, 1, 1))]


@pytest.mark.parametrize("estimator", ["forward", "reverse", "finite", "head"])
@pytest.mark.parametrize("model", networks(), ids=["unet", "own function"])
def test_compiled_and_eager_weights_agree(model: nn.Module, estimator: str) -> None:
    expected = PixelReweighter(model, estimator=estimator)(*batch(0), *batch(1))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch(0)[0])
    actual = PixelReweighter(compiled, estimator=estimator)(*batch(0), *batch(1))
    assert torch.equal(actual, expected)


def test_one_pass_of_a_compiled_network_is_one_as_written() -> None:
    model = networks()[0]
    _, expected, _ = PixelReweighter(model).one_pass(*batch(0), *batch(1))
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch(0)[0])
    logits, weights, _ = PixelReweighter(compiled).one_pass(*batch(0), *batch(1))
    assert torch.equal(weights, expected)
    assert logits.requires_grad


def test_the_weighted_step_is_compiled_as_before() -> None:
    images, masks = batch(0)
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        def call(*arguments: Tensor):
            calls.append(graph)
            return graph(*arguments)

        return call

    model = torch.compile(networks()[0], backend=backend)
    model(images)
    before = len(calls)
    weights = PixelReweighter(model)(images, masks, *batch(1))
    assert len(calls) == before, "the meta pass ran a compiled graph"
    weighted_loss(model(images), masks, weights).backward()
    assert len(calls) > before
