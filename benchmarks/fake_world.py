"""One rank of 8, 64 and 512 that are not there makes real steps: what it sends, beside the model, and what it holds.

    python benchmarks/fake_world.py [--ranks 8 64 512] [--widths 64 364] [--json FILE]
    python benchmarks/fake_world.py --widths          # what a small network sends, and no more: a minute

The step is the one that training makes (distseg/training/train_step.py, DeepSpeed and all) on torch's fake process
group (distseg/testing/fake_world.py). Every collective is recorded, in order, and compared with benchmarks/traffic.py,
which benchmarks/scaling.py turns into times. The program fails where they differ.

    small       a U-Net of width 4 and depth 2 with values: every ZeRO stage, accumulation 1 and 2, every estimator
    --widths    U-Nets of depth 4 without elements, 364 is a billion parameters, a step of 6 + 6 images of 96×96, and

        held    bytes of tensors alive between steps: parameters, optimiser state, DeepSpeed's buffers
        meta    their peak while the weights are computed, activations included
        step    their peak in forward, backward and update, likewise

Stages 1 and 2 run there with DeepSpeed's buckets of 5·10⁷ elements (configs/deepspeed/large_buckets.json), stage 3 with
zero3_lean.json. What an operator allocates and frees inside itself, libraries and fragmentation are not seen.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import traffic
from measure import describe_machine
from traffic import Message, Network, World

from distseg.distributed.collectives import AllReduce
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, gradients_put_away, shadow_of, sharded_parameters
from distseg.meta import PixelReweighter
from distseg.meta.weights import WeightMap, uniform_weights
from distseg.models.unet import UNet
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.fake_world import fake_rank, without_elements
from distseg.testing.steps import GivenSteps
from distseg.testing.tensors import AliveTensors, Messages
from distseg.training.train_step import train_step

CONFIGS = Path(__file__).parents[1] / "configs" / "deepspeed"
SETTLED = 2
"""Steps after which DeepSpeed's ZeRO-3 no longer compares its order of modules over the ranks."""


class Rank:
    """A rank with its engine, which makes steps of any kind on given images."""

    def __init__(self, world: World, width: int, depth: int, batch: int, side: int) -> None:
        name = "zero3_lean.json" if world.lean else "large_buckets.json" if world.bucket != World.bucket else None
        section = DeepSpeedConfig(zero_stage=world.stage, config_file=CONFIGS / name if name else None)
        model = UNet(width, depth, "none")
        self._shadow = shadow_of(model)
        optimizer, _ = build_optimizer(list(model.parameters()), OptimConfig())
        count = world.accumulation
        self.engine = build_engine(model, optimizer, section, batch_size=batch, accumulation=count, precision="fp32")
        self._sharded = world.stage == 3
        shape = (batch, side, side)
        self._batches = [(torch.randn(batch, 3, side, side), torch.randint(0, 2, shape)) for _ in range(count)]
        self._reweighters = {kind: self._reweighter(kind) for kind in traffic.ESTIMATORS}

    def _reweighter(self, estimator: str) -> PixelReweighter:
        placement = sharded_parameters(self._shadow) if self._sharded else None
        reduction = AllReduce(sharded=self._sharded)
        return PixelReweighter(self._shadow, estimator=estimator, reduction=reduction, placement=placement)

    def weigh(self, kind: str) -> list[WeightMap]:
        if kind == "plain":
            return uniform_weights([masks for _, masks in self._batches], AllReduce(), torch.float32)
        return self._reweighters[kind].weigh(self._batches, self._batches)

    def step(self, kind: str, weights: list[WeightMap] | None = None) -> None:
        """One step; `weights` where they are known already."""
        images, masks = zip(*self._batches, strict=True)
        train_step(self.engine, GivenSteps(images, masks, lambda: weights or self.weigh(kind)), 0, 1e-4)

    def sent(self, kind: str) -> list[Message]:
        """What a step sends."""
        with Messages() as messages:
            self.step(kind)
        return [Message(message.asker, message.operator, message.size) for message in messages.messages]


def small_worlds(ranks: int, accumulations: Sequence[int] = (1, 2)) -> Iterator[World]:
    """Every stage."""
    for accumulation in accumulations:
        yield from (World(ranks, stage, accumulation) for stage in (0, 1, 2, 3))
        yield World(ranks, 3, accumulation, lean=True)


def record_small(world: World, kinds: Sequence[str] = traffic.STEPS) -> dict[str, list[Message]]:
    """What each kind of step sends on a small network; within a world, fake or real."""
    rank = Rank(world, width=4, depth=2, batch=1, side=16)
    for kind in ("plain", "finite"):  # the first step of `finite` looks where the network stops gradients
        rank.step(kind)
    return {kind: rank.sent(kind) for kind in kinds}


def small_network() -> Network:
    return traffic.network_of(UNet(4, 2, "none"), 16)


def difference(actual: list[Message], expected: list[Message]) -> str | None:
    """Where two lists of messages part, in words; None if they are the same, whatever is marked as numbers."""
    for index, (one, other) in enumerate(itertools.zip_longest(actual, expected)):
        if one is None or other is None or one[:3] != other[:3]:
            return f"message {index}: sent {one and one[:3]}, the model says {other and other[:3]}"
    return None


