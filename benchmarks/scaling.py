"""What ranks add: weak and strong scaling, each collective of a step, and a model for more GPUs than there are.

    python benchmarks/scaling.py [--ranks 1 2 4] [--rounds 9] [--json FILE]         # the ranks of this machine
    python benchmarks/scaling.py --gpus 8 64 512 --inter-bandwidth 50 --tflops 100  # the model's inputs, see --help
    python benchmarks/scaling.py --ranks                                            # the model alone

Measured: a plain step (uniform weights) and a weighted one (clean gradient, forward mode) under DeepSpeed, one thread a
rank on a CPU. Weak: --batch images on every rank. Strong: --batch images on all ranks together. Steps take turns within
a run of some ranks; runs of different numbers of ranks follow each other, so a machine whose speed drifts shows in
their ratio. With more ranks than cores nothing can scale; the table says which those are.

Collectives: every call of torch.distributed in a step, by the function that asks for it, in the weak mode. `in step`
includes the wait for the slowest rank, `alone` is an all-reduce of as many bytes right after a barrier.

The model: what a rank sends at every ZeRO stage, in order, is benchmarks/traffic.py, which benchmarks/fake_world.py
holds against real steps of one rank of 8, 64 and 512. An all-reduce of n bytes over N ranks is a ring or, where that is
faster, a binary tree up and down; a gather of n bytes from each rank, and a reduce-scatter into as many, is recursive
doubling,

    ring  2 (N − 1) rounds of  α + n / (N β)        tree  2 ⌈log₂ N⌉ rounds of  α + n / β
    gather  ⌈log₂ N⌉ α + (N − 1) n / β

with the latency α and the bandwidth β of the slowest link on the way. A step takes the time of its computation plus
that of its collectives, one after the other. The program prints what it assumes.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import traffic
from measure import describe_machine, synchronise, take_turns
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from traffic import Message, Network

from distseg.distributed.collectives import AllReduce
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, shadow_of
from distseg.distributed.runtime import Runtime
from distseg.meta import PixelReweighter
from distseg.meta.weights import WeightMap, uniform_weights
from distseg.models.unet import UNet
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.training.train_step import train_step

KINDS, MODES = ("plain", "weighted"), ("weak", "strong")
STEP_OF = {"plain": "plain", "weighted": "forward"}
COLLECTIVES = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
META_STEP = Path(__file__).parent / "results" / "meta_step.json"
WEIGHTED_RATIO = round(json.loads(META_STEP.read_text())["rows"]["forward"]["time_ratio"], 2)
"""Computation of a weighted step over a plain one, as measured in forward mode on the paper's network."""


class Recorder:
    """Within `with`, notes every collective: who asked for it, its bytes and the seconds until it was done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls: list[tuple[str, str, int, float]] = []

    def __enter__(self) -> "Recorder":
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(dist, name, self._noting(name, original))
        return self

    def __exit__(self, *_) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _noting(self, name: str, original: Callable) -> Callable:
        def call(*arguments, **options):
            # Of a gather or a scatter its input, of a reduction the tensor itself: the last one that is given.
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            synchronise(self.device)
            started = time.perf_counter()
            work = original(*arguments, **options)
            if options.get("async_op"):
                work.wait()
            synchronise(self.device)
            seconds = time.perf_counter() - started
            self.calls.append((_asker(), name, tensors[-1].numel() * tensors[-1].element_size(), seconds))
            return work

        return call


def _asker() -> str:
    """The function of distseg or DeepSpeed on whose behalf a collective runs."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return "DeepSpeed"
        if "distseg" in path.parts and path.parent.name in ("meta", "training"):
            return f"{path.parent.name}/{path.name} {frame.f_code.co_name}"
        frame = frame.f_back
    return "other"


