"""Who this process is: its rank, its device, and the process group that it joins."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank may wait this long for another, for instance while rank 0 checks a large data set."""

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch and DeepSpeed read when they start."""


@dataclass(frozen=True)
class Runtime:
    shard: ShardSpec
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.shard.rank == 0


def start_runtime() -> Runtime:
    """Join the process group that the launcher's variables describe, or a group of one where nothing launched us."""
    cuda = torch.cuda.is_available()
    os.environ.update(rendezvous(os.environ))
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # The launcher leaves every rank the whole machine; ranks that fight for the cores are slower than one
            # alone.
            ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    shard = ShardSpec(*(int(os.environ[name]) for name in RENDEZVOUS[:3]))
    device = torch.device("cuda", shard.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return Runtime(shard, device)


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from what launched this process.

    DeepSpeed's launcher and torchrun set all five. Kubeflow's PyTorchJob leaves out LOCAL_RANK: its pods hold one
    process each. `srun` has names of its own; a batch script's shell has them too, but is no task of a step. A process
    that nothing launched is alone. Raises UserError where a launcher's variables are not complete.
    """
    if "RANK" in environment:
        own = {"LOCAL_RANK": "0"} | dict(environment)
        if missing := [name for name in RENDEZVOUS if name not in own]:
            raise UserError(f"RANK is set, but {missing[0]} is not; unset RANK, or let a launcher set all of them")
        return {name: own[name] for name in RENDEZVOUS}
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        # Where Slurm shows every task its own device and no other, that device has index 0.
        one_device = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
        # A port of its own for each step that may run on a node, below those that systems give to clients.
        port = 10000 + (int(environment["SLURM_JOB_ID"]) + 997 * int(environment["SLURM_STEP_ID"])) % 20000
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": "0" if one_device else environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"])),
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        }
    return dict(zip(RENDEZVOUS, ("0", "1", "0", "127.0.0.1", str(free_port())), strict=True))


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm compresses it: "rack[2-4]n[01-16,20],login" → "rack2n01"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def stop_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of the loopback that nobody holds at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
