"""Run a study: every run of its plan as a process of launch/train.py, and the report of what came out.

    python launch/sweep.py configs/experiments/isic2017_cpu.yaml data.root=PATH [section.key=value …]
    python launch/sweep.py … --parallel 2          # two runs at once, on disjoint cores (and GPUs)
    python launch/sweep.py … --list                # index, name and state of each run
    python launch/sweep.py … --index 7             # one run, for a Slurm job array: --index $SLURM_ARRAY_TASK_ID
    python launch/sweep.py … --report              # only the report of what there is

Everything goes into RUNS_DIR/NAME/, one folder a run. Give the same command again after an interruption: runs that
have finished, which their config's hash tells, are not made again, and those that were stopped go on from their last
checkpoint. A run that fails is recorded, and the rest go on. The report is made from the run folders; with
tracking.mlflow=false the study needs no MLflow at all.

Exit codes: 0 all done; 1 a run failed; 2 bad config or data; 75 stopped by a signal, or a run was pre-empted.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.cli.process import say, say_in_passing
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.study.folder import StudyFolder

if TYPE_CHECKING:
    from distseg.study.plan import StudyConfig, StudyRun
    from distseg.study.scheduler import State
    from distseg.tracking.mlflow import Study

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    # Late: help must not wait for what a config needs.
    from distseg.study.plan import load_study
    from distseg.study.scheduler import PREEMPTED, Parent, run_all, share_machine, state_of

    study, runs = load_study(arguments.config, arguments.overrides)
    folder = StudyFolder(arguments.runs_dir / study.name)
    if arguments.list:
        for index, run in enumerate(runs):
            say(f"{index:4d}  {state_of(run, folder):8s}  {run.name}")
        return 0
    if arguments.index is not None and not 0 <= arguments.index < len(runs):
        raise UserError(f"--index {arguments.index}: the study has the runs 0 to {len(runs) - 1}")
    places = share_machine(arguments.parallel, study.ranks)
    tracked = open_study(study, runs, folder, arguments.config)
    if arguments.report:
        make_report(folder, tracked)
        return 0
    chosen = runs if arguments.index is None else [runs[arguments.index]]
    parent = Parent(tracked.uri, tracked.run_id) if tracked else None
    code = run_all(chosen, folder, parent, study.ranks, places)
    if arguments.index is None:
        states = [state_of(run, folder) for run in runs]
        if code != PREEMPTED and "finished" in states:
            make_report(folder, tracked)
        if tracked:
            close_study(tracked, states, code)
    return code


def open_study(study: "StudyConfig", runs: "list[StudyRun]", folder: StudyFolder, config: Path) -> "Study | None":
    """Write the plan, and open the study's MLflow run, one for all tasks of a job array; None with tracking off."""
    from distseg.study.plan import plan_json
    from distseg.study.scheduler import lock_file
    from distseg.tracking.mlflow import Study, store_of

    folder.make()
    first = runs[0].config
    about = (
        f"{len(runs)} runs: {', '.join(study.methods)}; noise {', '.join(noise.level for noise in study.noise)}; "
        f"K = {', '.join(map(str, study.clean_counts))}; seeds {', '.join(map(str, study.seeds))}."
    )
    lock = lock_file(folder.lock, wait=True)
    assert lock is not None  # it has waited
    with lock:
        write_atomically(folder.plan, plan_json(study, runs))
        if not first.tracking.mlflow:
            return None
        tracked = Study.open(store_of(first), first.tracking.experiment, study.name, about, folder.path)
        tracked.log_file(folder.plan)
        tracked.log_file(config)
    return tracked


def close_study(tracked: "Study", states: "list[State]", code: int) -> None:
    from distseg.study.scheduler import PREEMPTED

    with tracking_may_fail():
        tracked.log_metrics({f"runs/{state}": states.count(state) for state in ("finished", "failed")})
        tracked.log_metrics({"runs/planned": len(states)})
        tracked.finish("FINISHED" if code == 0 else "KILLED" if code == PREEMPTED else "FAILED")


def make_report(folder: StudyFolder, tracked: "Study | None") -> None:
    # Late: it takes the seconds that matplotlib and torch take to import.
    from distseg.study.local import LocalRuns
    from distseg.study.report import write_report

    report = write_report(LocalRuns(folder), str(folder.path), folder.report)
    say_in_passing(report.text)
    if tracked:
        with tracking_may_fail():
            for file in report.files:
                tracked.log_file(file, "report")


@contextmanager
def tracking_may_fail() -> Iterator[None]:
    """Once the runs are made, a server that has gone is a warning: their folders hold everything that it lacks."""
    try:
        yield
    except UserError as error:
        _log.warning("%s", error)


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a YAML file of configs/experiments/")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs/<name>/ goes")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="name the runs and their states, and make none")
    what.add_argument("--index", type=int, metavar="I", help="make the run of this index only, and no report")
    what.add_argument("--report", action="store_true", help="write the report of what has finished, and make no run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.parallel < 1:
        parser.error("--parallel must be 1 or more")
    return arguments
