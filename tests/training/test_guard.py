"""A step that is not finite on one rank changes nothing on any, at every ZeRO stage."""

from functools import partial

import pytest
import torch
from torch import nn

from distseg.config.schema import Config
from distseg.distributed.collectives import AllReduce
from distseg.distributed.engine import build_engine, optimizer_state
from distseg.meta.weights import uniform_weights
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.training.guard import Diverged, Guard
from distseg.training.train_step import train_step

SIZE = 8


class Cliff(torch.autograd.Function):
    """The identity, with an infinite derivative where it is told so, as a square root has at 0."""

    @staticmethod
    def forward(context, x, infinite: bool):
        context.infinite = infinite
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, torch.inf) if context.infinite else gradient, None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.last, self.offset = nn.Conv2d(2, 1, 1), nn.Parameter(torch.zeros(1))

    def forward(self, images):
        offset = Cliff.apply(self.offset, bool((images[0] == 9).all()))
        return self.last(self.norm(self.layer(images))) + offset


def state_of(engine, runtime) -> dict[str, torch.Tensor]:
    state = {key: value.detach().clone() for key, value in engine.module.state_dict().items()}
    return state | {key: value.detach().clone() for key, value in optimizer_state(engine, 0).items()}


def skip(runtime, cases: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    rank = runtime.shard.rank
    for optimizer_name, stage in cases:
        config = Config.model_validate({
            "name": "test", "data": {"root": "."}, "train": {"steps": 1, "batch_size": 2},
            "optim": {
                "name": optimizer_name,
                "lr": 0.1,
                "implementation": "torch",
                **({"momentum": 0.9} if optimizer_name == "sgd" else {}),
            },
            "deepspeed": {"zero_stage": stage},
        })  # fmt: skip
        torch.manual_seed(1)
        model = Network()
        optimizer, _ = build_optimizer(model.parameters(), config.optim)
        engine = build_engine(model, optimizer, config.deepspeed, batch_size=2, accumulation=1, precision="fp32")
        guard = Guard(limit=3, runtime=runtime)
        states = [state_of(engine, runtime)]
        for step, kind in enumerate(["nan loss", "fine", "nan loss", "infinite gradient", "fine", "nan loss"]):
            images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(10 * step + rank))
            if rank == 1 and kind == "nan loss":
                images[0, 0, 0, 0] = torch.nan
            if rank == 1 and kind == "infinite gradient":
                images[0] = 9
            masks = torch.ones(2, SIZE, SIZE, dtype=torch.uint8)
            given = GivenSteps([images], [masks], partial(uniform_weights, [masks], AllReduce(), torch.float32))
            bad = train_step(engine, given, step, 0.1).bad
            case = f"{optimizer_name}, ZeRO {stage}, step {step}, rank {rank}"
            if kind == "nan loss":
                assert bad[:-1].tolist() == [0, 1], case
            if kind == "infinite gradient":
                assert bad[:-1].tolist() == [0, 0] and bad[-1] > 0, case
            guard.record(step, bad, (f"image {rank}",))
            states.append(state_of(engine, runtime))
            changed = [k for k in states[-1] if k not in states[-2] or not states[-1][k].equal(states[-2][k])]
            if kind != "fine":
                # Slots that a first step makes are zero, which is what they would have begun from.
                assert not [k for k in changed if k in states[-2] or states[-1][k].any()], f"{case}: {changed}"
            else:
                assert len(changed) > 6, f"{case}: nothing was learnt"
        guard.check()
        assert (guard.skipped, guard.in_a_row) == (4, 1)
        guard.record(7, torch.tensor([0.0, 1.0, 1.0]), (f"image {rank}",))
        guard.record(8, torch.tensor([0.0, 1.0, 1.0]), (f"image {rank}",))
        with pytest.raises(Diverged, match=r"step 8: .*rank 1 with images image 1"):
            guard.check()
    return {}


def test_a_bad_step_changes_nothing_on_any_rank() -> None:
    run_ranks(skip, 2, [("sgd", 0), ("adam", 0), ("sgd", 1), ("adam", 2)])