def measure_rank(runtime: Runtime, options: dict) -> dict[str, Tensor]:
    """This rank's `seconds.KIND.MODE` (rounds,), `collective.KIND|ASKER|OP` (calls a step, bytes, in step, alone)."""
    torch.set_num_threads(1)
    device, world = runtime.device, runtime.shard.world_size
    torch.manual_seed(0)
    model = UNet(options["width"], options["depth"], "group").to(device)
    section = DeepSpeedConfig(zero_stage=options["zero_stage"])
    shadow = shadow_of(model)
    optimizer, _ = build_optimizer(list(model.parameters()), OptimConfig())
    engine = build_engine(model, optimizer, section, batch_size=options["batch"], accumulation=1, precision="fp32")
    reweighter = PixelReweighter(shadow, reduction=AllReduce())
    torch.manual_seed(1 + runtime.shard.rank)

    def build_step(kind: str, mode: str) -> Callable[[], None]:
        count = options["batch"] if mode == "weak" else options["batch"] // world

        def batch() -> tuple[Tensor, Tensor]:
            images = torch.randn(count, 3, options["size"], options["size"], device=device)
            return images, torch.randint(0, 2, (count, *images.shape[2:]), dtype=torch.uint8, device=device)

        noisy, clean = batch(), batch()

        def weigh() -> list[WeightMap]:
            if kind == "weighted":
                return reweighter.weigh([noisy], [clean])
            return uniform_weights([noisy[1]], AllReduce(), noisy[0].dtype)

        return partial(train_step, engine, GivenSteps([noisy[0]], [noisy[1]], weigh), 0, 1e-4)

    steps = {f"{kind}.{mode}": build_step(kind, mode) for kind in KINDS for mode in MODES}
    seconds = take_turns(steps, options["rounds"], device.type, dist.barrier)
    out = {f"seconds.{name}": torch.tensor(times, dtype=torch.float64) for name, times in seconds.items()}

    repeats = 3
    for kind in KINDS:
        with Recorder(device.type) as recorder:
            for _ in range(repeats):
                dist.barrier()
                steps[f"{kind}.weak"]()
        for asker, name in dict.fromkeys((call[0], call[1]) for call in recorder.calls):
            own = [call for call in recorder.calls if call[:2] == (asker, name)]
            size = sum(call[2] for call in own) // repeats
            alone = time_all_reduce(size, runtime) if name == "all_reduce" else float("nan")
            figures = [len(own) / repeats, size, sum(call[3] for call in own) / repeats, alone]
            out[f"collective.{kind}|{asker}|{name}"] = torch.tensor(figures, dtype=torch.float64)
    out["parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
    large = 4 * int(out["parameters"])
    out["fit"] = torch.tensor([time_all_reduce(size, runtime) for size in (32, large)], dtype=torch.float64)
    return out


def time_all_reduce(size: int, runtime: Runtime, repeats: int = 15) -> float:
    """Median seconds of an all-reduce of `size` bytes that every rank begins at once."""
    tensor = torch.zeros(max(1, size // 4), device=runtime.device)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        synchronise(runtime.device.type)
        started = time.perf_counter()
        dist.all_reduce(tensor)
        synchronise(runtime.device.type)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(arguments: argparse.Namespace) -> dict:
    names = ("width", "depth", "size", "batch", "rounds", "zero_stage")
    options = {name: getattr(arguments, name) for name in names}
    scaling: list[dict] = []
    collectives: list[dict] = []
    links: list[dict] = []
    for world in arguments.ranks:
        ranks = run_ranks(measure_rank, world, options, timeout=600)
        for kind, mode in itertools.product(KINDS, MODES):
            # A step is over when its last rank is.
            last = torch.stack([rank[f"seconds.{kind}.{mode}"] for rank in ranks]).amax(0)
            images, seconds = options["batch"] * (world if mode == "weak" else 1), last.median().item()
            scaling.append({"kind": kind, "mode": mode, "ranks": world, "images": images, "seconds": seconds})
        parameters = int(ranks[0]["parameters"])
        if world == 1:
            continue
        for key, figures in ranks[0].items():
            if key.startswith("collective."):
                kind, asker, name = key.removeprefix("collective.").split("|")
                calls, size, in_step, alone = figures.tolist()
                row = {"ranks": world, "kind": kind, "asker": asker, "name": name, "calls": calls, "bytes": int(size)}
                alone = None if math.isnan(alone) else alone
                collectives.append(row | {"seconds_in_step": in_step, "seconds_alone": alone})
        small, large = ranks[0]["fit"].tolist()
        latency = small / (2 * (world - 1))
        bandwidth = 2 * (world - 1) / world * 4 * parameters / max(large - small, 1e-9)
        links.append({"ranks": world, "latency": latency, "bandwidth": bandwidth})
    for row in scaling:
        [least] = [r for r in scaling if r["ranks"] == arguments.ranks[0] and (r["kind"], r["mode"]) == _case(row)]
        speed, base = (r["images"] / r["seconds"] / r["ranks"] for r in (row, least))
        row["efficiency"] = speed / base
    return {"parameters": parameters, "scaling": scaling, "collectives": collectives, "links": links}


def _case(row: dict) -> tuple[str, str]:
    return row["kind"], row["mode"]


@dataclass(frozen=True)
class Cluster:
    """The model's inputs: seconds, bytes a second, operations a second."""

    gpus_per_node: int
    intra_latency: float
    intra_bandwidth: float
    inter_latency: float
    inter_bandwidth: float
    operations: float
    """A GPU's floating-point operations a second, as far as this network reaches them."""
    overlap: float
    """Of a gradient's reduction, the part that the backward pass hides which makes it."""

    def all_reduce(self, size: int, gpus: int) -> float:
        """Seconds of an all-reduce of `size` bytes; the slowest link sets the pace of every round."""
        if gpus == 1:
            return 0.0
        latency, bandwidth = self._link(gpus)
        ring = 2 * (gpus - 1) * (latency + size / (gpus * bandwidth))
        tree = 2 * math.ceil(math.log2(gpus)) * (latency + size / bandwidth)
        return min(ring, tree)

    def all_gather(self, size: int, gpus: int) -> float:
        """Seconds of a gather of `size` bytes from each GPU; a reduce-scatter into as many is its reverse."""
        latency, bandwidth = self._link(gpus)
        return math.ceil(math.log2(gpus)) * latency + (gpus - 1) * size / bandwidth

    def seconds(self, message: Message, gpus: int) -> float:
        """Of one collective of a rank; of a gradient or a parameter, what its backward pass does not hide."""
        if message.operator == "allreduce":
            alone = self.all_reduce(message.size, gpus)
        elif message.operator == "allgather_base":
            alone = self.all_gather(message.size, gpus)
        else:
            assert message.operator == "reduce_scatter_base", message
            alone = self.all_gather(message.size // gpus, gpus)
        return alone if message.numbers else alone * (1 - self.overlap)

    def _link(self, gpus: int) -> tuple[float, float]:
        if gpus <= self.gpus_per_node:
            return self.intra_latency, self.intra_bandwidth
        return self.inter_latency, self.inter_bandwidth


def extrapolate(
    cluster: Cluster, network: Network, operations_per_image: float, batch: int, gpus: list[int], stage: int
) -> list[dict]:
    """Seconds of a step and efficiency: weak with `batch` images a GPU, strong with what weak has on the most GPUs."""
    rows = []
    for mode, kind in itertools.product(MODES, KINDS):
        for count in (1, *gpus):
            images = batch if mode == "weak" else batch * max(gpus) / count
            ratio = WEIGHTED_RATIO if kind == "weighted" else 1
            computation = images * operations_per_image * ratio / cluster.operations
            messages = traffic.step(network, traffic.World(count, stage), STEP_OF[kind])
            parts = {"engine": 0.0, "clean_gradient": 0.0, "scalars": 0.0}
            for message in messages:
                part = "engine" if message.asker == "deepspeed" else "clean_gradient"
                parts["scalars" if message.numbers else part] += cluster.seconds(message, count)
            seconds = computation + sum(parts.values())
            row = {"stage": stage, "mode": mode, "kind": kind, "gpus": count, "images": images * count}
            row |= {"messages": len(messages), "bytes": sum(message.size for message in messages)}
            row |= {"computation": computation, **parts, "seconds": seconds}
            rows.append(row | {"efficiency": computation / seconds})
    return rows


def operations_per_image(width: int, depth: int, size: int) -> float:
    """Floating-point operations of a plain step, forward and backward, for one image; counted, not timed."""
    network = UNet(width, depth, "none").to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, size, size, device="meta")).sum().backward()
    return float(counter.get_total_flops())


def report(arguments: argparse.Namespace) -> dict:
    cluster = Cluster(
        gpus_per_node=arguments.gpus_per_node,
        intra_latency=arguments.intra_latency * 1e-6,
        intra_bandwidth=arguments.intra_bandwidth * 1e9,
        inter_latency=arguments.inter_latency * 1e-6,
        inter_bandwidth=arguments.inter_bandwidth * 1e9,
        operations=arguments.tflops * 1e12,
        overlap=arguments.overlap,
    )
    width, depth, size = arguments.model_width, arguments.model_depth, arguments.model_size
    network = traffic.network_of(UNet(width, depth, "none"), size)
    operations = operations_per_image(width, depth, size)
    model = {"cluster": asdict(cluster), "parameters": network.parameters, "operations_per_image": operations}
    model |= {"network": [width, depth, size], "batch": arguments.model_batch, "weighted_ratio": WEIGHTED_RATIO}
    model["rows"] = [
        row
        for stage in arguments.model_zero_stages
        for row in extrapolate(cluster, network, operations, arguments.model_batch, arguments.gpus, stage)
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = vars(arguments) | {"json": None, "cores": len(os.sched_getaffinity(0)), "threads_per_rank": 1}
    return {
        "setting": setting,
        "machine": describe_machine(device),
        "measured": measure(arguments) if arguments.ranks else None,
        "model": model,
    }


def show(result: dict) -> str:
    measured = [*show_measured(result), ""] if result["measured"] else []
    return "\n".join([*measured, *show_model(result["model"])])


def show_measured(result: dict) -> list[str]:
    setting, machine, measured = result["setting"], result["machine"], result["measured"]
    lines = [
        f"measured: U-Net width {setting['width']} depth {setting['depth']}, {measured['parameters']:,} parameters,"
        f" {setting['size']}×{setting['size']}, ZeRO {setting['zero_stage']}",
        f"{machine['device']}, {setting['cores']} cores, one thread a rank, torch {machine['torch']},"
        f" median of {setting['rounds']} rounds",
        "",
        "mode    step      ranks  images  seconds  images/s  efficiency",
    ]
    for row in sorted(measured["scaling"], key=lambda row: (row["mode"] != "weak", row["kind"], row["ranks"])):
        crowded = "   more ranks than cores" if row["ranks"] > setting["cores"] else ""
        lines.append(
            f"{row['mode']:6s}  {row['kind']:8s}  {row['ranks']:5d}  {row['images']:6d}  {row['seconds']:7.3f}"
            f"  {row['images'] / row['seconds']:8.1f}  {row['efficiency']:10.0%}{crowded}"
        )
    header = "ranks  step      for                                collective  calls       bytes   in step      alone"
    lines += ["", header]
    for row in measured["collectives"]:
        alone = "        –" if row["seconds_alone"] is None else f"{row['seconds_alone'] * 1e3:6.2f} ms"
        lines.append(
            f"{row['ranks']:5d}  {row['kind']:8s}  {row['asker']:33s}  {row['name']:10s}  {row['calls']:5.0f}"
            f"  {row['bytes']:10,d}  {row['seconds_in_step'] * 1e3:5.2f} ms  {alone}"
        )
    for row in measured["links"]:
        lines.append(
            f"{row['ranks']} ranks, fitted to all-reduces of 32 bytes and of one gradient:"
            f" α {row['latency'] * 1e6:.0f} µs, β {row['bandwidth'] / 1e9:.2f} GB/s"
        )
    return lines


def show_model(model: dict) -> list[str]:
    cluster, (width, depth, size) = model["cluster"], model["network"]
    lines = [
        f"model: U-Net width {width} depth {depth}, {model['parameters']:,} parameters, {size}×{size},"
        f" {model['operations_per_image'] / 1e9:.1f} GFLOP an image and plain step (counted)",
        "assumed, and not measured here:",
        f"  computation    {cluster['operations'] / 1e12:g} TFLOP/s reached on a GPU at any batch; a weighted step is"
        f" {model['weighted_ratio']} plain ones",
        f"  in a node      {cluster['gpus_per_node']} GPUs, α {cluster['intra_latency'] * 1e6:g} µs,"
        f" β {cluster['intra_bandwidth'] / 1e9:g} GB/s",
        f"  between nodes  α {cluster['inter_latency'] * 1e6:g} µs, β {cluster['inter_bandwidth'] / 1e9:g} GB/s:"
        " of a node, which one ring through all GPUs enters and leaves once",
        f"  overlap        {cluster['overlap']:.0%} of a gradient's reduction is behind its backward pass; fp32",
        "  ZeRO           DeepSpeed's own defaults; at stage 3 its gathers one by one, which it joins where it can",
        "  left out       slow ranks, contention, reading data, validation, small batches that leave a GPU idle",
        "",
        "ZeRO  mode    step      GPUs   images  computation    engine  clean gradient  scalars      step  efficiency",
    ]
    for row in model["rows"]:
        names = ("computation", "engine", "clean_gradient", "scalars", "seconds")
        times = [f"{row[name] * 1e3:.2f} ms" for name in names]
        lines.append(
            f"{row['stage']:4d}  {row['mode']:6s}  {row['kind']:8s}  {row['gpus']:4d}  {row['images']:7.0f}"
            f"  {times[0]:>11s}  {times[1]:>8s}  {times[2]:>14s}  {times[3]:>7s}  {times[4]:>8s}"
            f"  {row['efficiency']:10.0%}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="to measure; none if empty")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=8, help="images a rank (weak) or a step (strong)")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="of the model")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra-latency", type=float, default=3, help="µs a round, between GPUs of a node")
    parser.add_argument("--intra-bandwidth", type=float, default=200, help="GB/s, likewise")
    parser.add_argument("--inter-latency", type=float, default=10, help="µs a round, between nodes")
    parser.add_argument("--inter-bandwidth", type=float, default=25, help="GB/s of a node's network: 25 is 200 Gb/s")
    parser.add_argument("--tflops", type=float, default=20, help="10¹² operations a second that a GPU reaches, fp32")
    parser.add_argument("--overlap", type=float, default=0.0, help="of a gradient's reduction, behind its backward")
    parser.add_argument("--model-width", type=int, default=64, help="the paper's network by default")
    parser.add_argument("--model-depth", type=int, default=4)
    parser.add_argument("--model-size", type=int, default=96)
    parser.add_argument("--model-zero-stages", type=int, choices=(0, 1, 2, 3), nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--model-batch", type=int, default=32, help="noisy images, and as many clean ones, a GPU")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    if any(arguments.batch % ranks for ranks in arguments.ranks):
        parser.error(f"--batch {arguments.batch}: must be a multiple of every number of --ranks")
    path = arguments.json
    result = report(arguments)
    print(show(result))
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
