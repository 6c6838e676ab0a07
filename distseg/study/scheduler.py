"""Makes the runs of a study: each a process on its own share of the machine, several schedulers beside each other."""

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

from pydantic import ValidationError

from distseg.config.load import config_hash, dump_config, load_config
from distseg.config.schema import Config
from distseg.distributed.launcher import train_command, train_environment
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.section import Section
from distseg.study.folder import StudyFolder
from distseg.study.plan import StudyRun

PREEMPTED = 75
"""Exit code of a run that was stopped after a checkpoint: EX_TEMPFAIL of sysexits.h."""
GRACE = 120
"""Seconds that runs have, after a signal, to end by themselves."""

_log = logging.getLogger(__name__)

State = Literal["new", "finished", "failed", "stopped"]


class RunStatus(Section):
    """status/RUN.json: how a run ended the last time."""

    state: Literal["finished", "failed", "stopped"]
    exit_code: int | None
    seconds: float


@dataclass(frozen=True)
class Parent:
    """The MLflow run that the runs of a study are nested under."""

    uri: str
    run_id: str


@dataclass(frozen=True)
class Place:
    """The share of the machine that one run gets."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        shares = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(self.cores)))}
        return shares | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def share_machine(parallel: int, ranks: int) -> list[Place]:
    """`parallel` disjoint shares of the cores and GPUs of this process. UserError where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    present = sorted(device.name.removeprefix("nvidia") for device in Path("/dev").glob("nvidia[0-9]*"))
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(present)).split(",") if name.strip()]
    if parallel > len(cores):
        raise UserError(f"--parallel {parallel}: this process has {len(cores)} cores; run at most as many at once")
    if devices and parallel * ranks > len(devices):
        raise UserError(f"--parallel {parallel}: it takes a GPU a rank, {parallel * ranks}; there are {len(devices)}")
    return [Place(tuple(cores[i::parallel]), tuple(devices[i::parallel][:ranks])) for i in range(parallel)]


def state_of(run: StudyRun, folder: StudyFolder) -> State:
    """finished (its result is there), failed, stopped (part of it is there) or new."""
    files = folder.run(run.name)
    if files.result.exists() and _is_config_of(files.config, run.config):
        return "finished"
    recorded = _status(folder.status(run.name))
    if recorded and recorded.state != "finished":  # its folder may have been removed, to run it again
        return recorded.state
    return "stopped" if files.config.exists() else "new"


def run_all(
    runs: Sequence[StudyRun], folder: StudyFolder, parent: Parent | None, ranks: int, places: Sequence[Place]
) -> int:
    """Make the runs that have not finished, one a place, each with `ranks` processes.

    Progress goes to the log. SIGINT, SIGTERM and any exception end the processes after a checkpoint. Returns an exit
    code: 0 all finished, 1 a run failed, 75 stopped or pre-empted.
    """
    waiting = [run for run in runs if state_of(run, folder) != "finished"]
    _log.info("%d of %d runs have finished before", len(runs) - len(waiting), len(runs))
    running: dict[Place, _Process] = {}
    code = 0
    with _StopSignals() as stop:
        try:
            while (waiting or running) and not stop.signal and code != PREEMPTED:
                for place in places:
                    if place not in running and (taken := _take_one(waiting, folder)):
                        running[place] = _Process(*taken, folder, parent, ranks, place)
                time.sleep(0.05)
                for place, process in list(running.items()):
                    if process.ended:
                        del running[place]
                        code = max(code, process.close())
        finally:  # no process goes on unseen, whatever has happened here
            unfinished = bool(waiting or running)
            _end_all(list(running.values()))
        if unfinished or code == PREEMPTED:
            _log.info("stopped; the same command goes on from here")
            return PREEMPTED
    return code


