"""Run a study: every child of a grid as a process of launch/train.py, and the report of what came out.

    python launch/sweep.py configs/experiments/isic2017_cpu.yaml data.root=PATH [section.key=value …]
    python launch/sweep.py … --parallel 2          # two children at once, on disjoint cores (and GPUs)
    python launch/sweep.py … --list                # index, name and state of each child
    python launch/sweep.py … --index 7             # one child, for a Slurm job array: --index $SLURM_ARRAY_TASK_ID
    python launch/sweep.py … --report              # only the report of what there is

Everything goes into RUNS_DIR/NAME/, one folder a child. Run the same command again after an interruption: children that
have finished, which their config's hash tells, are not run again, and those that were stopped go on from their last
checkpoint. A child that fails is recorded, and the rest go on.

Exit codes: 0 all done; 1 a child failed; 2 bad config or data; 75 stopped by a signal, or a child was pre-empted.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from distseg.config.load import config_hash, dump_config, load_config
from distseg.config.schema import Config
from distseg.config.sweep import Child, SweepConfig, load_sweep
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.tracking.mlflow import Study, store_of

TRAIN = Path(__file__).with_name("train.py")
PREEMPTED = 75
GRACE = 120
"""Seconds that children have, after a signal, to end by themselves."""


def main() -> int:
    arguments = parse_arguments()
    try:
        sweep, children = load_sweep(arguments.config, arguments.overrides)
        folder = arguments.runs_dir / sweep.name
        if arguments.list:
            for index, child in enumerate(children):
                print(f"{index:4d}  {state_of(child, folder):8s}  {child.name}")
            return 0
        if arguments.index is not None and not 0 <= arguments.index < len(children):
            raise UserError(f"--index {arguments.index}: the study has the children 0 to {len(children) - 1}")
        places = share_machine(arguments.parallel, sweep.ranks)
        study = open_study(sweep, children, folder, arguments)
        if arguments.report:
            print(report(study, folder))
            return 0
        chosen = children if arguments.index is None else [children[arguments.index]]
        code = run_all(chosen, folder, study, sweep.ranks, places)
        if arguments.index is None:
            states = finish(study, children, folder, code)
            if code != PREEMPTED and "finished" in states:
                print(report(study, folder))
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


@dataclass(frozen=True)
class Place:
    """The share of the machine that one child gets."""

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
        raise UserError(f"--parallel {parallel}: {len(cores)} cores are at hand; run at most as many children at once")
    if devices and parallel * ranks > len(devices):
        raise UserError(f"--parallel {parallel}: it takes a GPU a rank, {parallel * ranks}; there are {len(devices)}")
    return [Place(tuple(cores[i::parallel]), tuple(devices[i::parallel][:ranks])) for i in range(parallel)]


def state_of(child: Child, folder: Path) -> str:
    """finished (its result is there), failed, stopped (part of it is there) or new."""
    run = folder / child.name
    if (run / "result.json").exists() and config_hash(load_config(run / "config.yaml")) == config_hash(child.config):
        return "finished"
    if status_file(child, folder).exists():
        recorded = json.loads(status_file(child, folder).read_text())["state"]
        if recorded != "finished":  # its folder may have been removed, to run it again
            return recorded
    return "stopped" if (run / "config.yaml").exists() else "new"


def status_file(child: Child, folder: Path) -> Path:
    return folder / "status" / f"{child.name}.json"


def open_study(sweep: SweepConfig, children: list[Child], folder: Path, arguments: argparse.Namespace) -> Study:
    """The MLflow run of the study, with its plan; one for all tasks of a job array."""
    for room in ("configs", "logs", "status", "locks"):
        (folder / room).mkdir(parents=True, exist_ok=True)
    first: Config = children[0].config
    about = (
        f"{len(children)} runs: {', '.join(sweep.methods)}; noise {', '.join(noise.level for noise in sweep.noise)}; "
        f"K = {', '.join(map(str, sweep.clean_counts))}; seeds {', '.join(map(str, sweep.seeds))}."
    )
    with (folder / "locks" / "study").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        study = Study.open(store_of(first), first.tracking.experiment, sweep.name, about, folder)
        plan = {
            "name": sweep.name,
            "methods": list(sweep.methods),
            "champion": sweep.champion,
            "noise": [noise.level for noise in sweep.noise],
            "clean_counts": list(sweep.clean_counts),
            "seeds": list(sweep.seeds),
            "children": [{"name": child.name, **child.tags} for child in children],
        }
        write_atomically(folder / "plan.json", json.dumps(plan, indent=2) + "\n")
        study.log_file(folder / "plan.json")
        study.log_file(arguments.config)
    return study


def run_all(children: list[Child], folder: Path, study: Study, ranks: int, places: list[Place]) -> int:
    """Run what is left, one child a place; returns this program's exit code."""
    waiting = [child for child in children if state_of(child, folder) != "finished"]
    print(f"{len(children) - len(waiting)} of {len(children)} children have finished before", flush=True)
    running: dict[Place, Running] = {}
    code, stopped = 0, StopSignals()
    with stopped:
        while waiting or running:
            if stopped.signal or code == PREEMPTED:
                end_all(list(running.values()))
                for run in running.values():
                    run.close("stopped")
                return PREEMPTED
            for place in places:
                if place not in running and (lock := lock_one(waiting, folder)):
                    running[place] = Running(waiting.pop(0), folder, study, ranks, place, lock)
            time.sleep(0.05)
            for place, run in list(running.items()):
                exit_code = run.process.poll()
                if exit_code is None:
                    continue
                del running[place]
                if exit_code == PREEMPTED:
                    run.close("stopped")
                    code = PREEMPTED
                else:
                    done = exit_code == 0 and state_of(run.child, folder) == "finished"
                    run.close("finished" if done else "failed")
                    code = code if done else max(code, 1)
    return code


