"""What every contender of benchmarks/peers.py shares: the network, the batches, the weighted step, clock and memory.

A contender is a script of its own, run by the Python of its own environment:

    python NAME.py FOLDER VARIANT times ROUNDS      # seconds of its step and of a plain one, taking turns
    python NAME.py FOLDER VARIANT peak              # bytes at the peak of its step, above what training holds

FOLDER has `network.safetensors`, `batches.safetensors` and `setting.json`. The last line of its output is JSON; the
weights of its first step go to FOLDER/weights-NAME-VARIANT.safetensors. Nothing here imports distseg, which the other
environments lack; the network's class is loaded from its file, which needs torch alone.
"""

import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

UNET = Path(__file__).parents[2] / "distseg" / "models" / "unet.py"
LEARNING_RATE, MOMENTUM = 1e-4, 0.99
"""Of the step that trains, as in the paper."""
VIRTUAL_RATE = 1.0
"""Of the virtual step; it cancels when weights are normalised."""


@dataclass(frozen=True)
class Case:
    """images (B, 3, H, W) float32 and masks (B, H, W) of 0 and 1, noisy and clean; the network and its optimiser."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    build: Callable[[], nn.Module]
    """Another network of the same kind, freshly initialised."""
    images: Tensor
    masks: Tensor
    clean_images: Tensor
    clean_masks: Tensor

    def loss_map(self, logits: Tensor) -> Tensor:
        """(B, H, W) of the noisy images."""
        return loss_map(logits, self.masks)

    def clean_loss(self, logits: Tensor) -> Tensor:
        """The mean over the clean pixels."""
        return loss_map(logits, self.clean_masks).mean()

    def learn(self, weights: Tensor) -> None:
        """The step that trains, on Σ W·ℓ."""
        self.optimizer.zero_grad(set_to_none=False)
        (self.loss_map(self.model(self.images)) * weights).sum().backward()
        self.optimizer.step()


Weigh = Callable[[Case], Tensor]
"""The weights (B, H, W) of a step; nothing of the network may have changed after it."""


def loss_map(logits: Tensor, masks: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits[:, 0], masks.to(logits.dtype), reduction="none")


def normalised(alignment: Tensor) -> Tensor:
    """max(U, 0), which sums to 1."""
    positive = alignment.detach().clamp(min=0)
    return positive / positive.sum().clamp(min=torch.finfo(positive.dtype).tiny)


def run(variants: dict[str, Callable[[Case], Callable[[], Tensor | None]]]) -> None:
    """Of a script's main: `variants` make the step of a case; a step returns the weights that it took, or None."""
    folder, variant, what, *rounds = sys.argv[1:]
    setting = json.loads((Path(folder) / "setting.json").read_text())
    torch.set_num_threads(setting["threads"])
    case = _case(Path(folder), setting)
    step = variants[variant](case)
    if what == "peak":
        print(json.dumps({"peak": _peak(step)}))
        return
    weights = step()
    if weights is not None:
        name = f"weights-{Path(sys.argv[0]).stem}-{variant}.safetensors"
        save_file({"weights": weights.detach().contiguous().clone()}, Path(folder) / name)
    print(json.dumps(_times(step, plain(case), int(rounds[0])) | {"torch": torch.__version__}))


def plain(case: Case) -> Callable[[], None]:
    """The step of a training without weights."""
    uniform = torch.full(case.masks.shape, 1 / case.masks.numel())
    return lambda: case.learn(uniform)


def _case(folder: Path, setting: dict) -> Case:
    spec = importlib.util.spec_from_file_location("unet", UNET)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build() -> nn.Module:
        return module.UNet(setting["width"], setting["depth"], "none")

    model = build()
    model.load_state_dict(load_file(folder / "network.safetensors"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for parameter in model.parameters():  # all that training holds is there before anything is measured
        parameter.grad = torch.zeros_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return Case(model, optimizer, build, **load_file(folder / "batches.safetensors"))


def _times(step: Callable[[], object], beside: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Seconds by round, in random order, because a machine's speed drifts; the first round warms up."""
    contenders = {"own": step, "plain": beside}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    for round_number in range(rounds + 1):
        for name in order.sample(list(contenders), 2):
            started = time.perf_counter()
            contenders[name]()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _peak(step: Callable[[], object]) -> int:
    """Bytes that two steps take above what training holds. MALLOC_MMAP_THRESHOLD_ gives freed tensors back at once."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present resident set
    held = _resident("VmRSS")
    step()
    step()
    return _resident("VmHWM") - held


def _resident(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def weighted(weigh: Weigh) -> Callable[[Case], Callable[[], Tensor]]:
    """The step of a contender that makes weights: it weighs, then learns."""

    def build(case: Case) -> Callable[[], Tensor]:
        def step() -> Tensor:
            weights = weigh(case)
            case.learn(weights)
            return weights

        return step

    return build
