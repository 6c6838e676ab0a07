"""What correcting labels adds to a step: distances to the drawn contours, labels, and what the model learns from."""

import statistics

import torch
from measure import take_turns

from distseg.methods.labels.corrected import Corrected
from distseg.methods.part import HeldOut
from gpu_stages.findings import Findings, Setting


def measure(setting: Setting, findings: Findings) -> None:
    """Drawn discs, two classes."""
    device = torch.device(setting.device)
    for size in (16,) if setting.tiny else (96, 512):
        model = Corrected(device, classes=2, clean_count=6, least_gain=-1, decide_after=1)
        masks = discs(6, size).to(device)
        logits = torch.randn(6, 1, size, size, device=device)
        held_out = HeldOut(logits, masks)
        bins = model.bins(masks)
        parts = {
            "distances": lambda masks=masks, model=model: model.bins(masks),
            "labels": lambda model=model, z=logits, y=masks, b=bins: model.labels(z, y, b),
            "evidence": lambda model=model, z=logits, y=masks, b=bins, h=held_out: model.evidence(z, y, b, h),
        }
        seconds = take_turns(parts, 3 if setting.tiny else 20, setting.device)
        for name, times in seconds.items():
            findings.add(f"6 images of {size}²", {"part": name, "ms": 1e3 * statistics.median(times)})


def discs(count: int, size: int) -> torch.Tensor:
    """(count, size, size) uint8, a disc in each."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radii = torch.linspace(0.15, 0.4, count) * size
    return (((y - size / 2) ** 2 + (x - size / 2) ** 2)[None] < radii[:, None, None] ** 2).to(torch.uint8)
