"""A plain step, a step under each estimator, and one by the authors' procedure, in three precisions and at two sizes.

A plain step is forward, backward and SGD with momentum on the noisy images; the others first weigh these by as many
clean ones. `both streams` learns from the clean images too, which plain training would do as well. fp32, tf32:
everything in it. bf16: autocast in the step; the meta pass in fp32 (with TF32), or in bf16.
"""

import contextlib
import importlib.util
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
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
PRECISIONS = ("fp32", "tf32", "bf16")


def measure(setting: Setting, findings: Findings) -> None:
    """The paper's network and batch; at 512², whose steps are 28 times as long, fewer rounds and the slowest last."""
    if setting.tiny:
        network, tables = Namespace(width=4, depth=1, batch=2), [(16, precision, 2) for precision in PRECISIONS]
    else:
        network = Namespace(width=64, depth=4, batch=6)
        tables = [(96, precision, 9) for precision in PRECISIONS]
        tables += [(512, precision, 2) for precision in reversed(PRECISIONS)]
    for size, precision, rounds in tables:
        measure_one(setting.device, network, size, precision, rounds, findings)


def measure_one(device: str, network: Namespace, size: int, precision: str, rounds: int, findings: Findings) -> None:
    """The rows of one table: a size and a precision."""
    set_arithmetic(deterministic=False, tf32=precision != "fp32")
    steps = {each.name: build_step(each, device, network, size) for each in contenders(precision, size)}
    peaks = {name: peak_mib(step, device) for name, step in steps.items()}
    seconds = take_turns(steps, rounds, device)
    title = f"{size}², {network.batch} + {network.batch} images, U-Net width {network.width}, {precision}"
    for name, times in seconds.items():

        def ratio(other: str, times: list[float] = times) -> float:
            return statistics.median(own / its for own, its in zip(times, seconds[other], strict=True))

        findings.add(
            title,
            {
                "step": name,
                "ms": 1e3 * statistics.median(times),
                "× plain": ratio("plain"),
                "× plain, both streams": ratio("plain, both streams"),
                "authors / it": 1 / ratio("authors"),
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
    learns_clean: bool = False
    """Whether the step learns from the clean images too, half and half."""
    one_pass: bool = False
    """Whether weights and logits come from one pass: PixelReweighter.one_pass."""
    meta_precision: str = "fp32"
    autocast: bool = False
    """Whether the step itself is in bf16."""
    channels_last: bool = False
    """Whether the step's own images are, and with them its features."""
    compiled: bool = False
    """Whether the step's own network is."""


def contenders(precision: str, size: int) -> list[Contender]:
    """`plain` and `authors` among them. One is compiled, which takes long, where a GPU waits for Python most."""
    found = [
        Contender("plain"),
        Contender("plain, both streams", learns_clean=True),
        Contender("authors"),
        Contender("forward", "forward"),
        Contender("forward, both streams", "forward", learns_clean=True, one_pass=True),
        Contender("head", "head"),
        Contender("head, both streams", "head", learns_clean=True, one_pass=True),
    ]
    if precision == "fp32":
        found += [Contender(estimator, estimator) for estimator in ("reverse", "finite")]
    else:
        found.append(Contender("plain, channels last", channels_last=True))
    if precision != "bf16":
        return [*found, Contender("forward, one pass", "forward", one_pass=True)]
    found.append(Contender("forward, meta pass bf16", "forward", meta_precision="bf16"))
    if size < 512:
        found.append(Contender("forward, step compiled", "forward", compiled=True))
    return [replace(each, autocast=True) for each in found]


def build_step(contender: Contender, device: str, network: Namespace, size: int) -> Callable[[], None]:
    """One training step, with everything that training holds already allocated."""
    torch.manual_seed(0)
    model = UNet(network.width, network.depth).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.99, fused=True)
    noisy, clean = (draw(network.batch, size, device) for _ in range(2))
    make_loss = loss_of(contender, model, noisy, clean)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16) if contender.autocast else contextlib.nullcontext():
            loss, gradient = make_loss()
        loss.backward()
        for name, parameter in model.named_parameters() if gradient else ():
            parameter.grad.add_(gradient[name], alpha=0.5)
        optimizer.step()

    return step


def loss_of(
    contender: Contender, model: nn.Module, noisy: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor]
) -> Callable[[], tuple[Tensor, dict[str, Tensor] | None]]:
    """Makes the loss of a step and, where it is known without a pass, the gradient of its clean half."""
    images, masks = noisy
    own = torch.compile(model, dynamic=False) if contender.compiled and images.is_cuda else model
    layout = torch.channels_last if contender.channels_last else torch.contiguous_format

    def by(weights: Tensor, images: Tensor = images, masks: Tensor = masks) -> Tensor:
        return weighted_loss(own(images.contiguous(memory_format=layout)), masks, weights)

    if contender.name == "authors":
        oracle = load_oracle()
        return lambda: (by(oracle.normalised(oracle.double_backward(model, noisy, clean)).detach()), None)
    if contender.estimator is None:
        if contender.learns_clean:
            images, masks = torch.cat([images, clean[0]]), torch.cat([masks, clean[1]])
        uniform = torch.full(masks.shape, 1 / masks.numel(), device=masks.device)
        return lambda: (by(uniform, images, masks), None)
    reweighter = PixelReweighter(model, estimator=contender.estimator, precision=contender.meta_precision)
    if not contender.one_pass:
        return lambda: (by(reweighter(*noisy, *clean)), None)

    def in_one_pass() -> tuple[Tensor, dict[str, Tensor] | None]:
        logits, weights, mean = reweighter.one_pass(*noisy, *clean)
        loss = weighted_loss(logits, masks, weights)
        return (0.5 * loss, mean.gradient) if contender.learns_clean else (loss, None)

    return in_one_pass


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
