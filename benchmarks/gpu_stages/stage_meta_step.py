"""A plain step, a step under each estimator, and one by the authors' procedure, in three precisions and at two sizes.

A plain step is forward, backward and SGD with momentum on the noisy images; the others first weigh these by as many
clean ones. fp32, tf32: everything in it. bf16: autocast in the step; the meta pass in fp32 (with TF32), or in bf16.
"""

import contextlib
import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from measure import take_turns
from torch import Tensor, nn

from distseg import weighted_loss
from distseg.distributed.runtime import set_arithmetic
from distseg.meta import PixelReweighter
from distseg.models.unet import UNet
from gpu_stages.findings import Findings, Setting

ROOT = Path(__file__).parents[2]
Weigh = Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]
PRECISIONS = ("fp32", "tf32", "bf16")


def measure(setting: Setting, findings: Findings) -> None:
    """The paper's network and batch; at 512² with fewer rounds, whose steps are 28 times as long."""
    sizes = {16: 2} if setting.tiny else {96: 9, 512: 3}
    network = Namespace(width=4, depth=1, batch=2) if setting.tiny else Namespace(width=64, depth=4, batch=6)
    for size, rounds in sizes.items():
        for precision in PRECISIONS:
            measure_one(setting.device, network, size, precision, rounds, findings)


def measure_one(device: str, network: Namespace, size: int, precision: str, rounds: int, findings: Findings) -> None:
    """The rows of one table: a size and a precision."""
    set_arithmetic(deterministic=False, tf32=precision != "fp32")
    steps = {name: build_step(name, device, network, size, precision) for name in contenders(precision)}
    peaks = {name: peak_mib(step, device) for name, step in steps.items()}
    seconds = take_turns(steps, rounds, device)
    title = f"{size}², {network.batch} + {network.batch} images, U-Net width {network.width}, {precision}"
    for name, times in seconds.items():
        ratios = [own / plain for own, plain in zip(times, seconds["plain"], strict=True)]
        findings.add(
            title,
            {
                "step": name,
                "ms": 1e3 * statistics.median(times),
                "× plain": statistics.median(ratios),
                "× authors": statistics.median(a / b for a, b in zip(seconds["authors"], times, strict=True)),
                "images/s": network.batch / statistics.median(times),
                "MiB": peaks[name],
            },
        )
    if device == "cuda":
        del steps
        torch.cuda.empty_cache()


def contenders(precision: str) -> dict[str, dict[str, str]]:
    """Arguments of the reweighter by the name of a contender; plain and authors have none."""
    found: dict[str, dict[str, str]] = {"plain": {}, "authors": {}}
    if precision != "bf16":
        return found | {name: {"estimator": name} for name in ("forward", "reverse", "finite")}
    return found | {"forward, meta pass fp32": {"estimator": "forward"}}


def build_step(name: str, device: str, network: Namespace, size: int, precision: str) -> Callable[[], None]:
    """One training step, with everything that training holds already allocated."""
    torch.manual_seed(0)
    model = UNet(network.width, network.depth).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.99, fused=True)
    noisy, clean = (draw(network.batch, size, device) for _ in range(2))
    weigh = weigh_by(name, model, contenders(precision)[name], torch.full(noisy[1].shape, 1e-4, device=device))

    def step() -> None:
        in_bf16 = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with in_bf16:
            weights = weigh(noisy, clean)
            loss = weighted_loss(model(noisy[0]), noisy[1], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def weigh_by(name: str, model: nn.Module, options: dict[str, str], uniform: Tensor) -> Weigh:
    if name == "plain":
        return lambda noisy, clean: uniform
    if name == "authors":
        oracle = load_oracle()
        return lambda noisy, clean: oracle.normalised(oracle.double_backward(model, noisy, clean)).detach()
    reweighter = PixelReweighter(model, **options)
    return lambda noisy, clean: reweighter(*noisy, *clean)


def load_oracle() -> ModuleType:
    """The tests' own way to the weights: the authors' procedure, a copy of the network and a virtual step each time."""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "meta" / "oracle.py")
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    return oracle


def draw(count: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) and masks (count, size, size)."""
    images = torch.randn(count, 3, size, size, device=device)
    return images, torch.randint(0, 2, (count, size, size), dtype=torch.uint8, device=device)


def peak_mib(step: Callable[[], None], device: str) -> float | None:
    """What the second step takes above what is held before it; on a GPU alone."""
    if device != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - held) / 2**20
