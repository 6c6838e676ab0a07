"""What this process is told of the others, by each of the launchers."""

import pytest

from distseg.distributed.runtime import first_host, rendezvous
from distseg.errors import UserError

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
