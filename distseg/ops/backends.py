"""Which implementation serves a device: Triton on CUDA, C++ on the CPU, eager torch anywhere.

A backend is a namespace with the ten raw operators: `alignment`, `pixel_loss`, `weighted_loss`,
`weighted_loss_double_backward`, `dice_cross_entropy_sums`, `dice_cross_entropy_gradient`, `positive_part`, `normalise`,
`signed_distance_bins`, `correct_labels`. None stands for eager torch, reference.py, which autograd differentiates by
itself.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_chosen: str | None = None


def backend(device: str | torch.device = "cpu") -> str:
    """What serves tensors on `device`: `triton`, `csrc (AVX512)` or another instruction set, or `reference`."""
    name = backend_name(torch.device(device))
    extension = _extension() if name == "csrc" else None
    return f"csrc ({extension.instruction_set()})" if extension else name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the block every tensor is served by `triton`, `csrc` or `reference`: for comparing them.

    Raises ValueError for another name, RuntimeError for one that is not installed.
    """
    global _chosen
    if name not in ("triton", "csrc", "reference"):
        raise ValueError(f"backend {name!r}: triton, csrc or reference")
    if name == "csrc" and _extension() is None:
        raise RuntimeError("backend csrc: not built; install with a C++ compiler and without DISTSEG_NO_EXT")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def raw_operators(device: torch.device) -> Any:
    """The namespace of raw operators for tensors on `device`; None where eager torch serves."""
    name = backend_name(device)
    if name == "triton":
        return importlib.import_module("distseg.kernels")
    return torch.ops.distseg if name == "csrc" else None


def backend_name(device: torch.device) -> str:
    """What serves tensors on `device`: `triton`, `csrc` or `reference`."""
    if _chosen is not None:
        return _chosen
    if device.type == "cuda" and torch.version.hip is None and _triton_is_there():
        return "triton"
    if device.type == "cpu" and _extension() is not None:
        return "csrc"
    return "reference"


@cache
def _triton_is_there() -> bool:
    if importlib.util.find_spec("triton"):
        return True
    warnings.warn("distseg: triton is not installed; eager operators serve instead, slower", stacklevel=2)
    return False


@cache
def _extension() -> ModuleType | None:
    if os.environ.get("DISTSEG_NO_EXT") == "1":
        why = "DISTSEG_NO_EXT=1"
    else:
        try:
            extension = importlib.import_module("distseg._C")
        except ImportError as error:
            why = f"the extension is not built ({error})"
        else:
            _register_fake_kernels()
            return extension
    warnings.warn(f"distseg: {why}; eager operators serve the CPU instead, slower", stacklevel=2)
    return None


def _register_fake_kernels() -> None:
    """Shapes and dtypes without data, for tracing."""
    fakes: dict[str, Callable[..., Any]] = {
        "alignment": lambda logits, tangents, masks, clamp: (_map_of(logits, masks), _sums_of(masks, 5)),
        "pixel_loss": _map_of,
        "weighted_loss": lambda logits, *rest: (_vector_of(logits), _logits_or_nothing(logits, rest[-1])),
        "weighted_loss_double_backward": lambda logits, masks, *rest: (
            _logits_or_nothing(logits, rest[-1]),
            _map_of(logits, masks),
            _vector_of(logits),
        ),
        "dice_cross_entropy_sums": lambda logits, masks, *_: _sums_of(masks, 2 + 3 * logits.shape[1]),
        "dice_cross_entropy_gradient": lambda logits, *_: _logits_or_nothing(logits, True),
        "positive_part": lambda aligned, masks, cell: (
            torch.empty_like(aligned, memory_format=torch.contiguous_format),
            _sums_of(masks, 5),
        ),
        "normalise": lambda positive, masks, scale, level: torch.empty(
            masks.shape, dtype=scale.dtype, device=masks.device
        ),
        "signed_distance_bins": lambda masks, *_: torch.empty(masks.shape, dtype=torch.uint8, device=masks.device),
        "correct_labels": lambda logits, masks, bins, annotators, tables, calibration: (
            torch.empty(masks.shape, dtype=masks.dtype, device=masks.device),
            torch.empty((*annotators.shape, *tables.shape[1:]), dtype=torch.float64, device=tables.device),
        ),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"distseg::{name}", fake)


def _acc_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _map_of(logits: Tensor, masks: Tensor) -> Tensor:
    return torch.empty(masks.shape, dtype=_acc_dtype(logits), device=logits.device)


def _sums_of(masks: Tensor, count: int) -> Tensor:
    return torch.empty((masks.shape[0], count), dtype=torch.float64, device=masks.device)


def _vector_of(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=_acc_dtype(logits), device=logits.device)


def _logits_or_nothing(logits: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return logits.new_empty(0)
    last = logits.shape[1] > 1 and torch._prims_common.suggest_memory_format(logits) == torch.channels_last
    return torch.empty_like(logits, memory_format=torch.channels_last if last else torch.contiguous_format)
