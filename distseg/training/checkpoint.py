"""Checkpoints: folders that are absent or complete; tensors as safetensors, the rest as JSON, nothing pickled.

    checkpoints/step_00000120/model.safetensors       parameters (fp32) and buffers, by name
                              method.safetensors      what the method has learned, for most of them nothing
                              rank_00000.safetensors  this rank's part of the optimiser state, and its RNG streams
                              state.json              progress, images a step, size and SHA-256 of each file
    checkpoints/last, best                            the name of a folder

Every rank writes the part of the optimiser state that it owns, as runs of flattened parameters under the parameters'
names: nothing is gathered, and any number of ranks at any ZeRO stage can read it again. Schedule and data position
are functions of the step. DeepSpeed's own checkpoints serve neither purpose: reading one unpickles it, and none can be
read on another number of ranks with its buffers and the state of SGD.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distseg.config.load import load_config
from distseg.config.schema import Config
from distseg.distributed.collectives import decided_by_main, gather_bytes
from distseg.distributed.engine import load_module_state, load_optimizer_state, module_state, optimizer_state
from distseg.distributed.ranks import ShardSpec
from distseg.distributed.runtime import Runtime
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.methods.method import Method
from distseg.models.registry import build_model

FORMAT = 2


@dataclass(frozen=True)
class StepSize:
    """Images that one step takes of each stream, over micro-batches and ranks. A run keeps them to its end."""

    noisy: int
    clean: int

    @classmethod
    def of(cls, config: Config, shard: ShardSpec) -> "StepSize":
        per_image = config.train.accumulation * shard.world_size
        return cls(config.train.batch_size * per_image, config.train.clean_batch_size * per_image)


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
    files: dict[str, dict[str, Any]] = {}

    def start() -> None:
        if shard.rank == 0:
            for remains in folder.glob("*.part"):  # of a kill: a folder, or a pointer's file
                shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
            aside.mkdir(parents=True)

    def write() -> None:
        name = f"rank_{shard.rank:05d}.safetensors"
        files[name] = _write(aside / name, optimizer_state(engine, shard.rank) | _rng_streams())
        state = module_state(engine)
        if shard.rank == 0:
            files["model.safetensors"] = _write(aside / "model.safetensors", state)
            files["method.safetensors"] = _write(aside / "method.safetensors", method.state_dict())

    def commit() -> None:
        if shard.rank == 0:
            described = {
                "format": FORMAT,
                "world_size": shard.world_size,
                "zero_stage": config.deepspeed.zero_stage,
                "images_per_step": asdict(StepSize.of(config, shard)),
                "images_seen": step * StepSize.of(config, shard).noisy,
                "progress": progress,
                "files": files,
            }
            write_atomically(aside / "state.json", json.dumps(described, indent=2))
            _flush(aside)
            shutil.rmtree(target, ignore_errors=True)
            aside.replace(target)
            _flush(folder)
            write_atomically(folder / "last", target.name)
            if best:
                write_atomically(folder / "best", target.name)
            _flush(folder)

    written = _on_every_rank(start, runtime, aside) and _on_every_rank(write, runtime, aside)
    if written:
        for part in gather_bytes(json.dumps(files).encode(), runtime.device):
            files |= json.loads(part)
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
    state = json.loads((checkpoint / "state.json").read_text())
    try:
        load_module_state(engine, load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"checkpoint {checkpoint}: is of another network: {' '.join(str(error).split())}") from None
    method.load_state_dict(load_file(checkpoint / "method.safetensors"))
    with ExitStack() as stack:
        parts = [
            stack.enter_context(safe_open(checkpoint / f"rank_{rank:05d}.safetensors", framework="pt"))
            for rank in range(state["world_size"])
        ]
        load_optimizer_state(engine, _SavedParts(parts))
        # A rank that the run did not have takes the streams of one that it had.
        streams = parts[shard.rank % len(parts)]
        torch.set_rng_state(streams.get_tensor("rng.cpu"))
        if torch.cuda.is_available() and "rng.cuda" in streams.keys():  # noqa: SIM118  (a file, not a mapping)
            torch.cuda.set_rng_state(streams.get_tensor("rng.cuda"))
    return state["progress"]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, at or before the one that `last` names; None where there has never been one.

    Each damaged one on the way is named in a line on stderr. Raises UserError where none is whole.
    """
    candidates = _newest_first(folder)
    pointer = folder / "last"
    if pointer.exists() and (named := folder / pointer.read_text().strip()).name.startswith("step_"):
        candidates = [path for path in candidates if path.name <= named.name]
        if named not in candidates:
            candidates.insert(0, named)
    for index, checkpoint in enumerate(candidates):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint
        before = ", trying the one before it" if index + 1 < len(candidates) else ""
        print(f"warning: checkpoint {checkpoint} is damaged: {damage}{before}", file=sys.stderr)
    if candidates:
        raise UserError(f"{folder}: none of its checkpoints is whole; remove the run's folder and start it again")
    return None


def load_network(run: Path) -> tuple[Config, nn.Module]:
    """The config of a run and its network, on the CPU, with the parameters of its last whole checkpoint."""
    config = load_config(run / "config.yaml")
    network = build_model(config.model)
    checkpoint = find_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run}: has no checkpoint yet")
    try:
        network.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint}: is of another network: {' '.join(str(error).split())}") from None
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
    before = json.loads((checkpoint / "state.json").read_text())["images_per_step"]
    now = asdict(StepSize.of(config, shard))
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
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if state["format"] != FORMAT:
            return f"format {state['format']}, not {FORMAT}"
        ranks = {f"rank_{rank:05d}.safetensors" for rank in range(state["world_size"])}
        names = ranks | {"model.safetensors", "method.safetensors"}
        if names != state["files"].keys():
            return "state.json does not list its files"
        for name, expected in state["files"].items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} has another SHA-256 than state.json says"
        if state["progress"]["step"] != _step_of(checkpoint):
            return "state.json is of another step"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _on_every_rank(task: Callable[[], None], runtime: Runtime, aside: Path) -> bool:
    """Whether `task` could be done on every rank; the first rank that it failed on says why, on stderr."""
    reason = ""
    try:
        task()
    except OSError as error:
        reason = str(error)
    failed = torch.full((), float(bool(reason)), device=runtime.device)
    first = torch.full((), float(runtime.shard.rank if reason else runtime.shard.world_size), device=runtime.device)
    if runtime.shard.world_size > 1:
        dist.all_reduce(failed)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if failed and first == runtime.shard.rank:
        kept = aside.parent / "last"
        last = f"{kept.read_text()} stays" if kept.exists() else "there is none yet"
        print(f"warning: checkpoint {aside.stem} could not be written ({reason}); {last}", file=sys.stderr)
    return not failed


def _remove_old(folder: Path, step: int, keep: int) -> None:
    """Leave the newest `keep` checkpoints and the best; later ones are of a past that a damaged one has ended."""
    paths = _newest_first(folder)
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    best = (folder / "best").read_text().strip() if (folder / "best").exists() else None
    for path in paths:
        if path not in kept and path.name != best:
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*") if path.name[5:].isdigit()), reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _rng_streams() -> dict[str, Tensor]:
    streams = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams["rng.cuda"] = torch.cuda.get_rng_state()
    return streams


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # Copies, because ZeRO's parameters are views of one flat buffer and safetensors stores tensors that own their
    # memory.
    content = save({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()})
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
