"""The DeepSpeed engine: the only module that imports DeepSpeed."""

import copy
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distseg.config.schema import Config
from distseg.errors import UserError

OWNED_KEYS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    | {"optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "zero_allow_untested_optimizer"}
)
"""DeepSpeed keys that follow from the experiment's config and may not be set beside it."""


def shadow_of(model: nn.Module) -> nn.Module:
    """A twin of `model` that shares its parameters and buffers but none of the hooks that DeepSpeed will put on it.

    Make it before `build_engine`. Meta passes run through the twin, so that the engine never sees them.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def build_engine(model: nn.Module, optimizer: Optimizer, config: Config) -> Any:
    """`model` and `optimizer` under DeepSpeed; needs the process group. Returns its engine.

    The engine averages gradients over ranks and, by choice of the caller, never over micro-batches: call
    `engine.backward(loss * world_size, scale_wrt_gas=False)` with losses that sum to the loss of the global batch.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # DeepSpeed would compile this C++ op at every first start on a CPU and fail without a compiler; gloo does its work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
    )
    inner = _inner_optimizer(engine)
    for group in inner.param_groups:
        if group.get("momentum"):
            # From zero, which gives the same first step. torch's fused SGD would leave the buffer uninitialised, and
            # use it afterwards, if the very first step were skipped.
            for parameter in group["params"]:
                inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return engine


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that the experiment's config amounts to."""
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.deepspeed.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # SGD, which the paper uses, is "untested"
        "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": None,
    }
    extra = _read_extra(config)
    return extra | derived | {"zero_optimization": extra.get("zero_optimization", {}) | zero}


class SavedState(Protocol):
    """Optimiser state as it lies on the disk, whatever number of ranks and ZeRO stage wrote it."""

    def slots(self, parameter: str) -> Iterable[str]:
        """What was saved of the parameter of this name: `momentum_buffer`, `exp_avg`, `step`, …"""

    def read(self, parameter: str, slot: str, start: int, count: int) -> Tensor:
        """(count,) elements of a slot from `start` on, of the flattened parameter; `step` is (1,) at 0."""


def optimizer_state(engine: Any, rank: int) -> dict[str, Tensor]:
    """The part of the optimiser's state that this rank is to save, keyed `slot/start/parameter`.

    Each value is the run of a flattened slot that begins at element `start` of the flattened parameter; together, the
    ranks' parts hold every element once. The keys and values say nothing of ranks or stages.
    """
    optimizer, state = _inner_optimizer(engine), {}
    for part in _fragments(engine):
        if part.owner is part.parameter and rank != 0:
            continue  # every rank has the whole of it
        for slot, value in optimizer.state.get(part.owner, {}).items():
            if isinstance(value, Tensor) and value.shape == part.owner.shape:
                run = value.reshape(-1).narrow(0, part.owner_start, part.count)
                state[f"{slot}/{part.start}/{part.name}"] = run
            elif isinstance(value, Tensor) and part.start == 0:
                state[f"{slot}/0/{part.name}"] = value.reshape(1)
        if "step" in part.group and part.start == 0:  # where apex counts
            state[f"step/0/{part.name}"] = torch.tensor([float(part.group["step"])])
    return state


def load_optimizer_state(engine: Any, saved: SavedState) -> None:
    """Put `saved` into an engine whose module already has its parameters, at any ZeRO stage and number of ranks."""
    optimizer = _inner_optimizer(engine)
    for part in _fragments(engine):
        slots = optimizer.state[part.owner]
        for slot in saved.slots(part.name):
            if slot == "step":
                _set_count(part, slots, saved.read(part.name, slot, 0, 1))
                continue
            if slot not in slots:
                slots[slot] = torch.zeros_like(part.owner, memory_format=torch.preserve_format)
            _put(slots[slot], part, saved.read(part.name, slot, part.start, part.count))
        if part.owner is not part.parameter:
            _put(part.owner.detach(), part, part.parameter.detach().reshape(-1).narrow(0, part.start, part.count))


def reduced_gradients(engine: Any) -> list[Tensor]:
    """What this rank's optimiser will step on: after the last backward of a step, before `engine.step`."""
    if partitions := getattr(engine.optimizer, "averaged_gradients", None):
        return [gradient for group in partitions.values() for gradient in group or ()]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def skip_update_if(engine: Any, bad: Tensor) -> None:
    """Make the next optimiser step leave parameters and state alone where `bad` (a scalar on the device) is true.

    torch's fused optimisers read the flag on the device, as they do for torch's GradScaler; apex's is read by the host
    (distseg/optim).
    """
    _inner_optimizer(engine).found_inf = bad.float()


def skipped_by_engine(engine: Any) -> bool:
    """Whether ZeRO left out its last step of itself: it does so on every rank if the gradient's norm is not finite."""
    return bool(getattr(engine.optimizer, "overflow", False))


@dataclass(frozen=True)
class _Fragment:
    """A run of a parameter's elements that this rank's optimiser updates.

    They are elements `start` to `start + count` of the flattened parameter, and begin at `owner_start` in `owner`, the
    tensor that the optimiser knows: the parameter itself at stage 0, a flat fp32 partition under ZeRO.
    """

    name: str
    parameter: nn.Parameter
    start: int
    count: int
    owner: Tensor
    owner_start: int
    group: dict[str, Any]


def _fragments(engine: Any) -> Iterator[_Fragment]:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    if not hasattr(engine.optimizer, "single_partition_of_fp32_groups"):
        for group in _inner_optimizer(engine).param_groups:
            for parameter in group["params"]:
                yield _Fragment(names[parameter], parameter, 0, parameter.numel(), parameter, 0, group)
        return
    zero = engine.optimizer
    groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True)
    for parameters, partition, group in groups:
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Fragment(names[parameter], parameter, here.start, here.numel, partition, there.start, group)


def _put(target: Tensor, part: _Fragment, run: Tensor) -> None:
    if target.numel() == part.count:
        target.copy_(run.view(target.shape))
    else:  # a flat partition
        target.narrow(0, part.owner_start, part.count).copy_(run)


def _set_count(part: _Fragment, slots: dict[str, Any], count: Tensor) -> None:
    if "fused" not in part.group:  # apex keeps one count for a group
        part.group["step"] = int(count)
        return
    # As torch keeps it: beside the parameter where the step runs on the device, on the CPU elsewhere.
    on_device = part.group["fused"] or part.group.get("capturable")
    slots["step"] = count.float().reshape(()).to(part.owner.device if on_device else "cpu")


def _inner_optimizer(engine: Any) -> Optimizer:
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # ZeRO and precision wrappers each hold the next one
        optimizer = optimizer.optimizer
    return optimizer


def _read_extra(config: Config) -> dict[str, Any]:
    path = config.deepspeed.config_file
    if path is None:
        return {}
    try:
        extra = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config_file {path}: cannot be read as JSON: {error}") from None
    if not isinstance(extra, dict):
        raise UserError(f"deepspeed.config_file {path}: must hold a JSON object")
    owned = sorted(OWNED_KEYS & extra.keys())
    if "stage" in extra.get("zero_optimization", {}):
        owned.append("zero_optimization.stage")
    if owned:
        raise UserError(f"deepspeed.config_file {path}: {owned[0]} follows from the experiment's config; remove it")
    return extra
