"""Invariants 3 and 4: N ranks = 1 rank and accumulation = one large batch, against a reference written out here.

The table: {ZeRO 0, 1, 2, 3} × {forward, reverse, finite} × {1, 2, 4 ranks} × accumulation {1, 2}, and again with batch
normalisation, which accumulation leaves to each micro-batch. In float64, which DeepSpeed does not train in, the engines
of all stages give weights and g, and updates are made without DeepSpeed, on whole parameters and on shards; in float32
DeepSpeed makes them. One launch a number of ranks; in a run each step takes its weights from another estimator.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distseg.distributed.batch_norm import synchronise_batch_norm
from distseg.distributed.collectives import AllReduce, sum_over_ranks
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.differentiable import gather
from distseg.distributed.engine import build_engine, gradients_put_away, shadow_of, sharded_parameters
from distseg.distributed.shards import ShardedParameters, cut
from distseg.meta import PixelReweighter
from distseg.meta.estimators import mean_gradient
from distseg.meta.network import StatelessNetwork
from distseg.meta.placement import Whole
from distseg.ops import weighted_loss
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.training.train_step import train_step

SIZE, GLOBAL_NOISY, GLOBAL_CLEAN = 16, 8, 8
LR = 0.05
STAGES, ESTIMATORS = (0, 1, 2, 3), ("forward", "reverse", "finite")
VIRTUAL_STEPS = {"paper": (0.1, 0.0), "moved": (0.4, 30.0)}
"""virtual_lr and initial_weight: at W = 0, and where the fast weights are far from the present ones."""
TOLERANCES = {
    (torch.float64, False): 1e-10,
    (torch.float32, False): 1e-5,
    (torch.float64, True): 1e-8,
    (torch.float32, True): 1e-3,
}
"""By dtype and whether `finite` had a part: right to the square of its step, and rounding errors are divided by it."""


def make_model(dtype: torch.dtype, norm: str) -> nn.Module:
    """Smooth, so that finite differences converge too; the last bias is shorter than there are ranks."""
    torch.manual_seed(1)
    first = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
    layers = [nn.Conv2d(3, 8, 3, padding=1), first, nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 1)).to(dtype)


def global_batches(step: int, dtype: torch.dtype):
    """The step's noisy and clean batch; the share of ignored pixels differs from image to image."""
    generator = torch.Generator().manual_seed(step)

    def draw(count: int):
        images = torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
        masks = torch.randint(0, 2, (count, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        for index in range(count):
            masks[index, : 2 * (index % 7)] = 255
        return images, masks

    return draw(GLOBAL_NOISY), draw(GLOBAL_CLEAN)


def reference(dtype: torch.dtype, norm: str, virtual_lr: float, initial_weight: float) -> dict[str, Tensor]:
    """One process, plain torch, the paper's procedure: virtual step, clean loss there, double backward, SGD."""
    model = make_model(dtype, norm)
    out = {}
    for step in range(len(ESTIMATORS)):
        (x, y), (xc, yc) = global_batches(step, dtype)
        names, params = zip(*model.named_parameters(), strict=True)

        def loss_map(theta, images, masks, buffers=None, names=names, model=model):
            buffers = buffers or {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = functional_call(model, (dict(zip(names, theta, strict=True)), buffers), (images,))[:, 0]
            valid = masks != 255
            full = F.binary_cross_entropy_with_logits(logits, (masks == 1).to(dtype), reduction="none")
            return full * valid, valid

        valid = y != 255
        w = (valid.to(dtype) * initial_weight / valid.sum()).requires_grad_()
        inner = torch.autograd.grad((w * loss_map(params, x, y)[0]).sum(), params, create_graph=True)
        fast = [p - virtual_lr * g for p, g in zip(params, inner, strict=True)]
        per_pixel, valid = loss_map(fast, xc, yc)
        minus_u, *g = torch.autograd.grad(per_pixel.sum() / valid.sum(), [w, *fast])
        w_plus = (-minus_u).clamp(min=0)
        weights = w_plus / w_plus.sum()
        loss = (weights * loss_map(params, x, y, buffers=dict(model.named_buffers()))[0]).sum()
        gradients = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, gradient in zip(params, gradients, strict=True):
                p -= LR * gradient
        out[f"{step}.weights"] = weights.detach()
        out |= {f"{step}.g.{name}": value for name, value in zip(names, g, strict=True)}
        out |= {f"{step}.parameter.{name}": p.detach().clone() for name, p in model.named_parameters()}
        out |= {f"{step}.buffer.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    return out


def micro_batches(pair, runtime, accumulation: int):
    """This rank's micro-batches, cut as ShardSpec.micro_batch cuts a step."""
    images, masks = pair
    size = len(images) // (runtime.shard.world_size * accumulation)
    cuts = [runtime.shard.micro_batch(0, micro, accumulation, size) for micro in range(accumulation)]
    return [(images[c.start : c.stop], masks[c.start : c.stop]) for c in cuts]


def assemble(parts: list[Tensor], runtime, accumulation: int) -> Tensor:
    """The global weight map out of every rank's micro-batches."""
    whole = torch.zeros(GLOBAL_NOISY, SIZE, SIZE, dtype=parts[0].dtype)
    for micro, part in enumerate(parts):
        part_of = runtime.shard.micro_batch(0, micro, accumulation, len(part))
        whole[part_of.start : part_of.stop] = part
    return sum_over_ranks(whole)


def whole_again(tensors: dict[str, Tensor], placement, model: nn.Module) -> dict[str, Tensor]:
    if not placement.sharded:
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    return {name: gather(tensor, shapes[name]) for name, tensor in tensors.items()}


def weigh(reweighter: PixelReweighter, runtime, accumulation: int, step: int, dtype: torch.dtype):
    """The step's noisy micro-batches, their weights, and the global map."""
    noisy, clean = (micro_batches(pair, runtime, accumulation) for pair in global_batches(step, dtype))
    weights = reweighter.weigh(noisy, clean)
    parts = [w.full(masks) for w, (_, masks) in zip(weights, noisy, strict=True)]
    return noisy, weights, assemble(parts, runtime, accumulation)


def clean_gradient(model: nn.Module, placement, runtime, accumulation: int, step: int, dtype: torch.dtype):
    _, clean = (micro_batches(pair, runtime, accumulation) for pair in global_batches(step, dtype))
    network, parameters = StatelessNetwork(model, placement), placement.trainable()
    return mean_gradient(network, parameters, clean, AllReduce(placement.sharded)).gradient


def ranked_model(runtime, dtype: torch.dtype, norm: str) -> nn.Module:
    """The model as the trainer makes it ready for ranks."""
    model = make_model(dtype, norm)
    return synchronise_batch_norm(model) if runtime.shard.world_size > 1 else model


def engine_for(runtime, stage: int, accumulation: int, dtype: torch.dtype, norm: str):
    """DeepSpeed's engine, the shadow of its module, and where its parameters are."""
    batch_size = GLOBAL_NOISY // (accumulation * runtime.shard.world_size)
    model = ranked_model(runtime, dtype, norm)
    shadow = shadow_of(model)
    optimizer, _ = build_optimizer(model.parameters(), OptimConfig(name="sgd", momentum=0.0, lr=LR))
    sizes = {"batch_size": batch_size, "accumulation": accumulation}
    engine = build_engine(model, optimizer, DeepSpeedConfig(zero_stage=stage), **sizes, precision="fp32")
    return engine, shadow, sharded_parameters(shadow) if stage == 3 else Whole(shadow)


Named = Iterator[tuple[str, Tensor]]
"""`placement norm virtual-step accumulation:step.quantity` and its value."""


def first_weights_in_float64(runtime) -> Named:
    """g and every estimator's weights before the first update, under an engine of each stage."""
    for stage in STAGES:
        _, shadow, placement = engine_for(runtime, stage, 1, torch.float64, "group")
        g = clean_gradient(shadow, placement, runtime, 1, 0, torch.float64)
        for name, value in whole_again(g, placement, shadow).items():
            yield f"ZeRO-{stage} group paper 1:0.g.{name}", value
        for estimator, virtual in itertools.product(ESTIMATORS, VIRTUAL_STEPS):
            reweighter = reweighter_of(shadow, placement, estimator, virtual)
            *_, weights = weigh(reweighter, runtime, 1, 0, torch.float64)
            yield f"ZeRO-{stage}-{estimator} group {virtual} 1:0.weights", weights


def train_in_float64(runtime) -> Named:
    """Without DeepSpeed: SGD on what each rank holds."""
    cases = [("group", 1, "moved"), ("group", 2, "paper"), ("batch", 1, "moved")]
    for sharded, (norm, accumulation, virtual) in itertools.product((False, True), cases):
        model = ranked_model(runtime, torch.float64, norm)
        shards = {name: cut(p) for name, p in model.named_parameters()}
        placement = ShardedParameters(lambda shards=shards: shards) if sharded else Whole(model)
        network = StatelessNetwork(model, placement)
        case = f"{'shards' if sharded else 'whole'} {norm} {virtual} {accumulation}"
        for step, estimator in enumerate(ESTIMATORS):
            reweighter = reweighter_of(model, placement, estimator, virtual)
            noisy, maps, weights = weigh(reweighter, runtime, accumulation, step, torch.float64)
            yield f"{case}:{step}.weights", weights
            parameters = placement.trainable()
            leaves = {name: value.requires_grad_() for name, value in parameters.items()}
            loss = sum(weighted_loss(network(leaves, x), y, *w) for (x, y), w in zip(noisy, maps, strict=True))
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            for held, gradient in zip(parameters.values(), gradients, strict=True):
                held.detach().sub_(gradient if sharded else sum_over_ranks(gradient), alpha=LR)
            for name, value in whole_again(placement.trainable(), placement, model).items():
                yield f"{case}:{step}.parameter.{name}", value


def train_under_deepspeed(runtime) -> Named:
    cases = [("group", 1, "paper"), ("group", 2, "moved"), ("batch", 1, "paper")]
    for stage, (norm, accumulation, virtual) in itertools.product(STAGES, cases):
        engine, shadow, placement = engine_for(runtime, stage, accumulation, torch.float32, norm)
        case = f"ZeRO-{stage} {norm} {virtual} {accumulation}"
        for step, estimator in enumerate(ESTIMATORS):
            reweighter = reweighter_of(shadow, placement, estimator, virtual)
            with gradients_put_away(engine):
                noisy, maps, weights = weigh(reweighter, runtime, accumulation, step, torch.float32)
            yield f"{case}:{step}.weights", weights
            images, masks = zip(*noisy, strict=True)
            train_step(engine, GivenSteps(images, masks, lambda maps=maps: maps), step, LR)
            for name, value in whole_again(placement.trainable(), placement, shadow).items():
                yield f"{case}:{step}.parameter.{name}", value
            for name, buffer in shadow.named_buffers():
                yield f"{case}:{step}.buffer.{name}", buffer.clone()


def reweighter_of(model: nn.Module, placement, estimator: str, virtual: str) -> PixelReweighter:
    virtual_lr, initial_weight = VIRTUAL_STEPS[virtual]
    return PixelReweighter(
        model,
        estimator=estimator,
        virtual_lr=virtual_lr,
        initial_weight=initial_weight,
        finite_step=torch.finfo(next(model.parameters()).dtype).eps ** (1 / 3),  # the best for a smooth network
        reduction=AllReduce(placement.sharded),
        placement=placement,
    )


def table(runtime) -> dict[str, Tensor]:
    return dict(
        itertools.chain(first_weights_in_float64(runtime), train_in_float64(runtime), train_under_deepspeed(runtime))
    )


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_rank_or_many_whole_or_sharded_accumulated_or_not(world_size: int) -> None:
    expected = expectations()
    wrong = []
    for rank, actual in enumerate(run_ranks(table, world_size)):
        for key, value in actual.items():
            case, quantity = key.split(":")
            placement, norm, virtual, _ = case.split()
            finite = placement.endswith("finite") or quantity.startswith(str(ESTIMATORS.index("finite")))
            dtype = value.dtype if value.is_floating_point() else torch.float32
            right = expected[norm, virtual, dtype][quantity]
            error = ((value - right).abs().max() / right.abs().max().clamp(min=1e-3)).item()
            if not error < TOLERANCES[dtype, finite]:
                wrong.append(f"rank {rank} of {world_size}: {case} {value.dtype}, {quantity}: {error:.1e}")
    assert not wrong, "\n".join(wrong)


def expectations() -> dict[tuple[str, str, torch.dtype], dict[str, Tensor]]:
    """The reference of each norm, virtual step and dtype, once it is known that it would tell a wrong answer."""
    expected = {
        (norm, virtual, dtype): reference(dtype, norm, *options)
        for norm, (virtual, options), dtype in itertools.product(
            ("group", "batch"), VIRTUAL_STEPS.items(), (torch.float32, torch.float64)
        )
    }
    for norm in ("group", "batch"):
        paper, moved = (expected[norm, virtual, torch.float64] for virtual in VIRTUAL_STEPS)
        change = (paper["0.weights"] - moved["0.weights"]).abs().max() / paper["0.weights"].max()
        assert change > 0.05, "the virtual step hardly matters"
        for name, before in make_model(torch.float64, norm).named_parameters():
            moved_by = (paper[f"2.parameter.{name}"] - before).norm()
            # A bias before batch normalisation has no effect.
            assert moved_by > 1e-4 or (norm, name) == ("batch", "0.bias"), f"{name} hardly moved"
    return expected
