"""The DeepSpeed engine: the only module that imports DeepSpeed."""

import copy
import itertools
import json
import logging
import os
from typing import Any

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


def optimizer_state(engine: Any) -> dict[str, Tensor]:
    """This rank's optimiser state by name, with the fp32 parameters that it updates (ZeRO 1, 2: a partition)."""
    state = {}
    for name, parameter, slots in _optimizer_slots(engine):
        state[f"{name}.parameter"] = parameter.detach()
        state |= {f"{name}.{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    return state


def load_optimizer_state(engine: Any, state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`, for the same ZeRO stage and number of ranks."""
    for name, parameter, slots in _optimizer_slots(engine):
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        with torch.no_grad():
            parameter.copy_(own.pop("parameter"))
        for slot, value in own.items():
            # Counters of non-capturable optimisers stay on the CPU, as torch keeps them.
            slots[slot] = value.clone() if slot == "step" and not value.is_cuda else value.to(parameter.device).clone()


def _optimizer_slots(engine: Any):
    """(name, parameter, its state) for everything that the innermost torch optimiser updates, in a fixed order."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # ZeRO and precision wrappers each hold the next one
        optimizer = optimizer.optimizer
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield f"{group_index}.{index}", parameter, optimizer.state[parameter]


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
