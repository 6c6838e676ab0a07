"""Checkpoints: folders that are absent or complete; tensors as safetensors, the rest as JSON, nothing pickled.

    checkpoints/step_00000120/model.safetensors       parameters (fp32) and buffers, by name
                              method.safetensors      what the method has learned, for most of them nothing
                              rank_00000.safetensors  this rank's part of the optimiser state, and its RNG streams
                              state.json              progress, ranks, images a step
                              SHA256SUMS              of every other file, as `sha256sum --check` reads it
    checkpoints/last, best                            the name of a folder; `last` may be set back by hand

Every rank writes the part of the optimiser state that it owns, as runs of flattened parameters under the parameters'
names: nothing is gathered, and any number of ranks at any ZeRO stage can read it again. Schedule and data position
are functions of the step. DeepSpeed's own checkpoints serve neither purpose: reading one unpickles it, and none can be
read on another number of ranks with its buffers and the state of SGD.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distseg.config.load import load_config
from distseg.config.schema import Config
from distseg.distributed.collectives import decided_by_main, gather_bytes
from distseg.distributed.engine import load_module_state, load_optimizer_state, module_state, optimizer_state
from distseg.distributed.ranks import ShardSpec
from distseg.distributed.runtime import Runtime
from distseg.errors import BadFileError, UserError
from distseg.files import flush, open_regular, read_regular, remove_parts, write_atomically
from distseg.methods.method import Method
from distseg.models.registry import build_model
from distseg.run_folder import RunFolder

logger = logging.getLogger(__name__)

FORMAT = 3
STATE, SUMS = "state.json", "SHA256SUMS"
SHARED_FILES = ("model.safetensors", "method.safetensors", STATE)
"""Of each checkpoint, beside SUMS and one file a rank."""
_LARGEST_TEXT = 2**24
"""Bytes that are read of a text file: SHA256SUMS has about 100 a rank."""

Natural = Annotated[StrictInt, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepSize(_Strict):
    """Images that one step takes of each stream, over micro-batches and ranks. A run keeps them to its end."""

    noisy: Natural
    clean: Natural

    @classmethod
    def of(cls, config: Config, shard: ShardSpec) -> "StepSize":
        per_image = config.train.accumulation * shard.world_size
        return cls(noisy=config.train.batch_size * per_image, clean=config.train.clean_batch_size * per_image)


class CheckpointState(_Strict):
    """What state.json holds."""

    format: StrictInt
    world_size: Annotated[StrictInt, Field(ge=1)]
    zero_stage: Natural
    images_per_step: StepSize
    images_seen: Natural
    progress: dict[str, StrictBool | StrictInt | StrictFloat | StrictStr | None]


def save_checkpoint(
    folder: Path,
    engine: Any,
    method: Method,
    progress: dict[str, Any],
    config: Config,
    runtime: Runtime,
    best: bool,
) -> bool:
    """Write the checkpoint of `progress["step"]`; every rank calls it. Whether it is there now, the same on every rank.

    False means that a file could not be written, for instance on a full disk: one line on stderr has said which, and
    the checkpoints before it are as they were. Otherwise `train.keep_checkpoints` of them are kept, and the best.

    The pointer moves once the folder is complete and on the disk: a crash leaves the previous checkpoint in force.
    """
    step, shard = progress["step"], runtime.shard
    target = folder / f"step_{step:08d}"
    aside = target.with_suffix(".part")
    digests: dict[str, str] = {}

    def start() -> None:
        if shard.rank == 0:
            folder.mkdir(exist_ok=True)  # not its parent: a run folder that is gone is not made again
            remove_parts(folder)
            aside.mkdir()

    def write() -> None:
        state = module_state(engine)  # first: every rank takes part, also one whose disk then fails
        name = f"rank_{shard.rank:05d}.safetensors"
        digests[name] = _write(aside / name, optimizer_state(engine, shard.rank) | _rng_streams())
        if shard.rank == 0:
            digests["model.safetensors"] = _write(aside / "model.safetensors", state)
            digests["method.safetensors"] = _write(aside / "method.safetensors", method.state_dict())

    def commit() -> None:
        if shard.rank == 0:
            size = StepSize.of(config, shard)
            state = CheckpointState(
                format=FORMAT,
                world_size=shard.world_size,
                zero_stage=config.deepspeed.zero_stage,
                images_per_step=size,
                images_seen=step * size.noisy,
                progress=progress,
            )
            content = json.dumps(state.model_dump(), indent=2).encode()
            digests[STATE] = hashlib.sha256(content).hexdigest()
            write_atomically(aside / STATE, content)
            write_atomically(aside / SUMS, _sums_text(digests))
            flush(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.replace(target)
            flush(folder)
            _set_pointer(folder / "last", target.name)
            if best:
                _set_pointer(folder / "best", target.name)
            flush(folder)

    written = _on_every_rank(start, runtime, aside) and _on_every_rank(write, runtime, aside)
    if written:
        for part in gather_bytes(json.dumps(digests).encode(), runtime.device):
            digests |= json.loads(part)
        written = _on_every_rank(commit, runtime, aside)
    if shard.rank == 0:
        if written:
            _remove_old(folder, step, config.train.keep_checkpoints)
        else:
            shutil.rmtree(aside, ignore_errors=True)
    return written


def load_checkpoint(
    folder: Path, engine: Any, method: Method, config: Config, runtime: Runtime
) -> dict[str, Any] | None:
    """Put the last whole checkpoint into `engine` and the RNG streams, and return its progress; None without any.

    A damaged checkpoint is named in a line on stderr and passed over. Raises UserError where every one is damaged, or
    where a step of this run would not take as many images as one of the run that wrote it.
    """
    shard = runtime.shard

    def choose() -> int:
        checkpoint = find_checkpoint(folder)
        if checkpoint is None:
            return -1
        _check_step_size(checkpoint, config, shard)
        return _step_of(checkpoint)

    step = decided_by_main(choose, runtime.device)
    if step < 0:
        return None
    checkpoint = folder / f"step_{step:08d}"
    try:
        return restore(checkpoint, engine, method, runtime)
    except (OSError, ValueError, SafetensorError) as error:  # on rank 0 it is whole
        raise BadFileError(
            f"checkpoint {checkpoint}: rank {shard.rank} cannot read it ({_one_line(error)}); "
            "put the run's folder where every rank sees the same files"
        ) from None


def restore(checkpoint: Path, engine: Any, method: Method, runtime: Runtime) -> dict[str, Any]:
    """Put a whole checkpoint into `engine`, `method` and the RNG streams, and return its progress.

    The method gets its tensors on `runtime.device`; those of the engine go where the engine keeps them. Raises
    UserError for that of another network or a method that learns other things, OSError or ValueError for a file that
    cannot be read.
    """
    state = _read_state(checkpoint)
    try:
        load_module_state(engine, load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint}: is of another network: {_one_line(error)}") from None
    learned = load_file(checkpoint / "method.safetensors")
    if _shapes(learned) != _shapes(method.state_dict()):
        raise UserError(
            f"checkpoint {checkpoint}: was written by a version whose method learns other things; start a new run with "
            "another name="
        )
    method.load_state_dict({name: tensor.to(runtime.device) for name, tensor in learned.items()})
    with ExitStack() as stack:
        parts = [
            stack.enter_context(safe_open(checkpoint / f"rank_{rank:05d}.safetensors", framework="pt"))
            for rank in range(state.world_size)
        ]
        load_optimizer_state(engine, _SavedParts(parts))
        # A rank that the run did not have takes the streams of one that it had. Streams are restored from the host.
        streams = parts[runtime.shard.rank % len(parts)]
        torch.set_rng_state(streams.get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in streams.keys():  # noqa: SIM118  (a file, not a mapping)
            torch.cuda.set_rng_state(streams.get_tensor("rng.cuda"))
    return dict(state.progress)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, at or before the one that `last` names; None where there has never been one.

    Each damaged one on the way is named in a line on stderr. Raises UserError where none is whole.
    """
    candidates = _newest_first(folder)
    if named := _pointed_at(folder / "last"):
        candidates = [path for path in candidates if _step_of(path) <= _step_of(named)]
        if named not in candidates:
            candidates.insert(0, named)
    for index, checkpoint in enumerate(candidates):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        before = ", trying the one before it" if index + 1 < len(candidates) else ""
        logger.warning("checkpoint %s is damaged: %s%s", checkpoint, damage, before)
    if candidates:
        raise UserError(
            f"{folder}: none of its checkpoints is whole; put one back, or choose another name= for a new run"
        )
    return None


