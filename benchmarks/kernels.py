"""The operators beside eager torch and torch.compile, and beside copying the bytes that they have to move.

    python benchmarks/kernels.py [--sizes 16x256x256 …] [--channels 1 8] [--rounds 30] [--json FILE] [--plot FILE]

    weights          logits, tangents, masks → W⁺ and its sums                  8C + 5 bytes per pixel
    loss             logits, masks, W⁺ → Σ W·ℓ                                  4C + 5
    loss+gradient    the same and its gradient in the logits                    8C + 5
    dice loss+grad.  Dice plus cross-entropy and its gradient, a pass each     12C + 10
    double backward  the gradient, and of it the cotangent of W, as `reverse`  16C + 14
    patch(8)         alignment map, masks → shares of 8×8 patches, spread       9
    normalise        W⁺, masks → W                                              9
    step             weights, then loss+gradient under their normaliser        16C + 10

float32 logits, uint8 masks. The bytes are those that have to be moved, each tensor read or written once; the copy
beside a time moves as many, half of them read and half written, between two buffers of its own on the same device.
The contenders and the copy take turns in a random order; ratios are of one round. On a GPU the L2 cache is overwritten
before each measurement, and times are the device's: it has work until all is launched. torch.compile has no double
backward.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import describe_machine, take_turns
from torch import Tensor

from distseg import ops
from distseg.ops import reference

CASES = ("weights", "loss", "loss+gradient", "dice loss+grad.", "double backward", "patch(8)", "normalise", "step")
CONTENDERS = ("ours", "eager", "compiled")


def bytes_per_pixel(case: str, channels: int) -> int:
    per_channel, rest = {
        "weights": (8, 5),
        "loss": (4, 5),
        "loss+gradient": (8, 5),
        "dice loss+grad.": (12, 10),
        "double backward": (16, 14),
        "patch(8)": (0, 9),
        "normalise": (0, 9),
        "step": (16, 10),
    }[case]
    return per_channel * channels + rest


def operators(contender: str) -> SimpleNamespace:
    """What a contender calls: ours, or the eager operators, or these compiled."""
    if contender == "ours":
        return SimpleNamespace(
            weights=ops.positive_alignment,
            loss=ops.weighted_loss,
            dice=ops.dice_cross_entropy,
            patch=lambda u, y: ops.positive_part(u, y, 8),
            normalise=ops.normalise,
        )
    eager = {
        "weights": reference.positive_alignment,
        "loss": lambda z, y, w, scale, level: reference.weighted_loss(z, y, w, scale, level).sum(),
        "dice": eager_dice,
        "patch": lambda u, y: reference.positive_part(u, y, 8),
        "normalise": reference.normalise,
    }
    if contender == "eager":
        return SimpleNamespace(**eager)
    return SimpleNamespace(**{name: torch.compile(function, dynamic=False) for name, function in eager.items()})


def eager_dice(z: Tensor, y: Tensor, w: Tensor, scale: Tensor, level: Tensor) -> Tensor:
    classes = torch.ones(len(z), max(2, z.shape[1]), device=z.device)
    return reference.dice_cross_entropy(z, y, w, scale, level, classes, 0.5, 1e-5).sum()


def calls(contender: str, shape: tuple[int, ...], device: str) -> dict[str, Callable[[], object]]:
    """The cases of a contender on inputs of one shape, (B, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, *sides = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    z, t, w = normal(*shape), normal(*shape), normal(batch, *sides).abs()
    y = torch.randint(0, max(2, channels), (batch, *sides), generator=generator).to(torch.uint8)
    y[:, : max(1, sides[0] // 20)] = ops.IGNORE
    y, u = y.to(device), w - 0.5
    one, zero = torch.ones(batch, device=device), torch.zeros(batch, device=device)
    z_leaf, w_leaf = z.clone().requires_grad_(), w.clone().requires_grad_()
    own = operators(contender)

    def gradient(w: Tensor, scale: Tensor) -> Tensor:
        return torch.autograd.grad(own.loss(z_leaf, y, w, scale, zero), z_leaf)[0]

    def dice_gradient() -> Tensor:
        return torch.autograd.grad(own.dice(z_leaf, y, w, one, zero), z_leaf)[0]

    def double_backward() -> Tensor:
        loss = own.loss(z_leaf, y, w_leaf, one, zero)
        [first] = torch.autograd.grad(loss, z_leaf, create_graph=True)
        return torch.autograd.grad(first, w_leaf, t)[0]

    def step() -> Tensor:
        positive, sums = own.weights(z, t, y)
        return gradient(positive, (1 / sums[:, 1].sum()).float().expand(batch))

    return {
        "weights": lambda: own.weights(z, t, y),
        "loss": lambda: own.loss(z, y, w, one, zero),
        "loss+gradient": lambda: gradient(w, one),
        "dice loss+grad.": dice_gradient,
        "patch(8)": lambda: own.patch(u, y),
        "normalise": lambda: own.normalise(w, y, one, zero),
        "step": step,
    } | ({} if contender == "compiled" else {"double backward": double_backward})


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    contenders = CONTENDERS if arguments.compile else CONTENDERS[:2]
    flush = None
    if arguments.device == "cuda":
        flush = flush_of_gpu()
    for size in arguments.sizes:
        for channels in arguments.channels:
            batch, height, width = (int(side) for side in size.split("x"))
            shape = (batch, channels, height, width)
            torch._dynamo.reset()
            own = {name: calls(name, shape, arguments.device) for name in contenders}
            for case in CASES:
                moved = bytes_per_pixel(case, channels) * batch * height * width
                source, target = torch.zeros(2, moved // 2, dtype=torch.uint8, device=arguments.device)
                entries = {name: functions[case] for name, functions in own.items() if case in functions}
                entries["copy"] = lambda source=source, target=target: target.copy_(source)
                seconds = take_turns(entries, arguments.rounds, arguments.device, flush)
                rows.append(
                    {
                        "case": case,
                        "size": size,
                        "channels": channels,
                        "bytes": moved,
                        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
                        "over_copy": quartiles(seconds["ours"], seconds["copy"]),
                        "speedup": {
                            name: quartiles(seconds[name], seconds["ours"])
                            for name in contenders[1:]
                            if name in seconds
                        },
                    }
                )
                print(show_row(rows[-1]), flush=True)
    return rows


def flush_of_gpu() -> Callable[[], object]:
    """Overwrites the L2 cache, and keeps the GPU busy for about a millisecond more, while launches are queued."""
    # Four times the cache: what the last measurement left there would be read at another speed.
    cache = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        cache.zero_()
        torch.cuda._sleep(2_000_000)  # cycles

    return flush


def quartiles(times: list[float], others: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile of the ratios, round by round."""
    return statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)


HEADER = (
    f"{'case':16s} {'size':>11s} {'C':>2s} {'MB':>7s} {'ms':>8s} {'GB/s':>6s}   {'× copy':17s}"
    f"   {'eager / ours':19s}   compiled / ours"
)


def show_row(row: dict[str, Any]) -> str:
    def spread(values: list[float] | None) -> str:
        return "–" if values is None else f"{values[1]:5.2f} ({values[0]:.2f}–{values[2]:.2f})"

    own = row["seconds"]["ours"]
    return (
        f"{row['case']:16s} {row['size']:>11s} {row['channels']:2d} {row['bytes'] / 1e6:7.1f} {own * 1e3:8.3f}"
        f" {row['bytes'] / own / 1e9:6.1f}   {spread(row['over_copy']):17s}"
        f"   {spread(row['speedup'].get('eager')):19s}   {spread(row['speedup'].get('compiled'))}"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput by size, a panel per case: each contender, the first C solid and the others dashed."""
    from matplotlib.figure import Figure

    machine, sizes = result["machine"], result["setting"]["sizes"]
    figure = Figure(figsize=(8.5, 8), layout="constrained")
    title = f"{machine['device']}, {machine['backend']}, torch {machine['torch']}, {machine['date']}"
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(3, 3)
    colours = {"ours": "#D55E00", "eager": "#0072B2", "compiled": "#009E73", "copy": "#7F7F7F"}
    for axes, case in zip(panels.flat, CASES, strict=False):
        for nth, channels in enumerate(result["setting"]["channels"]):
            rows = [row for row in result["rows"] if row["case"] == case and row["channels"] == channels]
            for name, colour in colours.items():
                points = [
                    (sizes.index(row["size"]), row["bytes"] / row["seconds"][name] / 1e9)
                    for row in rows
                    if name in row["seconds"]
                ]
                if points:
                    style = {"linestyle": "--" if nth else "-", "marker": "o", "markersize": 3, "linewidth": 1.3}
                    axes.plot(*zip(*points, strict=True), color=colour, label=f"{name}, C = {channels}", **style)
        axes.set_title(case, fontsize=9)
        axes.set_xticks(range(len(sizes)), [size.replace("x", "×") for size in sizes], fontsize=7)
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(color="#E4E4E4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("GB/s of the bytes that have to be moved", fontsize=8)
    legend = panels.flat[len(CASES)]
    legend.axis("off")
    legend.legend(*panels.flat[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    sizes = ["32x96x96", "16x256x256", "32x256x256"] + (["64x512x512"] if on_gpu else [])
    parser.add_argument("--sizes", nargs="+", default=sizes, help="BxHxW")
    parser.add_argument("--channels", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30, help="at least 2")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    arguments = parser.parse_args()

    machine = describe_machine(arguments.device) | {"backend": ops.backend(arguments.device)}
    if arguments.device == "cuda":
        machine["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"\n{HEADER}")
    setting = {name: value for name, value in vars(arguments).items() if name not in ("json", "plot")}
    result = {"setting": setting, "machine": machine, "rows": measure(arguments)}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
