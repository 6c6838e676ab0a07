"""What this process is told of the others, by each of the launchers, and how they meet."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distseg.distributed.runtime import first_host, free_port, rendezvous, set_arithmetic, start_runtime
from distseg.distributed.watchdog import Watchdog
from distseg.errors import UserError
from distseg.testing.launcher import train_environment
from distseg.testing.ranks import run_ranks

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "64",  # of the job, and not of this step
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08],login",
}


def test_a_launcher_that_sets_all_five_is_obeyed_also_inside_slurm() -> None:
    five = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert rendezvous(SRUN | five | {"HOME": "/"}) == five


def test_a_pod_holds_one_process() -> None:
    pod = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    assert rendezvous(pod) == pod | {"LOCAL_RANK": "0"}


def test_srun_tasks_are_ranks() -> None:
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "14711"}
    assert rendezvous(SRUN) == expected
    assert rendezvous(SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == expected
    assert rendezvous(SRUN | {"MASTER_ADDR": "ib0", "MASTER_PORT": "7"})["MASTER_ADDR"] == "ib0"


def test_tasks_of_one_node_meet_on_its_loopback() -> None:
    assert rendezvous(SRUN | {"SLURM_STEP_NODELIST": "gpu07"})["MASTER_ADDR"] == "127.0.0.1"
    assert rendezvous(SRUN | {"SLURM_STEP_NODELIST": "gpu07", "MASTER_ADDR": "ib0"})["MASTER_ADDR"] == "ib0"
    for several in ("gpu[07-08]", "gpu07,gpu08"):
        assert rendezvous(SRUN | {"SLURM_STEP_NODELIST": several})["MASTER_ADDR"] == "gpu07"


def test_a_task_that_sees_one_device_uses_it() -> None:
    assert rendezvous(SRUN | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"


def test_steps_that_share_a_node_do_not_share_a_port() -> None:
    steps = [SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step} for job in ("4711", "4712") for step in ("0", "1")]
    ports = {int(rendezvous(step)["MASTER_PORT"]) for step in steps}
    assert len(ports) == 4 and all(1024 < port < 32768 for port in ports)


def test_a_batch_script_and_a_plain_shell_are_alone() -> None:
    shell = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # no step
    for environment in (shell, {}):
        alone = rendezvous(environment)
        assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_half_a_launcher_is_an_error_that_names_the_variable() -> None:
    with pytest.raises(UserError, match="RANK is set, but WORLD_SIZE is not; unset RANK"):
        rendezvous({"RANK": "0"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("n[003,007-9],m1", "n003"),
        ("rack[2-4]n[01-16,20].example.org,login", "rack2n01.example.org"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def listening() -> set[str]:
    """The addresses that sockets of this process listen on, in the kernel's hexadecimal."""
    own = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [
        line.split() for table in ("tcp", "tcp6") for line in Path("/proc/self/net", table).read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def say_where_it_listens(runtime) -> dict[str, torch.Tensor]:
    watchdog = Watchdog(runtime.shard)
    own = listening()
    assert own <= LOOPBACK, f"rank {runtime.shard.rank} listens on {own}"
    watchdog.close(0)
    return {"sockets": torch.tensor(len(own))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_of_one_host_listen_on_the_loopback_alone(ranks: int, monkeypatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = run_ranks(say_where_it_listens, ranks)
    assert ranks == 1 or found[0]["sockets"] > 0, "the test sees no socket"


START = """
import sys
from distseg.distributed import runtime
from distseg.errors import UserError
runtime._FIRST_NOTICE, runtime._NEXT_NOTICE = 0.5, 1.0
try:
    print("met", runtime.start_runtime().shard.world_size)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start_rank(rank: int, port: int, seconds: str = "1800") -> subprocess.Popen:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = train_environment() | {name: str(value) for name, value in variables.items()}
    environment["DISTSEG_START_TIMEOUT"] = seconds
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", START], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_rank_without_the_others_says_so_and_gives_up_in_the_end() -> None:
    expected = {
        0: "waiting for 1 of 2 ranks to start (1)",
        1: "rank 1 is waiting for rank 0 at 127.0.0.1:",
    }
    processes = {rank: start_rank(rank, free_port(), "3") for rank in expected}
    for rank, process in processes.items():
        _, said = process.communicate(timeout=120)
        *notices, last = [line for line in said.splitlines() if "waiting for" in line or line.startswith("error: ")]
        assert process.returncode == 1 and "Traceback" not in said, said
        assert len(notices) >= 2 and all(expected[rank] in line for line in notices), said
        assert last.startswith("error: ") and "set DISTSEG_START_TIMEOUT to more seconds" in last, said


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_come_late_are_waited_for(first: int) -> None:
    port = free_port()
    early = start_rank(first, port)
    assert "waiting for" in early.stderr.readline()
    late = start_rank(1 - first, port)
    for process in (early, late):
        out, said = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "met 2\n"), said
        assert "waiting for" in said or not said


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        _, said = start_rank(0, taken.getsockname()[1]).communicate(timeout=120)
    assert "error: MASTER_PORT" in said and "--master_port PORT" in said and "Traceback" not in said


@pytest.mark.parametrize("seconds", ["soon", "0", "nan", "-1"])
def test_a_wrong_bound_is_named(seconds: str, monkeypatch) -> None:
    five = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (five | {"DISTSEG_START_TIMEOUT": seconds}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="DISTSEG_START_TIMEOUT"):
        start_runtime()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tf32", [True, False])
def test_arithmetic_of_a_gpu_is_as_the_keys_say(deterministic: bool, tf32: bool, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_arithmetic(deterministic, tf32)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.deterministic == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        assert (os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8") == deterministic
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert (torch.get_float32_matmul_precision() == "high") == tf32
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    finally:
        set_arithmetic(False, False)
        torch.backends.cudnn.benchmark = False
