"""launch/slurm/ under a real Slurm: two nodes, pre-empted, requeued, and at the end the run that never stopped."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiment import STEPS, assert_same_end, steps_done, wait_until
from slurm import Slurm, missing

from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
CPU_NODES = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")  # documented in train.sbatch

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm: {missing()}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHON": sys.executable, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with Slurm(tmp_path_factory.mktemp("slurm"), train_environment() | own) as cluster:
        yield cluster


class Job:
    """A batch script of launch/slurm/, submitted from the repository's root as its documentation says."""

    def __init__(self, slurm: Slurm, folder: Path, script: str, options: tuple[str, ...], *arguments: str) -> None:
        self.slurm, self.output = slurm, folder / "output"
        options = (*CPU_NODES, f"--output={self.output}", *options)
        arguments = (*arguments, "--runs-dir", str(folder))
        self.id = slurm.submit(*options, f"launch/slurm/{script}", *arguments, cwd=ROOT)

    def told(self) -> str:
        output = self.output.read_text() if self.output.exists() else "no output"
        return f"{self.slurm.run('squeue')}\n{output[-4000:]}"

    def wait_for_state(self, *states: str, seconds: float = 200) -> dict[str, str]:
        def reached() -> bool:
            return self.slurm.describe(self.id)["JobState"] in states

        wait_until(reached, seconds, f"job {self.id} {' or '.join(states)}", self.told)
        return self.slurm.describe(self.id)

    def wait_for_steps(self, run: Path, steps: int) -> None:
        def trained() -> bool:
            assert self.slurm.describe(self.id)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), self.told()
            return steps_done(run) >= steps

        wait_until(trained, 200, f"{steps} steps in {run}", self.told)

    def wait_for_restart(self, run: Path, restarts: int) -> int:
        """The step at which the run goes on after its `restarts`-th stop."""

        def stopped() -> bool:
            job = self.slurm.describe(self.id)  # counts a requeue at once; the ranks may still be at their checkpoint
            return int(job["Restarts"]) == restarts and job["JobState"] in ("PENDING", "RUNNING")

        wait_until(stopped, 60, f"restart {restarts}", self.told)
        checkpoint = (run / "checkpoints" / "last").read_text()
        assert checkpoint != f"step_{STEPS:08d}", "finished before it could be stopped"
        return int(checkpoint.removeprefix("step_"))


def test_a_job_stopped_in_three_ways_ends_as_the_run_that_never_stopped(
    slurm: Slurm, tmp_path: Path, experiment: Path, two_ranks: Path
) -> None:
    run = tmp_path / "small"
    job = Job(slurm, tmp_path, "train.sbatch", (), "--config", str(experiment))

    job.wait_for_steps(run, 10)
    # What #SBATCH --signal does before the time is over.
    slurm.run("scancel", "--signal=USR1", job.id)
    first = job.wait_for_restart(run, 1)

    job.wait_for_steps(run, first + 10)
    slurm.run("scontrol", "requeue", job.id)
    second = job.wait_for_restart(run, 2)
    assert second > first, job.told()

    job.wait_for_steps(run, second + 10)
    urgent = slurm.submit("--partition=urgent", "--nodes=2", f"--output={os.devnull}", "--wrap=srun sleep 1")
    third = job.wait_for_restart(run, 3)
    assert third > second, job.told()

    ended = job.wait_for_state("COMPLETED")
    assert (ended["Restarts"], ended["ExitCode"], ended["NumNodes"]) == ("3", "0:0", "2")
    assert slurm.describe(urgent)["JobState"] == "COMPLETED"
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][:STEPS] == [
        *range(1, STEPS + 1)
    ]
    assert_same_end(run, two_ranks)


def test_a_cancelled_job_keeps_its_checkpoint_and_stays_cancelled(
    slurm: Slurm, tmp_path: Path, experiment: Path
) -> None:
    job = Job(slurm, tmp_path, "train.sbatch", (), "--config", str(experiment))
    job.wait_for_steps(tmp_path / "small", 3)
    slurm.run("scancel", job.id)
    job.wait_for_state("CANCELLED")
    wait_until(lambda: not slurm.run("squeue", "--noheader", "--jobs", job.id), 60, "the job has left", job.told)
    assert slurm.describe(job.id)["Restarts"] == "0"
    assert (tmp_path / "small" / "checkpoints" / "last").exists(), job.told()


def test_a_wrong_config_is_told_once_and_not_tried_again(slurm: Slurm, tmp_path: Path, experiment: Path) -> None:
    job = Job(slurm, tmp_path, "train.sbatch", (), "--config", str(experiment), "optim.rate=1")
    ended = job.wait_for_state("FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    errors = [line for line in job.output.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "optim.rate" in errors[0], errors


def test_an_array_trains_a_run_for_each_noise_level(slurm: Slurm, tmp_path: Path, experiment: Path) -> None:
    every = [f"train.{key}=2" for key in ("steps", "validate_every", "checkpoint_every", "figure_every")]
    options = ("--array=1-2", "--job-name=level")
    job = Job(slurm, tmp_path, "noise_levels.sbatch", options, "--config", str(experiment), *every)
    wait_until(lambda: not slurm.run("squeue", "--noheader", "--jobs", job.id), 200, "the array is done", job.told)
    rates = {}
    for level in ("polygon-7", "polygon-3"):
        run = tmp_path / f"level-{level}"
        assert (run / "result.json").exists(), job.told()
        rates[level] = json.loads((run / "result.json").read_text())["noise_rate"]
    assert 0 < rates["polygon-7"] < rates["polygon-3"]
