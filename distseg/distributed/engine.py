"""The DeepSpeed engine: the only module that imports DeepSpeed."""

import copy
import itertools
import json
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distseg.config.schema import Config
from distseg.distributed.differentiable import shard_range
from distseg.distributed.shards import Shard, ShardedParameters
from distseg.errors import UserError

OWNED_KEYS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    | {"optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "zero_allow_untested_optimizer"}
)
"""DeepSpeed keys that follow from the experiment's config and may not be set beside it."""
UNSUPPORTED_ZERO_KEYS = frozenset({"offload_param", "zero_hpz_partition_size", "mics_shard_size"})
"""Ways of ZeRO-3 to keep a parameter that are not one shard on each rank's device: the meta pass needs those."""


def shadow_of(model: nn.Module) -> nn.Module:
    """A twin of `model` that shares its parameters and buffers but none of the hooks that DeepSpeed will put on it.

    Make it before `build_engine`. Meta passes run through the twin, so that the engine never sees them.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def sharded_parameters(shadow: nn.Module) -> ShardedParameters:
    """The shadow's parameters as ZeRO-3 holds them, once `build_engine` has cut those of its model."""

    def read() -> dict[str, Shard]:
        return {name: _own_shard(parameter) for name, parameter in shadow.named_parameters()}

    return ShardedParameters(read)


def _own_shard(parameter: nn.Parameter) -> Shard:
    own = shard_range(parameter.ds_numel, dist.get_rank(), dist.get_world_size())
    # What DeepSpeed holds beyond the parameter's elements, to make shards equal, is never initialised.
    return Shard(parameter.ds_tensor[: len(own)], parameter.ds_shape, parameter.requires_grad)


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
    if config.deepspeed.zero_stage == 3:
        # DeepSpeed would put a linear layer without forward mode in the place of torch's, for the whole process.
        zero["memory_efficient_linear"] = False
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
    zero = extra.get("zero_optimization", {})
    owned += [f"zero_optimization.{key}" for key in ("stage", "memory_efficient_linear") if key in zero]
    if owned:
        raise UserError(f"deepspeed.config_file {path}: {owned[0]} follows from the experiment's config; remove it")
    if unsupported := sorted(UNSUPPORTED_ZERO_KEYS & zero.keys()):
        key = f"zero_optimization.{unsupported[0]}"
        raise UserError(f"deepspeed.config_file {path}: {key} is not supported by the meta pass; remove it")
    return extra
