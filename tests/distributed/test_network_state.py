"""Networks that keep something between passes: the meta pass, a skipped step and the checks at the start see it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, load_module_state, module_state, shadow_of, sharded_parameters
from distseg.distributed.network_state import KeptBuffers, refuse_unsaved_state
from distseg.errors import UserError
from distseg.meta import PixelReweighter
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks


class Levelled(nn.Module):
    """Divides by a running level, which each pass assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 1)
        self.register_buffer("level", torch.ones(()))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.tanh(self.norm(self.convolution(images)))
        self.level = 0.5 * self.level + features.abs().mean().detach()
        return self.head(features / self.level)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.randint(0, 2, (2, 8, 8), generator=generator)


def test_the_meta_pass_has_a_buffer_that_the_model_has_assigned() -> None:
    torch.manual_seed(0)
    model = Levelled()
    reweighter = PixelReweighter(shadow_of(model))
    model(batch(0)[0])
    level = model.level.clone()
    actual = reweighter(*batch(1), *batch(2))
    expected = PixelReweighter(copy.deepcopy(model))(*batch(1), *batch(2))
    assert torch.equal(actual, expected)
    assert torch.equal(model.level, level) and level != 1


def weights_at_every_stage(runtime) -> dict[str, Tensor]:
    """Weights after two updates, and after the state has moved to a fresh engine: resumed is never stopped."""
    out = {}
    for stage in range(4):
        first, shadow = engine_at(stage)
        for step in range(2):
            first.backward(first(batch(step)[0]).square().mean())
            first.step()
        weights = reweighter_at(stage, shadow)(*batch(8), *batch(9))
        state = module_state(first)
        if runtime.shard.world_size == 1:
            second, second_shadow = engine_at(stage)
            load_module_state(second, {name: value.clone() for name, value in state.items()})
            out[f"{stage} resumed"] = reweighter_at(stage, second_shadow)(*batch(8), *batch(9))
        out[f"{stage} weights"], out[f"{stage} level"] = weights, first.module.level
        out[f"{stage} shadow's level"] = shadow.level
    return out


def engine_at(stage: int):
    torch.manual_seed(0)
    model = Levelled()
    shadow = shadow_of(model)
    optimizer, _ = build_optimizer(model.parameters(), OptimConfig())
    section = DeepSpeedConfig(zero_stage=stage)
    return build_engine(model, optimizer, section, batch_size=2, accumulation=1, precision="fp32"), shadow


def reweighter_at(stage: int, shadow: nn.Module) -> PixelReweighter:
    return PixelReweighter(shadow, placement=sharded_parameters(shadow) if stage == 3 else None)


def test_assigned_buffers_are_seen_and_resumed_at_every_stage() -> None:
    [actual] = run_ranks(weights_at_every_stage, 1)
    for stage in range(4):
        assert torch.equal(actual[f"{stage} level"], actual[f"{stage} shadow's level"])
        assert actual[f"{stage} level"] != 1
        assert torch.equal(actual[f"{stage} weights"], actual[f"{stage} resumed"])
        torch.testing.assert_close(actual[f"{stage} weights"], actual["0 weights"])


@pytest.mark.parametrize("skip", [True, False])
def test_a_skipped_step_restores_assigned_and_written_buffers(skip: bool) -> None:
    model = Levelled()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    running_mean = model.norm.running_mean
    kept = KeptBuffers(model)
    model(batch(0)[0] * torch.nan)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept.restore_where(torch.tensor(skip))
    assert model.norm.running_mean is running_mean
    assert after["level"].isnan() and after["norm.running_mean"].isnan().all()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, (before if skip else after)[name], rtol=0, atol=0, equal_nan=True)


def test_restoring_asks_the_device_nothing() -> None:
    model = Levelled().to("meta")
    kept = KeptBuffers(model)
    model(torch.empty(2, 3, 8, 8, device="meta"))
    kept.restore_where(torch.empty((), dtype=torch.bool, device="meta"))  # a look at a meta tensor raises


def test_a_buffer_that_changes_its_shape_cannot_be_restored() -> None:
    model = Levelled()
    kept = KeptBuffers(model)
    model.level = torch.ones(2)
    with pytest.raises(ValueError, match="buffer level changes its shape"):
        kept.restore_where(torch.tensor(True))


class Remembering(nn.Module):
    """What `remember` does to it in every pass."""

    def __init__(self, remember) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 1, 1)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)
        self.calls, self.history, self.last, self.grid = 0, [], None, None
        self.remember = [remember]

    def forward(self, images: Tensor) -> Tensor:
        self.remember[0](self, images)
        return self.body(images)


def count(module, images) -> None:
    module.calls += 1


def append(module, images) -> None:
    module.history.append(images.mean().item())


def average(module, images) -> None:
    module.last = images.mean() if module.last is None else 0.5 * module.last + images.mean()


def see(module, images) -> None:
    module.seen += 1


def fill_late(module, images) -> None:
    module.late = images.mean()


def keep_last(module, images) -> None:
    module.last = torch.rand(3)
    module.last = module.last + 1


def cache(module, images) -> None:
    if module.grid is None or module.grid.shape != images.shape:
        module.grid = torch.zeros_like(images)


@pytest.mark.parametrize(
    ("remember", "said"),
    [
        (count, "attribute calls changes"),
        (append, "attribute history changes"),
        (average, "attribute last changes"),
        (see, "buffer seen changes in a forward pass, but is in no checkpoint; register it with persistent=True"),
        (fill_late, "buffer late gets its shape or dtype in a forward pass"),
    ],
)
def test_state_that_would_be_lost_is_refused_by_name(remember, said: str) -> None:
    with pytest.raises(UserError, match=said):
        refuse_unsaved_state(Remembering(remember), batch(0)[0])
    inside = nn.Sequential(nn.Conv2d(3, 3, 1), Remembering(remember))
    with pytest.raises(UserError, match=said.replace(" ", " 1.", 1)):
        refuse_unsaved_state(inside, batch(0)[0])


@pytest.mark.parametrize("remember", [keep_last, cache, lambda module, images: None])
def test_what_no_later_pass_reads_is_let_be(remember) -> None:
    refuse_unsaved_state(Remembering(remember), batch(0)[0])


def test_the_check_leaves_the_model_and_random_streams_alone() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Levelled())
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    refuse_unsaved_state(model, batch(0)[0])
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model[1]) is Levelled
