"""One meaning of a derivative for all estimators: gradients stop where reverse mode stops them, or `finite` refuses."""

from collections.abc import Callable

import pytest
import torch
from oracle import double_backward, normalised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distseg import PixelReweighter
from distseg.meta.network import StatelessNetwork, attributes_kept
from distseg.meta.placement import Whole

Gate = Callable[[Tensor], Tensor]


def no_grad(features: Tensor) -> Tensor:
    with torch.no_grad():
        scale = features.square().mean((2, 3), keepdim=True).sqrt()
    return features / scale


@torch.no_grad()
def scale_of(features: Tensor) -> Tensor:
    return features.abs().amax((1, 2, 3), keepdim=True)


def decorated(features: Tensor) -> Tensor:
    return features / scale_of(features)


def grad_mode_by_hand(features: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    scale = features.exp()
    torch.set_grad_enabled(True)
    return features * scale


def grad_on_inside(features: Tensor) -> Tensor:
    with torch.no_grad():
        stopped = features.sin()
        with torch.enable_grad():
            counted = features.cos()
    return stopped * counted


def written_under_no_grad(features: Tensor) -> Tensor:
    features = features.clone()
    with torch.no_grad():
        features.mul_(0.5 + torch.sigmoid(features))
    return features.sin()


def detached(features: Tensor) -> Tensor:
    return features / features.detach().square().mean()


def data(features: Tensor) -> Tensor:
    return features * features.data.sin()


def straight_through(features: Tensor) -> Tensor:
    return features + (torch.tanh(3 * features) - features).detach()


def number(features: Tensor) -> Tensor:
    return features / features.detach().abs().max().item()


STOPS = [no_grad, decorated, grad_mode_by_hand, grad_on_inside, written_under_no_grad, detached, data, straight_through]


def statistics(features: Tensor) -> Tensor:
    """Stops what does not reach the logits."""
    with torch.no_grad():
        features.mean()
    features.detach().mean()
    return features


class Gated(nn.Module):
    def __init__(self, gate: Gate, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.2))
        self.head = nn.Conv2d(6, 1, 1)
        self.gate, self.checkpointed = [gate], checkpointed

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.first(images))
        features = checkpoint(self._body, features, use_reentrant=False) if self.checkpointed else self._body(features)
        return self.head(features)

    def _body(self, features: Tensor) -> Tensor:
        return self.middle(self.gate[0](features))


def batches() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
        masks = torch.randint(0, 2, (count, 8, 8), generator=generator, dtype=torch.uint8)
        masks[0, 0] = 255
        return images, masks

    return batch(3), batch(2)


def weights_of(model: nn.Module, estimator: str, initial_weight: float = 0.0, grad_mode: bool = True) -> Tensor:
    noisy, clean = batches()
    torch.manual_seed(7)
    start = {"virtual_lr": 0.5, "initial_weight": initial_weight}
    with torch.set_grad_enabled(grad_mode):
        return PixelReweighter(model, estimator=estimator, **start)(*noisy, *clean)


def expected_weights(model: nn.Module, initial_weight: float = 0.0) -> Tensor:
    noisy, clean = batches()
    return normalised(double_backward(model, noisy, clean, 0.5, seed=7, initial_weight=initial_weight))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.max().item())


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("gate", STOPS, ids=lambda gate: gate.__name__)
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_gradients_stop_where_the_network_stops_them(
    estimator: str, gate: Gate, checkpointed: bool, grad_mode: bool
) -> None:
    model = Gated(gate, checkpointed).double()
    assert_same(weights_of(model, estimator, grad_mode=grad_mode), expected_weights(model))


@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_a_network_that_stops_everything_has_no_tangent(estimator: str) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 1).double(), nn.Conv2d(4, 1, 1).double()

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.first(images)
            return self.head(features)

    torch.manual_seed(0)
    model = Last()
    noisy, clean = batches()
    assert_same(PixelReweighter(model, estimator=estimator)(*noisy, *clean), expected_weights(model))


@pytest.mark.parametrize("gate", [*STOPS, number], ids=lambda gate: gate.__name__)
def test_finite_refuses_a_network_that_stops_gradients(gate: Gate) -> None:
    with pytest.raises(ValueError, match=r"estimator finite: the network stops gradients .* use estimator=forward"):
        weights_of(Gated(gate).double(), "finite")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_finite_takes_a_network_whose_logits_depend_on_no_stop(checkpointed: bool) -> None:
    model = Gated(statistics, checkpointed).double()
    actual, expected = weights_of(model, "finite"), expected_weights(model)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.max().item())


@pytest.mark.parametrize("initial_weight", [0.0, 2.0])
@pytest.mark.parametrize("estimator", ["forward", "reverse"])
def test_what_checkpointing_runs_again_has_the_parameters_of_the_pass(estimator: str, initial_weight: float) -> None:
    """Also the fast weights, and not the module's own; and its statistics are left alone."""
    model = Gated(statistics, checkpointed=True).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_same(weights_of(model, estimator, initial_weight), expected_weights(model, initial_weight))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    from_zero = expected_weights(model)
    assert initial_weight == 0 or (expected_weights(model, initial_weight) - from_zero).abs().max() > 1e-3


def test_forward_mode_is_on_again_after_a_network_that_raises_under_no_grad() -> None:
    def fail(features: Tensor) -> Tensor:
        with torch.no_grad():
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        weights_of(Gated(fail).double(), "forward")
    model = Gated(no_grad).double()
    assert_same(weights_of(model, "forward"), expected_weights(model))


def test_attributes_that_are_assigned_get_their_values_back() -> None:
    module = nn.Module()
    module.kept, module.gone = 1, 2
    module.register_buffer("empty", None)
    with attributes_kept(module):
        module.kept, module.empty, module.new = 3, torch.ones(2), 4
        del module.gone
    assert (module.kept, module.gone, module.empty) == (1, 2, None)
    assert not hasattr(module, "new") and list(module.named_buffers()) == []


def test_a_stateless_network_is_a_function_of_the_parameters_it_is_given() -> None:
    model = Gated(statistics).double().eval()
    images = batches()[0][0]
    network, placement = StatelessNetwork(model, Whole(model)), Whole(model)
    expected = model(images)
    torch.testing.assert_close(network(placement.trainable(), images), expected)
    zeros = {name: torch.zeros_like(value) for name, value in placement.trainable().items()}
    assert network(zeros, images).eq(0).all()