def check_small(ranks: int, accumulations: Sequence[int], kinds: Sequence[str]) -> list[dict]:
    """A row for each world and kind of step; for a fresh process."""
    rows = []
    network = small_network()
    with fake_rank(0, ranks):
        for world in small_worlds(ranks, accumulations):
            for kind, actual in record_small(world, kinds).items():
                rows.append(_row(world, kind, actual, traffic.step(network, world, kind)))
    return rows


def _row(world: World, kind: str, actual: list[Message], expected: list[Message] | None) -> dict:
    row = {"ranks": world.ranks, "stage": world.stage, "lean": world.lean, "accumulation": world.accumulation}
    own = [message.size for message in actual if message.asker == "distseg"]
    row |= {"kind": kind, "messages": len(actual), "bytes": sum(message.size for message in actual)}
    return row | {
        "messages_of_distseg": len(own),
        "bytes_of_distseg": sum(own),
        "modelled": expected is not None,
        "difference": None if expected is None else difference(actual, expected),
    }


def check_large(ranks: int, width: int, batch: int, side: int) -> list[dict]:
    """A row for each stage: what a weighted step sends, and the bytes alive, of rank 0, which holds most.

    For a fresh process.
    """
    network = traffic.network_of(UNet(width, 4, "none"), side)
    rows = []
    with fake_rank(0, ranks), without_elements():
        for stage in (0, 1, 2, 3):
            world = World(ranks, stage, lean=stage == 3, bucket=50_000_000 if stage in (1, 2) else World.bucket)
            with AliveTensors() as alive:
                rank = Rank(world, width, 4, batch, side)
                for _ in range(SETTLED if stage == 3 else 0):
                    rank.step("forward")
                actual = rank.sent("forward")
                held = alive.peak = alive.bytes()
                with gradients_put_away(rank.engine):
                    weights = rank.weigh("forward")
                meta, alive.peak = alive.peak, alive.bytes()
                rank.step("forward", weights)
            expected = traffic.step(network, world, "forward") if traffic.is_modelled(network, world) else None
            row = _row(world, "forward", actual, expected)
            rows.append(row | {"parameters": network.parameters, "held": held, "meta": meta, "step": alive.peak})
            del rank, weights
    return rows


def apart(*arguments: str) -> list[dict]:
    """The rows of a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(arguments: argparse.Namespace) -> dict:
    small, large = [], []
    for ranks in arguments.ranks:
        small += apart("--check-small", str(ranks), *(["--brief"] if arguments.brief else []))
    sizes = [f"--batch={arguments.batch}", f"--side={arguments.side}"]
    for width, ranks in itertools.product(arguments.widths, arguments.ranks):
        large += apart("--check-large", str(ranks), str(width), *sizes)
    setting = {name: getattr(arguments, name) for name in ("ranks", "widths", "batch", "side", "brief")}
    return {"setting": setting, "machine": describe_machine("cpu"), "small": small, "large": large}


def _verdict(row: dict) -> str:
    return row["difference"] or ("yes" if row["modelled"] else "not modelled")


def show(result: dict) -> str:
    lines = ["small network: what one rank puts into the collectives of a step", ""]
    lines += ["ranks  ZeRO    accumulation  step     messages   bytes  of distseg           as the model says"]
    for row in result["small"]:
        stage = f"{row['stage']} lean" if row["lean"] else str(row["stage"])
        own = f"{row['messages_of_distseg']:4d} {row['bytes_of_distseg']:8d}"
        lines.append(
            f"{row['ranks']:5d}  {stage:6s}  {row['accumulation']:12d}  {row['kind']:8s} {row['messages']:7d}"
            f"  {row['bytes']:7d}   {own}   {_verdict(row)}"
        )
    if result["large"]:
        setting = result["setting"]
        batch = f"{setting['batch']} + {setting['batch']} images of {setting['side']}×{setting['side']}"
        lines += ["", f"bytes of one rank, MiB, `forward`, {batch}", ""]
        lines += ["   parameters  ZeRO  ranks      held      meta      step      sent  as the model says"]
    for row in sorted(result["large"], key=lambda row: (row["parameters"], row["stage"], row["ranks"])):
        figures = " ".join(f"{row[name] / 2**20:9.0f}" for name in ("held", "meta", "step", "bytes"))
        lines.append(f"{row['parameters']:13,d}  {row['stage']:4d}  {row['ranks']:5d} {figures}  {_verdict(row)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 364], help="of the large networks")
    parser.add_argument(
        "--batch", type=int, default=6, help="of the large networks: noisy images, and as many clean ones"
    )
    parser.add_argument("--side", type=int, default=96, help="likewise, pixels")
    parser.add_argument("--brief", action="store_true", help="accumulation 2 and the estimator `forward` alone")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--check-small", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--check-large", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check_small:
        extent = ((2,), ("forward",)) if arguments.brief else ((1, 2), traffic.STEPS)
        print(json.dumps(check_small(arguments.check_small, *extent)))
        return
    if arguments.check_large:
        print(json.dumps(check_large(*arguments.check_large, batch=arguments.batch, side=arguments.side)))
        return
    result = report(arguments)
    print(show(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if any(row["difference"] for row in result["small"] + result["large"]):
        raise SystemExit("what a step sends is not what the model says")


if __name__ == "__main__":
    main()
