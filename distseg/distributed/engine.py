"""The DeepSpeed engine: the only module that imports DeepSpeed."""

import copy
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.differentiable import gather, shard_range
from distseg.distributed.shards import Shard, ShardedParameters
from distseg.errors import UserError
from distseg.files import read_regular
from distseg.text import for_terminal

OWNED_KEYS = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    | {"optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast", "zero_allow_untested_optimizer"}
)
"""DeepSpeed keys that follow from the experiment's config and may not be set beside it."""
_LARGEST_OVERLAY = 2**20
"""Of a file of DeepSpeed's keys, bytes."""
UNSUPPORTED_ZERO_KEYS = frozenset({"offload_param", "zero_hpz_partition_size", "mics_shard_size"})
"""Ways of ZeRO-3 to keep a parameter that are not one shard on each rank's device: the meta pass needs those."""


def shadow_of(model: nn.Module) -> nn.Module:
    """A twin of `model` that shares its parameters and buffers but none of the hooks that DeepSpeed will put on it.

    Make it before `build_engine`. Meta passes run through the twin, so that the engine never sees them. It has the
    model's buffers at any time, also those that the model's modules assign anew.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module, of_twin in zip(model.modules(), twin.modules(), strict=True):
        of_twin._buffers = module._buffers
    return twin


def sharded_parameters(shadow: nn.Module) -> ShardedParameters:
    """The shadow's parameters as ZeRO-3 holds them, once `build_engine` has cut those of its model."""

    def read() -> dict[str, Shard]:
        return {name: _own_shard(parameter) for name, parameter in shadow.named_parameters()}

    return ShardedParameters(read)


def _own_shard(parameter: Any) -> Shard:
    own = shard_range(parameter.ds_numel, dist.get_rank(), dist.get_world_size())
    # What DeepSpeed holds beyond the parameter's elements, to make shards equal, is never initialised.
    return Shard(parameter.ds_tensor[: len(own)], parameter.ds_shape, parameter.requires_grad)


def import_deepspeed() -> Any:
    """The module `deepspeed`, quiet, and without what it would load or compile that is not used here."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    with _without_import_of("mlflow"):  # for DeepSpeed's autotuner; it takes longer than all the rest
        import deepspeed
    from deepspeed.ops import __compatible_ops__

    # DeepSpeed would compile this C++ op at every first start on a CPU and fail without a compiler; gloo does its work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls what torch 2.13 has renamed, and torch would say so at every step under ZeRO.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def build_engine(
    model: nn.Module,
    optimizer: Optimizer,
    deepspeed_section: DeepSpeedConfig,
    *,
    batch_size: int,
    accumulation: int,
    precision: Literal["fp32", "bf16"],
) -> Any:
    """`model` and `optimizer` under DeepSpeed; needs the process group. Returns its engine.

    batch_size: images of a micro-batch on this rank; accumulation: micro-batches of a step; precision: `bf16` is torch
    autocast in the engine's forward pass, around parameters and gradients in float32.

    The engine averages gradients over ranks and, by choice of the caller, never over micro-batches: call
    `engine.backward(loss * world_size, scale_wrt_gas=False)` with losses that sum to the loss of the global batch.
    """
    deepspeed = import_deepspeed()
    told = deepspeed_config(deepspeed_section, batch_size, accumulation, precision)
    deepspeed.init_distributed(dist_init_required=False)
    with _blamed_on(deepspeed_section.config_file, deepspeed.runtime.config.DeepSpeedConfigError):
        if deepspeed_section.zero_stage == 3:
            # DeepSpeed 0.19.8 would cut the parameters itself, by `dtype or float16 if fp16 is supported else
            # bfloat16`: on a device with fp16, a GPU or a processor with AVX512-FP16, it passes the model's dtype on
            # and refuses float64. The dtype serves tensors that are made inside the context, which is not entered here.
            deepspeed.zero.Init(module=model, config_dict_or_path=told, dtype=torch.float32)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=told, dist_init_required=False)
    _keep_shards_once(engine.optimizer)
    state = _inner_optimizer(engine).state
    for part in _fragments(engine):
        if part.group.get("momentum"):
            # From zero, which gives the same first step. torch's fused SGD would leave the buffer uninitialised, and
            # use it afterwards, if the very first step were skipped.
            state[part.owner]["momentum_buffer"] = torch.zeros_like(part.owner)
    return engine


@contextmanager
def _blamed_on(overlay: Path | None, refusal: type[Exception]) -> Iterator[None]:
    """What DeepSpeed says against its configuration as one line that names the file, where there is one."""
    odd = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)
    try:
        yield
    except (*odd, refusal) as error:
        if overlay is None:
            raise
        said = for_terminal(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UserError(f"deepspeed.config_file {overlay}: DeepSpeed refuses it: {said}") from error


@contextmanager
def _without_import_of(name: str) -> Iterator[None]:
    """Within, `import name` fails, as where it is not installed, unless it has been imported before."""
    absent = sys.modules.setdefault(name, None) is None  # type: ignore[arg-type]  # what Python takes for absent
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


def deepspeed_config(
    section: DeepSpeedConfig, batch_size: int, accumulation: int, precision: Literal["fp32", "bf16"]
) -> dict[str, Any]:
    """The DeepSpeed JSON that these settings amount to. Raises UserError for an overlay that cannot be merged."""
    zero: dict[str, Any] = {"stage": section.zero_stage}
    if section.zero_stage == 3:
        # DeepSpeed would put a linear layer without forward mode in the place of torch's, for the whole process.
        zero["memory_efficient_linear"] = False
    # Under ZeRO, DeepSpeed would reduce the gradients of `lower_precision_safe_modules` in bfloat16, by default those
    # of linear layers and convolutions: off by 0.2-0.6 %, and not what stage 0 does.
    autocast = {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": section.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # SGD, which the paper uses, is "untested"
        "torch_autocast": autocast,
        "steps_per_print": None,
    }
    extra = _read_extra(section.config_file)
    return extra | derived | {"zero_optimization": extra.get("zero_optimization", {}) | zero}


def module_state(engine: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, whole, on rank 0. Every rank calls it: ZeRO-3 gathers them one by one."""
    state = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if _is_sharded(value):
            shard = _own_shard(value)
            value = gather(shard.elements, shard.shape).cpu()
        if dist.get_rank() == 0:
            state[name] = value.detach()
    return state