def lock_file(path: Path, wait: bool) -> IO[str] | None:
    """Lock a file for as long as it is open, here or in a child that inherits it; None where another holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        file.close()
        raise UserError(
            f"{path}: cannot be locked: {error.strerror}; choose a --runs-dir on a file system that has locks"
        ) from None
    return file


def _is_config_of(written: Path, config: Config) -> bool:
    try:
        return config_hash(load_config(written)) == config_hash(config)
    except UserError:
        return False


def _status(path: Path) -> RunStatus | None:
    try:
        return RunStatus.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _take_one(waiting: list[StudyRun], folder: StudyFolder) -> tuple[StudyRun, IO[str]] | None:
    """The first run whose lock is free, with the lock: other schedulers may be at work, or have left a run behind."""
    for index, run in enumerate(waiting):
        if lock := lock_file(folder.run_lock(run.name), wait=False):
            del waiting[index]
            return run, lock
    return None


class _Process:
    """The process of a run. It inherits the run's lock, which is free again once the process has ended in any way."""

    def __init__(
        self, run: StudyRun, lock: IO[str], folder: StudyFolder, parent: Parent | None, ranks: int, place: Place
    ) -> None:
        self._run, self._lock, self._folder, self._began = run, lock, folder, time.monotonic()
        self._ranks = ranks
        written = folder.config(run.name)
        write_atomically(written, dump_config(_tracked(run, parent)))
        begun = folder.run(run.name).config.exists()
        _log.info("%s  %s  %s", time.strftime("%H:%M:%S"), "goes on " if begun else "starts  ", run.name)
        arguments = ["--config", str(written), "--runs-dir", str(folder.path), *(["--resume"] if begun else [])]
        with folder.log(run.name).open("a") as log:
            self.process = subprocess.Popen(
                train_command(ranks if ranks > 1 else 0, *arguments),
                env=train_environment() | place.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[lock.fileno()],
                preexec_fn=lambda: os.sched_setaffinity(0, place.cores),
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def close(self, was_asked: bool = False) -> int:
        """Record how the process ended, and give the lock back; returns what it means for the whole study.

        `was_asked`: it had been asked to end, so that an end by a signal is no failure. A launcher of several ranks has
        exit code 1 for that.
        """
        code = self.process.returncode
        if code == PREEMPTED or (was_asked and (code < 0 or (self._ranks > 1 and code not in (0, 2)))):
            self._record("stopped")
            return PREEMPTED
        done = code == 0 and state_of(self._run, self._folder) == "finished"
        self._record("finished" if done else "failed")
        return 0 if done else 1

    def _record(self, state: Literal["finished", "failed", "stopped"]) -> None:
        seconds = time.monotonic() - self._began
        self._lock.close()
        status = RunStatus(state=state, exit_code=self.process.returncode, seconds=round(seconds, 1))
        write_atomically(self._folder.status(self._run.name), json.dumps(status.model_dump()) + "\n")
        why = ""
        if state == "failed":
            log = self._folder.log(self._run.name)
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            why = f"  exit {self.process.returncode}: {lines[-1] if lines else 'no output'} ({log})"
        now = time.strftime("%H:%M:%S")
        _log.info("%s  %-8s  %s  %.0f s%s", now, state, self._run.name, seconds, why)


def _tracked(run: StudyRun, parent: Parent | None) -> Config:
    """The run's config, with its place in the study for the tracker."""
    update: dict[str, Any] = {"tags": run.config.tracking.tags | run.tags}
    if parent:
        update |= {"uri": parent.uri, "parent_run": parent.run_id}
    return run.config.model_copy(update={"tracking": run.config.tracking.model_copy(update=update)})


class _StopSignals:
    """While entered, SIGINT and SIGTERM are kept as `signal` instead of ending the program."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "_StopSignals":
        self._before = {number: signal.signal(number, self._keep) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number


def _end_all(running: Sequence[_Process]) -> None:
    """Ask the processes to end, as a scheduler would, and make those end that have not within the grace."""
    for run in running:
        _signal_group(run.process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for run in running:
        try:
            run.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(run.process, signal.SIGKILL)
            run.process.wait()
    for run in running:
        run.close(was_asked=True)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended in the meantime
        os.killpg(process.pid, number)
