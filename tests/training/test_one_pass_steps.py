"""Steps that find their weights in one pass, and add the clean gradient that they have, are the steps in two passes.

Under DeepSpeed's engine with clipping, at each ZeRO stage, on ranks, with micro-batches, against one process at stage 0
whose weights come from passes of their own and whose clean images are joined to the noisy ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from distseg.data.batch import Batch
from distseg.distributed.batch_norm import synchronise_batch_norm
from distseg.distributed.collectives import AllReduce, sum_over_ranks
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, can_add_gradients, module_state, shadow_of, sharded_parameters
from distseg.meta import PixelReweighter
from distseg.meta.placement import Whole
from distseg.methods.losses.cross_entropy import CrossEntropy
from distseg.methods.method import Method
from distseg.methods.phases import Phase, Phases
from distseg.methods.weighting.aligned import Aligned
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step

SIZE, IMAGES, LR, CLIP = 16, 8, 1.0, 0.02


class Network(nn.Module):
    """Smooth, so that rounding stays rounding; with a tied, an unused and a frozen parameter."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.norm = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
        self.second, self.tied = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.second.weight
        self.unused = nn.Linear(3, 3)
        self.tied.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.silu(self.norm(self.first(images)), inplace=True)
        return self.head(torch.tanh(self.tied(torch.tanh(self.second(features)))))


@dataclass(frozen=True)
class Case:
    norm: str
    share: float
    """Of the clean images; 0: they serve for the weights alone."""
    stage: int = 0
    accumulation: int = 1
    one_pass: bool = False
    reuses: bool = False


class Stream:
    """Half of the labels are right, more or less, and the number of ignored pixels differs."""

    def __init__(self, runtime, accumulation: int, clean: bool) -> None:
        self.shard, self.accumulation, self.clean = runtime.shard, accumulation, clean

    def batch(self, index: int, micro: int) -> Batch:
        generator = torch.Generator().manual_seed(2 * index + self.clean)
        images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        masks = (images.mean(1) > 0).to(torch.uint8)
        if not self.clean:
            masks ^= (torch.rand(masks.shape, generator=generator) < 0.3).to(torch.uint8)
        for number, mask in enumerate(masks):
            mask[: number % 5] = 255
        size = IMAGES // (self.shard.world_size * self.accumulation)
        own = self.shard.micro_batch(0, micro, self.accumulation, size)
        part = slice(own.start, own.stop)
        return Batch(images[part], masks[part], masks[part], tuple(f"{self.clean} {i}" for i in own))


def trained(runtime, case: Case, steps: int) -> dict[str, Tensor]:
    """Losses, weights' diagnostics and parameters of `steps` steps."""
    torch.manual_seed(0)
    model = Network(case.norm)
    if runtime.shard.world_size > 1:
        model = synchronise_batch_norm(model)
    shadow = shadow_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, _ = build_optimizer(parameters, OptimConfig(name="sgd", momentum=0.5, lr=LR))
    sizes = {"batch_size": IMAGES // case.accumulation, "accumulation": case.accumulation}
    section = DeepSpeedConfig(zero_stage=case.stage, gradient_clipping=CLIP)
    engine = build_engine(model, optimizer, section, **sizes, precision="fp32")
    assert can_add_gradients(engine)
    placement = sharded_parameters(shadow) if case.stage == 3 else Whole(shadow)
    reduction = AllReduce(placement.sharded)
    noisy, clean = (Stream(runtime, case.accumulation, clean) for clean in (False, True))
    method = Method(
        phases=Phases(((0, Phase(noisy, clean, clean_share=case.share, main=True)),)),
        weighting=Aligned(PixelReweighter(shadow, reduction=reduction, placement=placement), one_pass=case.one_pass),
        loss=CrossEntropy(),
        label_model=None,
        accumulation=case.accumulation,
        reduction=reduction,
        logits_of=lambda images: images,
        labels_first=True,
        one_pass=case.accumulation == 1 and case.stage < 3,
        reuses_clean=case.reuses,
    )
    found = {}
    for index in range(steps):
        outcome = train_step(engine, method, index, LR, diagnose=True)
        assert not outcome.bad.any()
        ids = outcome.step.ids
        assert len(set(ids)) == len(ids) == (2 if case.share else 1) * IMAGES // runtime.shard.world_size
        found[f"{index} loss"] = sum_over_ranks(outcome.loss.clone())
        # What has no jumps: a pixel whose U is rounded to the other side of 0 changes other diagnostics by itself.
        found |= {f"{index} {name}": outcome.diagnostics[name] for name in ("gradient_norm", "effective_fraction")}
    state = module_state(engine)
    return {name: value.double() for name, value in (found | state).items()}


REFERENCES = [Case("group", 0.3), Case("group", 0.0), Case("batch", 0.3, reuses=True), Case("batch", 0.0)]


def references(runtime, steps: int) -> dict[str, Tensor]:
    return {f"{i}:{k}": v for i, case in enumerate(REFERENCES) for k, v in trained(runtime, case, steps).items()}


def cases(every: bool) -> Iterator[tuple[int, Case]]:
    """The number of its reference, and a case; every stage once at least."""
    for number, reference in enumerate(REFERENCES):
        for stage in range(4):
            fast = replace(reference, stage=stage, one_pass=True, reuses=True)
            if every or number == 0 or stage == number:
                yield number, fast
            # Batch normalisation is of one micro-batch.
            if reference.norm == "group" and (every or stage == 2 - number):
                yield number, replace(fast, accumulation=2)
    yield 0, replace(REFERENCES[0], reuses=True)


def table(runtime, steps: int, every: bool) -> dict[str, Tensor]:
    return {
        f"{index}:{key}": value
        for index, (_, case) in enumerate(cases(every))
        for key, value in trained(runtime, case, steps).items()
    }


@pytest.mark.parametrize(
    ("world_sizes", "steps", "every"),
    [
        ([2], 4, False),
        pytest.param([1], 50, True, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param([2, 4], 10, True, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_one_pass_and_a_reused_gradient_are_two_passes(world_sizes: list[int], steps: int, every: bool) -> None:
    [expected] = run_ranks(references, 1, steps)
    assert_the_reference_learns(expected)
    wrong = []
    for world_size in world_sizes:
        actual, *_ = run_ranks(table, world_size, steps, every, timeout=600)
        for index, (number, case) in enumerate(cases(every)):
            names = [key.partition(":")[2] for key in expected if key.startswith(f"{number}:")]
            assert f"{steps - 1} loss" in names and "head.weight" in names
            for name in names:
                right, value = expected[f"{number}:{name}"], actual[f"{index}:{name}"]
                error = ((value - right).abs().max() / right.abs().max().clamp(min=1e-2)).item()
                if not error < 1e-5:
                    wrong.append(f"{world_size} ranks, {case}, {name}: {error:.1e}")
    assert not wrong, "\n".join(wrong[:40])


def assert_the_reference_learns(found: dict[str, Tensor]) -> None:
    """Otherwise equal parameters would say little: they move, the frozen one stays, the clean images matter."""
    torch.manual_seed(0)
    before = Network("group").state_dict()
    assert (found["0:first.weight"] - before["first.weight"]).norm() > 0.01
    assert (found["0:first.weight"] - found["1:first.weight"]).norm() > 0.001
    assert torch.equal(found["0:tied.bias"], before["tied.bias"].double())
    assert (found["0:0 gradient_norm"] > 2 * CLIP).all(), "the gradient is not clipped"
