"""Invariants 3 and 4: N ranks = 1 rank and accumulation = one large batch, against a reference written out here."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from distseg.config.schema import Config
from distseg.data.streams import Batch
from distseg.distributed.collectives import sum_over_ranks
from distseg.distributed.engine import build_engine, shadow_of
from distseg.meta import PixelReweighter
from distseg.optim import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.training.methods import Method, WeightedBatch
from distseg.training.trainer import update

STEPS, SIZE, GLOBAL_NOISY, GLOBAL_CLEAN = 3, 16, 8, 4
LR = 0.05


def make_model(dtype: torch.dtype) -> nn.Module:
    """Smooth, so that finite differences converge too."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()]
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


def reference(steps: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One process, plain torch, the paper's procedure: virtual step at W = 0, clean loss there, double backward."""
    model = make_model(dtype)
    out = {}
    for step in range(steps):
        (x, y), (xc, yc) = global_batches(step, dtype)
        names, params = zip(*model.named_parameters(), strict=True)

        def loss_map(theta, images, masks, names=names, model=model):
            logits = functional_call(model, dict(zip(names, theta, strict=True)), (images,))[:, 0]
            valid = masks != 255
            full = F.binary_cross_entropy_with_logits(logits, (masks == 1).to(dtype), reduction="none")
            return full * valid, valid

        w = torch.zeros(y.shape, dtype=dtype, requires_grad=True)
        inner = torch.autograd.grad((w * loss_map(params, x, y)[0]).sum(), params, create_graph=True)
        fast = [p - 0.1 * g for p, g in zip(params, inner, strict=True)]
        per_pixel, valid = loss_map(fast, xc, yc)
        (minus_u,) = torch.autograd.grad(per_pixel.sum() / valid.sum(), w)
        w_plus = (-minus_u).clamp(min=0)
        weights = w_plus / w_plus.sum()
        gradients = torch.autograd.grad((weights * loss_map(params, x, y)[0]).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p -= LR * g
        out[f"weights.{step}"] = weights.detach()
    return out | {name: p.detach() for name, p in model.named_parameters()}


def micro_batches(pair, runtime, accumulation: int):
    """This rank's micro-batches, cut as ShardSpec.micro_batch cuts a step."""
    images, masks = pair
    size = len(images) // (runtime.shard.world_size * accumulation)
    cuts = [runtime.shard.micro_batch(0, micro, accumulation, size) for micro in range(accumulation)]
    return [(images[c.start : c.stop], masks[c.start : c.stop]) for c in cuts]


def assemble(parts: list[torch.Tensor], runtime, accumulation: int) -> torch.Tensor:
    """The global weight map out of every rank's micro-batches."""
    whole = torch.zeros(GLOBAL_NOISY, SIZE, SIZE, dtype=parts[0].dtype)
    for micro, part in enumerate(parts):
        cut = runtime.shard.micro_batch(0, micro, accumulation, len(part))
        whole[cut.start : cut.stop] = part
    return sum_over_ranks(whole)


def weigh_in_float64(runtime, accumulations: tuple[int, ...]) -> dict[str, torch.Tensor]:
    out = {}
    for accumulation in accumulations:
        for estimator in ("forward", "reverse", "finite"):
            model = make_model(torch.float64)
            reweighter = PixelReweighter(model, estimator=estimator, sum_over_ranks=sum_over_ranks)
            noisy, clean = (micro_batches(p, runtime, accumulation) for p in global_batches(0, torch.float64))
            weights = reweighter.weigh(noisy, clean)
            parts = [w.full(masks) for w, (_, masks) in zip(weights, noisy, strict=True)]
            out[f"{estimator}.{accumulation}"] = assemble(parts, runtime, accumulation)
    return out


def train_under_deepspeed(runtime, cases: list[tuple[int, str, int]]) -> dict[str, torch.Tensor]:
    out = {}
    for stage, estimator, accumulation in cases:
        config = Config.model_validate({
            "name": "test",
            "data": {"root": "."},
            "train": {
                "steps": STEPS,
                "accumulation": accumulation,
                "batch_size": GLOBAL_NOISY // (accumulation * runtime.shard.world_size),
            },
            "optim": {"name": "sgd", "momentum": 0.0, "lr": LR},
            "deepspeed": {"zero_stage": stage},
        })
        model = make_model(torch.float32)
        shadow = shadow_of(model)
        optimizer, _ = build_optimizer(model.parameters(), config.optim)
        engine = build_engine(model, optimizer, config)
        reweighter = PixelReweighter(shadow, estimator=estimator, sum_over_ranks=sum_over_ranks)
        for step in range(STEPS):
            noisy, clean = (micro_batches(p, runtime, accumulation) for p in global_batches(step, torch.float32))
            weights = reweighter.weigh(noisy, clean)
            batches = [
                WeightedBatch(Batch(x, y, y, ()), w) for (x, y), w in zip(noisy, weights, strict=True)
            ]
            update(engine, Method(), batches, LR, runtime.shard.world_size)
        key = f"{stage}.{estimator}.{accumulation}"
        out |= {f"{key}:{name}": p.detach().clone() for name, p in model.named_parameters()}
    return out


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_do_not_depend_on_ranks_or_accumulation(world_size: int) -> None:
    expected = reference(1, torch.float64)["weights.0"]
    for actual in run_ranks(weigh_in_float64, world_size, (1, 2)):
        for name, weights in actual.items():
            tolerance = 1e-8 if name.startswith("finite") else 1e-10
            error = (weights - expected).abs().max() / expected.max()
            assert error < tolerance, f"{name} on {world_size} ranks: {error}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_updates_do_not_depend_on_ranks_stage_or_accumulation(world_size: int) -> None:
    cases = [(stage, "forward", a) for stage in (0, 1, 2) for a in (1, 2)]
    cases += [(stage, estimator, 1) for stage in (0, 2) for estimator in ("reverse", "finite")]
    expected = reference(STEPS, torch.float32)
    start = dict(make_model(torch.float32).named_parameters())
    for actual in run_ranks(train_under_deepspeed, world_size, cases):
        for key, parameter in actual.items():
            case, name = key.split(":")
            moved = (expected[name] - start[name]).norm()
            error = (parameter - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
            tolerance = 1e-3 if "finite" in case else 1e-5
            assert moved > 1e-4, f"{name} hardly moved: the comparison would say nothing"
            assert error < tolerance, f"ZeRO {case}, {name} on {world_size} ranks: {error}"