def chosen_checkpoint(run: Path, which: str = "last") -> Path:
    """The checkpoint of a run that `which` names: last (the newest whole one), best, or the number of a step.

    Raises UserError where there is none, and where one that was asked for by name is damaged.
    """
    folder = RunFolder(run).checkpoints
    if which == "last":
        checkpoint = find_checkpoint(folder)
    elif which == "best":
        checkpoint = _pointed_at(folder / "best")
    elif re.fullmatch(r"[0-9]{1,18}", which, re.ASCII):
        checkpoint = folder / f"step_{int(which):08d}"
    else:
        raise UserError(f"checkpoint {which}: must be last, best or the number of a step")
    if checkpoint is None or not checkpoint.is_dir():
        kept = ", ".join(str(_step_of(path)) for path in reversed(_newest_first(folder)))
        none = "it has none yet" if run.is_dir() else "there is no such folder"
        there = f"it has those of the steps {kept}" if kept else none
        raise UserError(f"{run}: has no checkpoint {which}; {there}")
    damage = _damage(checkpoint) if which != "last" else None
    if damage is not None:
        raise UserError(f"{checkpoint}: is damaged: {damage}; choose another checkpoint")
    return checkpoint


def digest_of_network(checkpoint: Path) -> str:
    """The SHA-256 of a whole checkpoint's network."""
    return _read_sums(checkpoint / SUMS)["model.safetensors"]


