"""Whether a run that was stopped and resumed ends with the bits of one that never was, with and without determinism.

Six steps of weighted training in one go, or three, a state that goes through a file, and three more with a new network
and optimiser. `train.deterministic` promises the same bits; without it the table says how many differ.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg import PixelReweighter, weighted_loss
from distseg.distributed.runtime import set_arithmetic
from distseg.models.unet import UNet
from gpu_stages.findings import Findings, Setting
from gpu_stages.stage_meta_step import draw

STEPS, STOP = 6, 3


def measure(setting: Setting, findings: Findings) -> None:
    size, batch, width = (16, 2, 4) if setting.tiny else (96, 6, 64)
    differs = []
    for deterministic in (True, False):
        set_arithmetic(deterministic, tf32=False)
        for norm in ("none", "batch"):
            for estimator in ("forward", "reverse"):
                whole = train(setting.device, width, norm, estimator, size, batch)
                halves = train(setting.device, width, norm, estimator, size, batch, stopped=True)
                count = sum(int((whole[name] != halves[name]).sum()) for name in whole)
                elements = sum(value.numel() for value in whole.values())
                row = {"estimator": estimator, "norm": norm, "deterministic": "yes" if deterministic else "no"}
                findings.add("resumed beside never stopped", row | {"differing elements": count, "of": elements})
                if deterministic and count:
                    differs.append(f"{estimator}, {norm}")
    if differs:
        raise SystemExit(f"train.deterministic does not give the same bits: {'; '.join(differs)}")


def train(
    device: str, width: int, norm: str, estimator: str, size: int, batch: int, stopped: bool = False
) -> dict[str, Tensor]:
    """The network after all steps; where `stopped`, with a new one after `STOP` of them."""
    torch.manual_seed(0)
    model, optimizer, reweighter = build(device, width, norm, estimator)
    for step in range(STEPS):
        if stopped and step == STOP:
            state = optimizer_and_network(model, optimizer)
            model, optimizer, reweighter = build(device, width, norm, estimator)
            restore(model, optimizer, state)
        torch.manual_seed(1 + step)  # the images of a step are a function of its number
        (images, masks), clean = draw(batch, size, device), draw(batch, size, device)
        weights = reweighter(images, masks, *clean)
        optimizer.zero_grad()
        weighted_loss(model(images), masks, weights).backward()
        optimizer.step()
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def build(device: str, width: int, norm: str, estimator: str) -> tuple:
    model = UNet(width, 1 if width < 8 else 4, norm).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    return model, optimizer, PixelReweighter(model, estimator=estimator)


def optimizer_and_network(model: UNet, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds, as a file gives it back."""
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    state = dict(model.state_dict()) | {f"momentum.{index}": value for index, value in enumerate(momenta)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.safetensors")
        save_file({name: value.contiguous() for name, value in state.items()}, path)
        return load_file(path)


def restore(model: UNet, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("momentum.")})
    for index, parameter in enumerate(model.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = state[f"momentum.{index}"].to(parameter.device)