def load_module_state(engine: Any, state: dict[str, Tensor]) -> None:
    """The inverse of `module_state`, from `state` on every rank. Raises RuntimeError for that of another network."""
    module = engine.module
    parameters = {name: value for name, value in module.state_dict(keep_vars=True).items() if _is_sharded(value)}
    for name, parameter in parameters.items():
        if name not in state or state[name].shape != parameter.ds_shape:
            raise RuntimeError(f"{name} is missing, or is not {tuple(parameter.ds_shape)}")
        own = shard_range(parameter.ds_numel, dist.get_rank(), dist.get_world_size())
        _own_shard(parameter).elements.copy_(state[name].reshape(-1)[own.start : own.stop])
        if parameter.numel():  # a small one, of which every rank keeps the whole
            parameter.detach().copy_(state[name])
    rest = module.load_state_dict({k: v for k, v in state.items() if k not in parameters}, strict=False)
    if rest.unexpected_keys or set(rest.missing_keys) != parameters.keys():
        raise RuntimeError(f"missing {rest.missing_keys}, unexpected {rest.unexpected_keys}")


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
        if part.replicated and rank != 0:
            continue
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
        if not part.replicated:
            _put(part.owner.detach(), part, part.elements)


@contextmanager
def gradients_put_away(engine: Any) -> Iterator[None]:
    """Between steps: within, ZeRO-3's buffer for gradients takes no memory. A meta pass has room for g instead."""
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is None or engine.optimizer.offload_optimizer:
        yield
        return
    storage = buffer.untyped_storage()  # DeepSpeed keeps views of it
    size = storage.nbytes()
    storage.resize_(0)
    try:
        yield
    finally:
        storage.resize_(size)
        buffer.zero_()  # a step copies every gradient into its place, and looks at what lies between them


