"""Checkpoints: folders that are absent or complete; tensors as safetensors, the rest as JSON, nothing pickled.

    checkpoints/step_00000120/model.safetensors       parameters (fp32) and buffers
                              method.safetensors      what the method has learned, for most of them nothing
                              rank_00000.safetensors  optimiser state and RNG streams of each rank
                              state.json              progress, world size
    checkpoints/last, best                            the name of a folder
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distseg.config import Config, load_config
from distseg.data.sharding import ShardSpec
from distseg.distributed.engine import load_optimizer_state, optimizer_state
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.models import build_model
from distseg.training.methods import Method

FORMAT = 1


def save_checkpoint(
    folder: Path, engine: Any, method: Method, progress: dict[str, Any], shard: ShardSpec, best: bool
) -> None:
    """Write the checkpoint of `progress["step"]`; every rank calls it.

    Keeps what `last` and `best` name and removes the others.

    The pointer moves once the folder is complete and on the disk: a crash leaves the previous checkpoint in force.
    """
    target = folder / f"step_{progress['step']:08d}"
    aside = target.with_suffix(".part")
    if shard.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    _save(aside / f"rank_{shard.rank:05d}.safetensors", optimizer_state(engine) | _rng_streams())
    if shard.rank == 0:
        _save(aside / "model.safetensors", engine.module.state_dict())
        _save(aside / "method.safetensors", method.state_dict())
    dist.barrier()
    if shard.rank == 0:
        described = {"format": FORMAT, "world_size": shard.world_size, "progress": progress}
        write_atomically(aside / "state.json", json.dumps(described, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
        _flush(folder)
        write_atomically(folder / "last", target.name)
        if best:
            write_atomically(folder / "best", target.name)
        _remove_unnamed(folder)


def load_checkpoint(folder: Path, engine: Any, method: Method, shard: ShardSpec) -> dict[str, Any] | None:
    """Put the last checkpoint's tensors into `engine` and the RNG streams, and return its progress; None without one.

    Raises UserError where the checkpoint is not of this number of ranks, or not complete.
    """
    if not (folder / "last").exists():
        return None
    checkpoint = folder / (folder / "last").read_text().strip()
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if state["world_size"] != shard.world_size:
            raise UserError(
                f"checkpoint {checkpoint}: written by {state['world_size']} ranks, not {shard.world_size};"
                f" resume with {state['world_size']}"
            )
        engine.module.load_state_dict(load_file(checkpoint / "model.safetensors"))
        method.load_state_dict(load_file(checkpoint / "method.safetensors"))
        tensors = load_file(checkpoint / f"rank_{shard.rank:05d}.safetensors")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {error}") from None
    load_optimizer_state(engine, {k: v for k, v in tensors.items() if not k.startswith("rng.")})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state["progress"]


def load_network(run: Path) -> tuple[Config, nn.Module]:
    """The config of a run and its network, on the CPU, with the parameters of its last checkpoint."""
    config = load_config(run / "config.yaml")
    network = build_model(config.model)
    try:
        checkpoint = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
        network.load_state_dict(load_file(checkpoint / "model.safetensors"))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{run}: its last checkpoint cannot be read: {error}") from None
    return config, network


def _rng_streams() -> dict[str, Tensor]:
    streams = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        streams["rng.cuda"] = torch.cuda.get_rng_state()
    return streams


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    # Copies, because ZeRO's parameters are views of one flat buffer and safetensors stores tensors that own their
    # memory.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unnamed(folder: Path) -> None:
    named = {(folder / pointer).read_text() for pointer in ("last", "best") if (folder / pointer).exists()}
    for path in folder.glob("step_*"):
        if path.name not in named:
            shutil.rmtree(path)
