"""A plain step, a step under each estimator, and one by the authors' procedure, in three precisions and at two sizes.

A plain step is forward, backward and SGD with momentum on the noisy images; the others first weigh these by as many
clean ones. fp32, tf32: everything in it. bf16: autocast in the step; the meta pass in fp32 (with TF32), or in bf16.
"""

import contextlib
import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
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
    steps = {each.name: build_step(each, device, network, size) for each in contenders(precision, size)}
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
                "authors / it": statistics.median(a / b for a, b in zip(seconds["authors"], times, strict=True)),
                "images/s": network.batch / statistics.median(times),
                "MiB": peaks[name],
            },
        )
    if device == "cuda":
        del steps
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Contender:
    name: str
    estimator: str | None = None
    """Of the weights; None: all the same."""
    meta_precision: str = "fp32"
    autocast: bool = False
    """Whether the step itself is in bf16."""
    channels_last: bool = False
    """Whether the step's own images are, and with them its features."""
    compiled: bool = False
    """Whether the step's own network is."""


def contenders(precision: str, size: int) -> list[Contender]:
    """`plain` and `authors` among them. One is compiled, which takes long, where a GPU waits for Python most."""
    autocast = precision == "bf16"
    found = [Contender(name, autocast=autocast) for name in ("plain", "authors")]
    for estimator in ("forward", "head") if autocast else ("forward", "reverse", "finite", "head"):
        found.append(Contender(estimator, estimator, autocast=autocast))
    if autocast:
        found.append(Contender("forward, meta pass bf16", "forward", "bf16", autocast=True))
        if size < 512:
            found.append(Contender("forward, step compiled", "forward", autocast=True, compiled=True))
    if precision != "fp32":
        found.append(Contender("plain, channels last", autocast=autocast, channels_last=True))
    return found


def build_step(contender: Contender, device: str, network: Namespace, size: int) -> Callable[[], None]:
    """One training step, with everything that training holds already allocated."""
    torch.manual_seed(0)
    model = UNet(network.width, network.depth).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.99, fused=True)
    noisy, clean = (draw(network.batch, size, device) for _ in range(2))
    weigh = weigh_by(contender, model, torch.full(noisy[1].shape, 1e-4, device=device))
    own = torch.compile(model, dynamic=False) if contender.compiled and device == "cuda" else model
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format

    def step() -> None:
        in_bf16 = torch.autocast(device, torch.bfloat16) if contender.autocast else contextlib.nullcontext()
        with in_bf16:
            weights = weigh(noisy, clean)
            loss = weighted_loss(own(noisy[0].contiguous(memory_format=layout)), noisy[1], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def weigh_by(contender: Contender, model: nn.Module, uniform: Tensor) -> Weigh:
    if contender.name == "authors":
        oracle = load_oracle()
        return lambda noisy, clean: oracle.normalised(oracle.double_backward(model, noisy, clean)).detach()
    if contender.estimator is None:
        return lambda noisy, clean: uniform
    reweighter = PixelReweighter(model, estimator=contender.estimator, precision=contender.meta_precision)
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