def reduced_gradients(engine: Any) -> list[Tensor]:
    """What this rank's optimiser will step on: after the last backward of a step, before `engine.step`."""
    if partitions := getattr(engine.optimizer, "averaged_gradients", None):
        return [gradient for group in partitions.values() for gradient in group or ()]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def can_add_gradients(engine: Any) -> bool:
    """Whether `add_gradient` works: not where the host keeps the optimiser's state, and has the gradients already."""
    return not any(getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer"))


def add_gradient(engine: Any, gradient: Mapping[str, Tensor], factor: float) -> None:
    """Add factor · gradient, the same on every rank, to what `reduced_gradients` is about to return.

    By name of the trained parameters, as the meta pass has them: whole, or this rank's shards under ZeRO-3. After the
    last backward of a step, so that it counts where the norm is clipped.
    """
    places = _gradient_places(engine)
    for part in _fragments(engine):
        own = gradient[part.name].reshape(-1)
        own = own if own.numel() == part.count else own[part.start : part.start + part.count]
        if part.replicated:
            if part.owner.grad is None:  # in the noisy images' pass the parameter had no part
                part.owner.grad = torch.zeros_like(part.owner)
            place = part.owner.grad
        else:
            place = places[id(part.owner), part.owner_start]
        if place.numel() != part.count:  # a shard that is made as long as those of other ranks
            place = place.view(-1)[: part.count]
        place.add_(own.view(place.shape), alpha=factor)


def _gradient_places(engine: Any) -> dict[tuple[int, int], Tensor]:
    """Under ZeRO, the tensors that hold a partition's gradient, by the partition and the element where each begins."""
    places, zero = {}, engine.optimizer
    stages_1_and_2 = getattr(zero, "single_partition_of_fp32_groups", [])
    partitions: list[Tensor] = getattr(zero, "fp32_partitioned_groups_flat", stages_1_and_2)
    for group, partition in enumerate(partitions):
        start = 0
        for tensor in zero.averaged_gradients[group] or ():
            places[id(partition), start] = tensor
            start += tensor.numel()
    return places


def skip_update_if(engine: Any, bad: Tensor) -> None:
    """Make the next optimiser step leave parameters and state alone where `bad` (a scalar on the device) is true.

    torch's fused optimisers read the flag on the device, as they do for torch's GradScaler; apex's is read by the host
    (distseg/optim).
    """
    optimizer: Any = _inner_optimizer(engine)
    optimizer.found_inf = bad.float()


def skipped_by_engine(engine: Any) -> bool:
    """Whether ZeRO skipped its last step by itself: it does so on every rank if the gradient's norm is not finite."""
    return bool(getattr(engine.optimizer, "overflow", False))


@dataclass(frozen=True)
class _Fragment:
    """A run of a parameter's elements that this rank's optimiser updates.

    They are elements `start` to `start + count` of the flattened parameter, and begin at `owner_start` in `owner`, the
    tensor that the optimiser knows: the parameter itself at stage 0, a flat fp32 partition under ZeRO.
    """

    name: str
    start: int
    elements: Tensor
    """(count,) as the module has them."""
    owner: Tensor
    owner_start: int
    group: dict[str, Any]
    replicated: bool = False
    """Whether every rank has the whole of it, the parameter itself."""

    @property
    def count(self) -> int:
        return self.elements.numel()


def _keep_shards_once(zero: Any) -> None:
    """Let ZeRO-3's optimiser update the parameters' own shards, where both are of one dtype and on one device.

    DeepSpeed means to, but compares a torch.device with a name, which never match, and keeps a second copy of all.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat") and not zero.offload_optimizer:  # stage 3
        flats = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        for shards, masters in flats:
            if shards.dtype == masters.dtype and shards.device == masters.device:
                masters.data = shards


def _fragments(engine: Any) -> Iterator[_Fragment]:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for parameter in (p for p in names if p.requires_grad):
            sub_group, owner_start, _ = zero.grad_position[zero.get_param_id(parameter)]
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]
            own = shard_range(parameter.ds_numel, dist.get_rank(), dist.get_world_size())
            if own:
                elements, owner = _own_shard(parameter).elements, zero.fp32_partitioned_groups_flat[sub_group]
                yield _Fragment(names[parameter], own.start, elements, owner, owner_start, group)
    elif hasattr(zero, "single_partition_of_fp32_groups"):  # stages 1 and 2
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.optimizer.param_groups, strict=True)
        for parameters, partition, group in groups:
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    elements = parameter.detach().reshape(-1).narrow(0, here.start, here.numel)
                    yield _Fragment(names[parameter], here.start, elements, partition, there.start, group)
    else:
        for group in _inner_optimizer(engine).param_groups:
            for parameter in group["params"]:
                elements = parameter.detach().reshape(-1)
                yield _Fragment(names[parameter], 0, elements, parameter, 0, group, replicated=True)


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


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def _inner_optimizer(engine: Any) -> Optimizer:
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):  # ZeRO and precision wrappers each hold the next one
        optimizer = optimizer.optimizer
    return optimizer


def _read_extra(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        extra = json.loads(read_regular(path, _LARGEST_OVERLAY))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed.config_file {path}: cannot be read as JSON: {for_terminal(str(error))}") from None
    if not (isinstance(extra, dict) and isinstance(extra.get("zero_optimization", {}), dict)):
        raise UserError(f"deepspeed.config_file {path}: it, and its zero_optimization, must be JSON objects")
    owned = sorted(OWNED_KEYS & extra.keys())
    zero = extra.get("zero_optimization", {})
    owned += [f"zero_optimization.{key}" for key in ("stage", "memory_efficient_linear") if key in zero]
    if owned:
        raise UserError(f"deepspeed.config_file {path}: {owned[0]} follows from the experiment's config; remove it")
    if unsupported := sorted(UNSUPPORTED_ZERO_KEYS & zero.keys()):
        key = f"zero_optimization.{unsupported[0]}"
        raise UserError(f"deepspeed.config_file {path}: {key} is not supported by the meta pass; remove it")
    return extra
