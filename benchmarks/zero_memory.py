"""What a rank holds under ZeRO-3 beside ZeRO-0, meta pass included, on a network of 100 million parameters.

    python benchmarks/zero_memory.py [--ranks 4 --channels 512 --layers 42] [--json FILE]

Every rank runs whole steps, weights and then DeepSpeed's update with SGD and momentum; the second is measured. The
images are small, so that parameters and not activations are what fills the memory. For each stage and estimator, of the
rank that holds most:

    held      bytes of tensors alive between steps: parameters, optimiser state, gradients kept, DeepSpeed's buffers
    meta      their peak while the weights are computed
    step      their peak in DeepSpeed's forward, backward and update
    resident  growth of the resident set from before the network is built to its peak in the measured step

Alive is every storage that an operator returned and something still refers to, but for activations: tensors whose
last two dimensions are the image's. What a convolution needs within itself and what gloo holds in flight is in
`resident` alone, beside activations, code and fragmentation.

The bound of the meta pass is `held`, in which g takes the place of DeepSpeed's buffer for gradients, + 3 l, with l the
bytes of the largest layer: a weight with its gradient, tangent or both. Where the virtual step starts at
`--initial-weight`, the fast weights are one share more.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from measure import describe_machine
from torch import Tensor, nn

from distseg.distributed.collectives import AllReduce
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, gradients_put_away, shadow_of, sharded_parameters
from distseg.meta import PixelReweighter
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.testing.tensors import AliveTensors
from distseg.training.train_step import train_step

SIDE = 8
LEAN = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3_lean.json"
ESTIMATORS = ("forward", "reverse")


class Deep(nn.Module):
    """Equal residual layers, the largest of which is a small part of the whole."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers))
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for layer in self.layers:
            features = features + nn.functional.silu(layer(features))
        return self.head(features)


def measure(
    runtime, stage: int, estimator: str, channels: int, layers: int, initial_weight: float
) -> dict[str, Tensor]:
    """Bytes of this rank, by the names that the module's docstring gives them."""
    optim = OptimConfig(name="sgd", momentum=0.9, lr=1e-4)
    section = DeepSpeedConfig(zero_stage=stage, config_file=LEAN if stage == 3 else None)
    before = resident("VmRSS")
    with AliveTensors(lambda tensor: tensor.shape[-2:] != (SIDE, SIDE)) as alive:
        torch.manual_seed(0)
        model = Deep(channels, layers)
        shadow = shadow_of(model)
        optimizer, _ = build_optimizer(model.parameters(), optim)
        engine = build_engine(model, optimizer, section, batch_size=1, accumulation=1, precision="fp32")
        reweighter = PixelReweighter(
            shadow,
            estimator=estimator,
            virtual_lr=1e-3,
            initial_weight=initial_weight,
            reduction=AllReduce(sharded=stage == 3),
            placement=sharded_parameters(shadow) if stage == 3 else None,
        )
        torch.manual_seed(1 + runtime.shard.rank)
        images, masks = torch.randn(1, 3, SIDE, SIDE), torch.randint(0, 2, (1, SIDE, SIDE))

        def weigh():
            return reweighter.weigh([(images, masks)], [(images.flip(3), masks.flip(2))])

        def learn(weights) -> None:
            train_step(engine, GivenSteps([images], [masks], lambda: weights), 0, 1e-4)

        learn(weigh())
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present resident set
        held = alive.peak = alive.bytes()
        with gradients_put_away(engine):
            weights = weigh()
        meta, alive.peak = alive.peak, alive.bytes()
        learn(weights)
    sizes = {"held": held, "meta": meta, "step": alive.peak, "resident": resident("VmHWM") - before}
    return {name: torch.tensor(size) for name, size in sizes.items()}


def resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def report(arguments: argparse.Namespace) -> dict:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed tensors go back at once, so that the resident set tells
    network = Deep(arguments.channels, arguments.layers)
    sizes = [parameter.numel() for parameter in network.parameters()]
    whole, layer = sum(sizes) * 4, max(sizes) * 4
    del network
    rows = []
    for stage in (0, 3):
        for estimator in ESTIMATORS:
            options = (stage, estimator, arguments.channels, arguments.layers, arguments.initial_weight)
            ranks = run_ranks(measure, arguments.ranks, *options, timeout=900)
            row = {name: max(int(rank[name]) for rank in ranks) for name in ranks[0]}
            fast_weights = whole / arguments.ranks if arguments.initial_weight else 0
            bound = row["held"] + fast_weights + 3 * layer if stage == 3 else None
            rows.append({"stage": stage, "estimator": estimator, **row, "bound_of_meta": bound})
    return {
        "setting": vars(arguments) | {"json": None},
        "machine": describe_machine("cpu"),
        "parameters": sum(sizes),
        "bytes_whole": whole,
        "bytes_share": whole / arguments.ranks,
        "bytes_largest_layer": layer,
        "rows": rows,
    }


def show(result: dict) -> str:
    def mib(size: float | None) -> str:
        return f"{'':>9s}" if size is None else f"{size / 2**20:9.1f}"

    whole, share, layer = (result[f"bytes_{name}"] for name in ("whole", "share", "largest_layer"))
    lines = [
        f"{result['parameters']:,} parameters on {result['setting']['ranks']} ranks, MiB: "
        f"whole {mib(whole).strip()}, share {mib(share).strip()}, largest layer {mib(layer).strip()}",
        "",
        "ZeRO  estimator      held      meta    bound      step  resident",
    ]
    for row in result["rows"]:
        figures = " ".join(mib(row[name]) for name in ("held", "meta", "bound_of_meta", "step", "resident"))
        lines.append(f"{row['stage']:4d}  {row['estimator']:9s} {figures}")
    for estimator in ESTIMATORS:
        own = [row for row in result["rows"] if row["estimator"] == estimator]
        peak_zero, peak_three = (max(row["meta"], row["step"]) for row in own)
        allowed = peak_zero / result["setting"]["ranks"] + layer
        lines.append(
            f"{estimator}: peak {mib(peak_three).strip()} MiB under ZeRO-3, {mib(peak_zero).strip()} under ZeRO-0;"
            f" a share of that and the largest layer are {mib(allowed).strip()}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--layers", type=int, default=42)
    parser.add_argument("--initial-weight", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args()
    path = arguments.json
    result = report(arguments)
    print(show(result))
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