def lock_one(waiting: list[Child], folder: Path) -> IO[str] | None:
    """Bring a child to the front whose lock is free, and take it: other sweeps may run, or have left a child behind."""
    for index, child in enumerate(waiting):
        lock = (folder / "locks" / child.name).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            waiting.insert(0, waiting.pop(index))
            return lock
    return None


class Running:
    """A child's process. It inherits its lock, which is free again once the process is gone, however it went."""

    def __init__(self, child: Child, folder: Path, study: Study, ranks: int, place: Place, lock: IO[str]) -> None:
        self.child, self.folder, self.lock, self.began = child, folder, lock, time.monotonic()
        tracking = child.config.tracking.model_copy(
            update={"uri": study.uri, "parent_run": study.run_id, "tags": child.config.tracking.tags | child.tags}
        )
        written = folder / "configs" / f"{child.name}.yaml"
        write_atomically(written, dump_config(child.config.model_copy(update={"tracking": tracking})))
        begun = (folder / child.name / "config.yaml").exists()
        print(f"{time.strftime('%H:%M:%S')}  {'goes on ' if begun else 'starts  '}  {child.name}", flush=True)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*launcher(ranks), TRAIN, "--config", written, "--runs-dir", folder, *(["--resume"] if begun else [])],
                env=child_environment() | place.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
                preexec_fn=lambda: os.sched_setaffinity(0, place.cores),
            )

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.child.name}.log"

    def close(self, state: str) -> None:
        seconds = time.monotonic() - self.began
        self.lock.close()
        status = {"state": state, "exit_code": self.process.returncode, "seconds": round(seconds, 1)}
        write_atomically(status_file(self.child, self.folder), json.dumps(status) + "\n")
        why = ""
        if state == "failed":
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            why = f"  exit {self.process.returncode}: {lines[-1] if lines else 'no output'} ({self.log})"
        print(f"{time.strftime('%H:%M:%S')}  {state:8s}  {self.child.name}  {seconds:.0f} s{why}", flush=True)


class StopSignals:
    """While entered, SIGINT and SIGTERM are kept as `signal` instead of ending the program."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> None:
        self.before = {number: signal.signal(number, self._keep) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, _frame) -> None:
        self.signal = number


def end_all(running: list[Running]) -> None:
    """Ask the children to end, as a scheduler would, and make those end that have not within the grace."""
    for run in running:
        os.killpg(run.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for run in running:
        try:
            run.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    from distseg.distributed.runtime import free_port

    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*runner, "--master_port", str(free_port())]


def child_environment() -> dict[str, str]:
    """This process's variables, less what would make a child think that it is somebody's rank."""
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in ranks}


def finish(study: Study, children: list[Child], folder: Path, code: int) -> list[str]:
    """Close the study's MLflow run; returns the children's states."""
    states = [state_of(child, folder) for child in children]
    study.log_metrics({"children/planned": len(states), "children/finished": states.count("finished")})
    study.log_metrics({"children/failed": states.count("failed")})
    study.finish("FINISHED" if code == 0 else "KILLED" if code == PREEMPTED else "FAILED")
    return states


def report(study: Study, folder: Path) -> str:
    # Late: it takes the seconds that matplotlib and torch take to import.
    from distseg.evaluation.study import write_report

    return write_report(study, folder / "report")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a YAML file of configs/experiments/")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs/<name>/ goes")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="children at once")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="name the children and their states, and run nothing")
    what.add_argument("--index", type=int, metavar="I", help="run the child of this index only, and write no report")
    what.add_argument("--report", action="store_true", help="write the report of what has finished, and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every child")
    arguments = parser.parse_intermixed_args()
    if arguments.parallel < 1:
        parser.error("--parallel must be 1 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
