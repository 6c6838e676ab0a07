"""Who this process is: its rank, its device, and the process group that it joins."""

import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A rank may wait this long for another, for instance while rank 0 checks a large data set."""

START_TIMEOUT = "DISTSEG_START_TIMEOUT"
"""Variable with the seconds that a rank waits for the others to start; 1800 where it is not set."""
_FIRST_NOTICE, _NEXT_NOTICE = 10.0, 60.0
"""Seconds after which a rank says for whom it waits."""

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch and DeepSpeed read when they start."""


@dataclass(frozen=True)
class Runtime:
    shard: ShardSpec
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.shard.rank == 0


def set_arithmetic(deterministic: bool, tf32: bool) -> None:
    """Whether a GPU gives the same bits each time, and whether it multiplies in TensorFloat-32. Call it at the start.

    `deterministic` also picks deterministic operators outside cuDNN; one that has no such form still runs, and torch
    warns with its name.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Else torch fills each new tensor, for readers of memory that nobody has written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  (unknown to its stub)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def start_runtime() -> Runtime:
    """Join the process group that the launcher's variables describe, or a group of one where nothing launched us.

    Raises UserError where the others do not come in time, and where rank 0's port is taken.
    """
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
    store = _meet(shard, os.environ)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=shard.rank,
        world_size=shard.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return Runtime(shard, device)


def _meet(shard: ShardSpec, environment: Mapping[str, str]) -> dist.Store:
    """The store that the ranks find each other by, once all of them are there.

    One process needs no socket for it. Ranks of one host, which is what a loopback address says, listen on the
    loopback and on no other interface; torch's own store would listen on all of them.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    one_host = _is_loopback(host)
    if shard.world_size == 1 or one_host:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if "lo" in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault(variable, "lo")
    if shard.world_size == 1:
        return dist.HashStore()
    bound = timedelta(seconds=_start_timeout(environment))
    host = "127.0.0.1" if one_host else host
    elastic = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has made the store
    started = time.monotonic()
    listener = None
    if shard.rank == 0 and not elastic:
        listener = _listen(host if one_host else "", port)
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # a store outlives the ranks of an attempt
    store = dist.PrefixStore(f"distseg/{attempt}", _connect(host, port, shard, bound, listener))
    _wait_for_all(store, shard, started, bound)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store


def _start_timeout(environment: Mapping[str, str]) -> float:
    given = environment.get(START_TIMEOUT, "1800")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**8:
        raise UserError(f"{START_TIMEOUT} {given!r}: set it to a number of seconds, for instance 1800")
    return seconds


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _listen(address: str, port: int) -> socket.socket:
    """A socket on `address`, "" for every interface."""
    family = socket.AF_INET6 if not address and socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            (address, port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise UserError(
            f"MASTER_PORT {port}: rank 0 cannot listen there ({error.strerror or error}); "
            "set another, for instance with `deepspeed --master_port PORT`"
        ) from None


def _connect(host: str, port: int, shard: ShardSpec, bound: timedelta, listener: socket.socket | None) -> dist.TCPStore:
    """The store of rank 0. A rank that comes before rank 0 says so, and tries again."""
    if listener is not None:
        return dist.TCPStore(
            host, port, shard.world_size, True, bound, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    # torch's store would report each failed connection, in its own words.
    notices = _Notices()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if notices.waited >= bound.total_seconds():
                raise _missing(f"rank {shard.rank} cannot reach rank 0 at {host}:{port}", bound, error) from None
        notices.tell(f"rank {shard.rank} is waiting for rank 0 at {host}:{port}")
        time.sleep(0.1)
    return dist.TCPStore(host, port, shard.world_size, False, bound, wait_for_workers=False)


def _wait_for_all(store: dist.Store, shard: ShardSpec, started: float, bound: timedelta) -> None:
    """Until every rank has called this; rank 0 says for how many it waits."""
    store.set(f"here/{shard.rank}", "1")
    store.set_timeout(bound)
    if shard.rank:
        try:
            store.wait(["all here"])
        except dist.DistError as error:
            raise _missing("other ranks have not started", bound, error) from None
        return
    notices = _Notices(started)
    missing = set(range(1, shard.world_size))
    while True:
        missing = {rank for rank in missing if not store.check([f"here/{rank}"])}
        if not missing:
            break
        some = ", ".join(str(rank) for rank in sorted(missing)[:8]) + (", …" if len(missing) > 8 else "")
        what = f"waiting for {len(missing)} of {shard.world_size} ranks to start ({some})"
        if notices.waited >= bound.total_seconds():
            raise _missing(what, bound)
        notices.tell(what)
        time.sleep(0.05 if notices.waited < 5 else 0.5)
    store.set("all here", "1")


class _Notices:
    """Says what is waited for: after ten seconds, then every minute."""

    def __init__(self, started: float | None = None) -> None:
        self._started = time.monotonic() if started is None else started
        self._next = _FIRST_NOTICE

    @property
    def waited(self) -> float:
        return time.monotonic() - self._started

    def tell(self, what: str) -> None:
        if self.waited >= self._next:
            logger.warning("%s, for %.0f s so far", what, self.waited)
            self._next += _NEXT_NOTICE


def _missing(what: str, bound: timedelta, cause: Exception | None = None) -> UserError:
    reason = f" ({' '.join(str(cause).split())[:200]})" if cause else ""
    mend = f"start as many processes as WORLD_SIZE says, or set {START_TIMEOUT} to more seconds"
    return UserError(f"{what} after {bound.total_seconds():g} s{reason}; {mend}")


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
        nodes = environment["SLURM_STEP_NODELIST"]
        one_node = not re.search(r"[,\[]", nodes)
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": "0" if one_device else environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes)),
            "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        }
    return dict(zip(RENDEZVOUS, ("0", "1", "0", "127.0.0.1", str(free_port())), strict=True))


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm compresses it: "rack[2-4]n[01-16,20],login" → "rack2n01"."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    first = match.group() if match else nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def stop_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of the loopback that nobody holds at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