def load_network(
    run: Path, allow_import: bool = False, checkpoint: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Config, nn.Module]:
    """The config of a run, with `overrides`, and its network, on the CPU, with the parameters of a whole checkpoint.

    That is its last one, unless `checkpoint` is another of its own. A run of an imported network needs `allow_import`:
    its config names code, and the folder may be someone else's.
    """
    folder = RunFolder(run)
    config = load_config(folder.config, [*overrides])
    try:
        network = build_model(config.model, allow_import, config.data.class_count)
    except UserError as error:
        raise UserError(f"{folder.config}: {error}") from None
    checkpoint = checkpoint or find_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet")
    try:
        network.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: is of another network: {_one_line(error)}") from None
    return config, network


class _SavedParts:
    """distributed.engine.SavedState over the ranks' files, of which it reads no more than it is asked for."""

    def __init__(self, files: Iterable[Any]) -> None:
        self._runs: dict[str, dict[str, list[tuple[int, int, Any]]]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118  (a file, not a mapping)
                if key.startswith("rng."):
                    continue
                slot, start, parameter = key.split("/", 2)
                lazy = file.get_slice(key)
                run = (int(start), int(start) + lazy.get_shape()[0], lazy)
                self._runs.setdefault(parameter, {}).setdefault(slot, []).append(run)

    def slots(self, parameter: str) -> Iterator[str]:
        return iter(self._runs.get(parameter, {}))

    def read(self, parameter: str, slot: str, start: int, count: int) -> Tensor:
        pieces, reached = [], start
        for first, end, lazy in sorted(self._runs[parameter][slot], key=lambda run: run[0]):
            until = min(end, start + count)
            if first <= reached < until:
                pieces.append(lazy[reached - first : until - first])
                reached = until
        if reached < start + count:
            raise UserError(f"checkpoint: {slot} of {parameter} is not complete; it was saved from another network")
        return torch.cat(pieces)


def _check_step_size(checkpoint: Path, config: Config, shard: ShardSpec) -> None:
    before = _read_state(checkpoint).images_per_step.model_dump()
    now = StepSize.of(config, shard).model_dump()
    splits = config.train.accumulation * shard.world_size
    for stream, key in (("noisy", "train.batch_size"), ("clean", "train.clean_batch_size")):
        if now[stream] == before[stream]:
            continue
        size, rest = divmod(before[stream], splits)
        mend = f"set {key}={size}"
        if rest:
            mend = f"set {key}, train.accumulation and the ranks so that their product is {before[stream]}"
        raise UserError(
            f"--resume: a step of this run takes {before[stream]} images, and {key} {now[stream] // splits} × "
            f"train.accumulation {config.train.accumulation} × {shard.world_size} ranks makes {now[stream]}; {mend}"
        )


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint on the disk; None if nothing is."""
    if checkpoint.is_dir() and not (checkpoint / SUMS).exists():
        return f"it has no {SUMS}; it is not complete, or an earlier version of distseg wrote it"
    try:
        digests = _read_sums(checkpoint / SUMS)
        for name, expected in digests.items():
            if _digest(checkpoint / name) != expected:
                return f"{name} has another SHA-256 than {SUMS} says"
        state = _read_state(checkpoint)
        if len(digests) != state.world_size + len(SHARED_FILES):
            return f"{SUMS} does not list the files of {state.world_size} ranks"
        ranks = {f"rank_{rank:05d}.safetensors" for rank in range(state.world_size)}
        if digests.keys() != ranks | set(SHARED_FILES):
            return f"{SUMS} does not list its files"
        if state.progress.get("step") != _step_of(checkpoint):
            return f"{STATE} is of another step"
    except (OSError, ValueError) as error:
        return _one_line(error)
    return None


def _read_state(checkpoint: Path) -> CheckpointState:
    """Raises OSError where state.json cannot be read, ValueError where it is not what this version writes."""
    content = read_regular(checkpoint / STATE, _LARGEST_TEXT)
    try:
        values = json.loads(content)
        if isinstance(values, dict) and values.get("format") != FORMAT:
            raise ValueError(f"{STATE} is of format {values.get('format')!r}, not {FORMAT}")
        return CheckpointState.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{STATE}: {where}: {first['msg']}") from None
    except RecursionError:
        raise ValueError(f"{STATE}: nested too deeply") from None


def _sums_text(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _read_sums(path: Path) -> dict[str, str]:
    """The SHA-256 of each file, by name. Raises OSError or ValueError where the file is not as `_sums_text` made it."""
    text = read_regular(path, _LARGEST_TEXT).decode()
    lines = re.findall(r"^([0-9a-f]{64})  ([a-z0-9_]+\.[a-z]+)$", text, re.MULTILINE)
    digests = {name: digest for digest, name in lines}
    if _sums_text(digests) != text:
        raise ValueError(f"{path.name} is damaged")
    return digests


def _pointed_at(pointer: Path) -> Path | None:
    """The checkpoint that `last` or `best` names; None without such a file or, with a warning, where it is damaged."""
    try:
        name = read_regular(pointer, 256).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged: %s; going by the folders beside it", pointer, _one_line(error))
        return None
    if not _is_name(name):
        logger.warning("%s is damaged: it names no checkpoint; going by the folders beside it", pointer)
        return None
    return pointer.with_name(name)


def _set_pointer(pointer: Path, name: str) -> None:
    with suppress(OSError):
        pointer.rmdir()  # an empty folder in its place
    write_atomically(pointer, name)


def _on_every_rank(task: Callable[[], None], runtime: Runtime, aside: Path) -> bool:
    """Whether `task` could be done on every rank; the first rank that it failed on says why, on stderr."""
    reason = ""
    try:
        task()
    except OSError as error:
        reason = str(error.__cause__ or error)
    failed = torch.full((), float(bool(reason)), device=runtime.device)
    first = torch.full((), float(runtime.shard.rank if reason else runtime.shard.world_size), device=runtime.device)
    if runtime.shard.world_size > 1:
        dist.all_reduce(failed)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if failed and first == runtime.shard.rank:
        kept = _pointed_at(aside.parent / "last")
        last = f"{kept.name} stays" if kept else "there is none yet"
        logger.warning("checkpoint %s could not be written (%s); %s", aside.stem, reason, last)
    return not failed


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Leave the newest `keep` checkpoints and the best; later ones are of a past that a damaged one has ended."""
    paths = _newest_first(folder)
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    best = _pointed_at(folder / "best")
    for path in paths:
        if path not in kept and path != best:
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if _is_name(path.name)), key=_step_of, reverse=True)


def _is_name(name: str) -> bool:
    match = re.fullmatch(r"step_([0-9]{8,18})", name, re.ASCII)
    return match is not None and name == f"step_{int(match[1]):08d}"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _rng_streams() -> dict[str, Tensor]:
    streams = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams["rng.cuda"] = torch.cuda.get_rng_state()
    return streams


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write the tensors, flushed to the disk; returns the SHA-256 of the file."""
    # Copies, because ZeRO's parameters are views of one flat buffer and safetensors stores tensors that own their
    # memory.
    content = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    path.write_bytes(content)
    flush(path)
    return hashlib.sha256(content).hexdigest()


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
