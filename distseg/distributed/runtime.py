"""Who this process is: its rank, its device, and the process group that it joins."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distseg.data.sharding import ShardSpec

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank may wait this long for another, for instance while rank 0 checks a large data set."""


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
    if "RANK" not in os.environ:
        lone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in lone.items()})
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # The launcher leaves every rank the whole machine; ranks that fight for the cores are slower than one
            # alone.
            ranks_here = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    shard = ShardSpec(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    device = torch.device("cuda", shard.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return Runtime(shard, device)


def stop_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of the loopback that nobody holds at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
