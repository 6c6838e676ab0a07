"""Ranks that die, are pre-empted or meet numbers that are not finite: what a run does, and what a resumed one ends at.

`make test` tries one moment of each kind, `make test-faults` twenty.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from distseg.testing.launcher import train_command, train_environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1"}  # bits depend on the number of threads
STEPS = 40

RUN = f"""
name: run
data: {{image_size: 32, clean_count: 4, noise: {{kind: polygon, vertices: 3}}, augment: {{flip: true}}}}
model: {{width: 4, depth: 2, norm: group}}
optim: {{name: adam, lr: 1e-3, schedule: one_cycle}}
train: {{steps: {STEPS}, batch_size: 2, clean_batch_size: 2, log_every: 1, validate_every: 20, checkpoint_every: 3}}
tracking: {{mlflow: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, drawn_data: Path) -> Path:
    values = yaml.safe_load(RUN)
    values["data"]["root"] = str(drawn_data)
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def make_whole(config: Path, tmp_path_factory: pytest.TempPathFactory, train) -> Callable[[int], Path]:
    """Makes the run of so many steps that nothing happens to, on two ranks under ZeRO 1; once."""

    @cache
    def make(steps: int) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        options = [f"train.steps={steps}", "deepspeed.zero_stage=1", "--resume", "auto"]
        done = train(2, "--config", str(config), "--runs-dir", str(folder), *options)
        assert done.returncode == 0, done.stderr
        return folder / "run"

    return make


@pytest.fixture
def whole(make_whole) -> Path:
    return make_whole(STEPS)


@dataclass
class Started:
    """A run under way, and what its two ranks are."""

    launcher: subprocess.Popen
    run: Path
    log_before: int | None

    def ranks(self) -> list[psutil.Process]:
        processes = psutil.Process(self.launcher.pid).children(recursive=True)
        ranks = (process for process in processes if process.cmdline()[1:3] == ["-u", "launch/train.py"])
        return sorted(ranks, key=lambda process: process.environ()["RANK"])

    def wait_for_step(self, step: int) -> None:
        """Until this start, and not an earlier one, has got so far; a start makes the log a new file."""
        deadline = time.monotonic() + 200
        while log_of(self.run) in (None, self.log_before) or steps_logged(self.run) < step:
            assert self.launcher.poll() is None, f"ended before step {step}:\n{self.launcher.communicate()[1]}"
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> tuple[int, str]:
        try:
            _, said = self.launcher.communicate(timeout=200)
        except BaseException:  # also what pytest's own limit raises
            os.killpg(self.launcher.pid, signal.SIGKILL)
            raise
        return self.launcher.returncode, said


def start(config: Path, folder: Path, *arguments: str) -> Started:
    before = log_of(folder / "run")
    command = train_command(2, "--config", str(config), "--runs-dir", str(folder), "--resume", "auto", *arguments)
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    return Started(launcher, folder / "run", before)


def log_of(run: Path) -> int | None:
    log = run / "metrics.jsonl"
    return log.stat().st_ino if log.exists() else None


def steps_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def assert_same_end(actual: Path, expected: Path, steps: int) -> None:
    name = f"step_{steps:08d}"
    for file in sorted((expected / "checkpoints" / name).glob("*.safetensors")):
        tensors, others = load_file(file), load_file(actual / "checkpoints" / name / file.name)
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert tensor.equal(others[key]), f"{file.name}: {key}"
    rows = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in log.read_text().splitlines()]
        for log in (actual / "metrics.jsonl", expected / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("moments", "steps"),
    [pytest.param(1, STEPS, marks=pytest.mark.slow), pytest.param(20, 400, marks=pytest.mark.faults)],
)
def test_ranks_killed_and_pre_empted_end_where_an_untouched_run_does(
    config: Path, make_whole, tmp_path: Path, counted, moments: int, steps: int
) -> None:
    """At random moments, wherever they fall: in a step, in a validation, while a checkpoint is being written."""
    chance = random.Random(moments)
    faults = [signal.SIGKILL, signal.SIGTERM] * moments
    # A start goes on for some steps until its fault, so the last one must not be near the end.
    reached = [1 + index * (steps - steps // 5) // len(faults) for index in range(len(faults))]
    options = [f"train.steps={steps}", "deepspeed.zero_stage=1"]
    for fault, step in zip(faults, reached, strict=True):
        started = start(config, tmp_path, *options)
        started.wait_for_step(step)
        time.sleep(chance.uniform(0, 0.2))
        victim = chance.choice([0, 1])
        processes = started.ranks()
        processes[victim].send_signal(fault)
        code, said = started.end()
        assert not (started.run / "result.json").exists(), "finished before it could be stopped"
        assert not any(process.is_running() for process in processes)
        if fault == signal.SIGTERM:
            assert code == 75, said
            assert f"of {steps}, as asked; --resume continues" in said
        else:
            assert code not in (0, 2, 75), said
            assert said.count(f"error: rank {victim} has gone") == 1, said
            assert "Traceback" not in said
    done = start(config, tmp_path, *options)
    code, said = done.end()
    assert code == 0, said
    assert_same_end(done.run, make_whole(steps), steps)
    counted("ranks killed or pre-empted in a step", len(faults))


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_the_ranks(config: Path, tmp_path: Path) -> None:
    """`kill` of the process that a shell knows ends DeepSpeed's runner and nothing else; the ranks notice."""
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db"
    long = ["train.steps=4000", "train.validate_every=4000", "train.checkpoint_every=4000"]
    started = start(
        config, tmp_path, *long, "tracking.mlflow=true", f"tracking.uri={store}", "tracking.system_metrics=false"
    )
    started.wait_for_step(3)
    processes = started.ranks()
    started.launcher.send_signal(signal.SIGUSR1)
    psutil.wait_procs(processes, timeout=60)
    assert not any(process.is_running() for process in processes)
    last = (started.run / "checkpoints" / "last").read_text()
    assert int(last.removeprefix("step_")) >= 3, "no checkpoint at the end"
    tracked = mlflow.MlflowClient(tracking_uri=store).get_run((started.run / "mlflow_run_id").read_text().strip())
    assert tracked.info.status == "KILLED"


@pytest.mark.slow
def test_a_second_start_of_a_live_run_is_refused_and_leaves_it_alone(config: Path, tmp_path: Path, train) -> None:
    long = ["train.steps=4000", "train.validate_every=4000", "train.checkpoint_every=4000"]
    started = start(config, tmp_path, *long)
    started.wait_for_step(3)
    rank_0 = started.ranks()[0].pid
    second = train(0, "--config", str(config), "--runs-dir", str(tmp_path), "--resume", "auto", *long)
    assert second.returncode == 2, second.stderr
    [line] = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert f"process {rank_0} on {socket.gethostname()!r}" in line and "Traceback" not in second.stderr
    started.wait_for_step(steps_logged(started.run) + 2)
    started.ranks()[0].terminate()
    assert started.end()[0] == 75


@pytest.mark.slow
def test_the_check_of_the_result_sees_what_a_killed_launcher_hides(config: Path, tmp_path: Path) -> None:
    """`deepspeed` is two processes: it may end with 0 where the inner one is killed."""
    long = ["train.steps=4000", "train.validate_every=4000", "train.checkpoint_every=4000"]
    started = start(config, tmp_path, *long)
    started.wait_for_step(3)
    ranks = started.ranks()
    ranks[0].parent().kill()
    psutil.wait_procs(ranks, timeout=60)
    started.end()
    command = [sys.executable, "launch/finished.py", "--config", str(config), "--runs-dir", str(tmp_path), *long]
    asked = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert asked.returncode == 1 and "is not done" in asked.stderr, asked.stderr
    assert (started.run / "checkpoints" / "last").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_cannot_be_written_is_one_line(config: Path, tmp_path: Path, train_ranks, ranks: int) -> None:
    (tmp_path / "file").touch()
    done = train_ranks(ranks, "--config", str(config), "--runs-dir", str(tmp_path / "file"), "--resume", "auto")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "a part of its path is a file and not a folder" in errors[0], done.stderr
    if ranks == 1:
        done = train_ranks(
            ranks, "--config", str(config), "--runs-dir", str(tmp_path), "--resume", "auto", f"name={'n' * 300}"
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and "Traceback" not in done.stderr and len(errors) == 1, done.stderr
        assert "File name too long" in errors[0]


@pytest.mark.slow
def test_other_ranks_and_another_stage_continue_a_run(config: Path, whole: Path, tmp_path: Path, train) -> None:
    """From two ranks under ZeRO 1 to one under ZeRO 2; the last steps again."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    (run / "checkpoints" / "last").write_text(f"step_{STEPS - 1:08d}")
    arguments = ["--config", str(config), "--runs-dir", str(tmp_path), "deepspeed.zero_stage=2", "--resume", "auto"]
    refused = train(0, *arguments)
    assert refused.returncode == 2
    assert "set train.batch_size=4" in refused.stderr and refused.stderr.count("\n") == 1
    done = train(0, *arguments, "train.accumulation=2")
    assert done.returncode == 0, done.stderr
    expected, actual = (
        load_file(end / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors") for end in (whole, run)
    )
    for key in expected:
        error = (actual[key] - expected[key]).norm() / expected[key].norm()
        assert error < 1e-5, f"{key}: {error}"
    again = train(0, *arguments, "train.accumulation=2")
    assert again.returncode == 0 and "test Dice" in again.stdout


@pytest.mark.slow
def test_a_file_that_breaks_in_training_is_named_with_the_checkpoint(
    config: Path, drawn_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn_data, data)
    started = start(config, tmp_path, f"data.root={data}", "data.memory=0", "train.steps=4000")
    started.wait_for_step(4)
    for image in (data / "images").iterdir():
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    code, said = started.end()
    assert code == 2, said
    assert f"error: {data}/images/" in said and "; --resume goes on from the checkpoint of step " in said


def failing(*at: int) -> list[str]:
    return [
        "model.name=tests.integration.failing:Failing", f"model.options={{rank: 1, at: {list(at)}}}",
        "model.width=null", "model.depth=null", "model.norm=null",
        "method.name=noisy_only", "train.steps=12", "train.validate_every=6",
    ]  # fmt: skip


def test_steps_that_are_not_finite_are_skipped_and_end_the_run_in_the_end(
    config: Path, tmp_path: Path, train_ranks
) -> None:
    arguments = ["--config", str(config), "--runs-dir", str(tmp_path)]
    done = train_ranks(2, *arguments, *failing(2, 3, 5, 6, 7), "train.max_bad_steps=3", "train.log_every=4")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "step 7: the loss is not finite, update 3 in a row that is skipped: rank 1 with images " in errors[0]
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row] == [2]


def test_a_run_with_no_room_for_checkpoints_goes_on_and_fails_at_the_end(config: Path, tmp_path: Path, train) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(checkpoints)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        done = train(0, "--config", str(config), "--runs-dir", str(tmp_path), "train.steps=6")
    finally:
        subprocess.run(["umount", "--lazy", str(checkpoints)], check=True)
    assert done.returncode == 1
    assert done.stderr.count("could not be written ([Errno 28] No space left on device); there is none yet") >= 2
    assert "error: " in done.stderr.splitlines()[-1] and "make room, then --resume" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "result.json").exists()
