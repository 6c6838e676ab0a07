"""Find out which masks are wrong, and where, and have them drawn again.

    distseg audit RUN --to FOLDER                     # by the run's own network, which has learned from the masks
    distseg audit RUN --to FOLDER --folds 5           # by networks that have not: 5 trainings, taken up after a stop
    distseg audit RUN --to FOLDER --data ROOT         # the masks of other data

FOLDER gets report.html; table.csv, a row a mask, the most suspicious first, with the Dice that it is expected to have
with the truth; annotators.csv; proposals/ID.png, what is most probably there; and queue/, the images of the most
suspicious masks with proposals to be corrected, for Label Studio and CVAT. `distseg prepare ROOT --merge FORMAT=EXPORT`
takes what was drawn there as references. Start it again after a stop: what is done stays.

Exit codes: 0 done; 1 some masks could not be judged, which failed.csv lists; 2 bad arguments, one line on stderr;
75 the training of folds was stopped, and the same command goes on.
"""

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg.cli.predict import SOME_FAILED, add_run_arguments, check_run_arguments, run_share
from distseg.cli.process import run_command, say
from distseg.distributed.ending import leave
from distseg.errors import UserError
from distseg.text import for_terminal

if TYPE_CHECKING:
    from distseg.config.schema import Config
    from distseg.data.sample import Problem, Sample
    from distseg.distributed.runtime import Runtime
    from distseg.inference.audit.drawn import Drawn
    from distseg.inference.audit.folder import AuditFolder
    from distseg.inference.audit.model import Judge
    from distseg.inference.audit.verdicts import Verdict
    from distseg.inference.predictor import Settings

logger = logging.getLogger(__name__)
_LISTED = 10
_OF_DATA = ("layout", "expert", "follow_links", "classes", "ignore", "threshold", "split_seed", "clean_count", "on_bad")


@dataclass(frozen=True)
class Task:
    """What one network is to do."""

    name: str
    run: Path
    drawn: "Sequence[Drawn]"
    references: "Sequence[Sample]"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    # Late: help must not wait for what torch takes to import.
    from distseg.distributed.collectives import FailedElsewhere
    from distseg.distributed.runtime import start_runtime, stop_runtime

    runtime = start_runtime()
    try:
        return audit(arguments, runtime)
    except FailedElsewhere:
        return 2
    finally:
        stop_runtime()


def audit(arguments: argparse.Namespace, runtime: "Runtime") -> int:
    from distseg.distributed.collectives import main_rank_first
    from distseg.inference.audit.folder import AuditFolder
    from distseg.run_lock import run_lock

    if arguments.folds and runtime.shard.world_size > 1:
        raise UserError("--folds: its trainings are processes of their own; start it as one process, with --parallel")
    config = main_rank_first(lambda: configured(arguments), runtime.device)
    folder = AuditFolder(arguments.to)

    def begin(stack: ExitStack) -> None:
        if runtime.is_main:
            folder.check()
            stack.enter_context(run_lock(arguments.to, "audits into this folder now; wait for its end"))
            folder.begin(plan_of(arguments))

    with ExitStack() as stack:
        main_rank_first(lambda: begin(stack), runtime.device)
        tasks = main_rank_first(lambda: find_tasks(arguments, config, folder), runtime.device)
        if arguments.folds and (code := train(arguments, config, tasks, folder)):
            return code
        failed = sum(predict(task, arguments, folder, runtime) for task in tasks)
        if not runtime.is_main:
            return SOME_FAILED if failed else 0
        return conclude(arguments, config, folder, [judge_of(task, folder) for task in tasks])


def configured(arguments: argparse.Namespace) -> "Config":
    """The run's config, with the data that is audited. Other data brings its own masks."""
    from distseg.config.load import load_config
    from distseg.data.noise.none import NoNoise
    from distseg.labels.distances import MOST_CLASSES

    config = load_config(arguments.run / "config.yaml", arguments.keys)
    if config.data.class_count > MOST_CLASSES:
        raise UserError(
            f"{arguments.run}: has {config.data.class_count} classes; an audit takes {MOST_CLASSES} at most"
        )
    if not arguments.data:
        return config
    other: dict[str, Any] = {"root": arguments.data, "noise": NoNoise(), "cache": None}
    if not any(key.startswith("data.clean_count=") for key in arguments.keys):
        other["clean_count"] = None
    return config.model_copy(update={"data": config.data.model_copy(update=other)})


def plan_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "run": str(arguments.run),
        "checkpoint": arguments.checkpoint,
        "data": str(arguments.data or ""),
        "folds": arguments.folds,
        "settings": asdict(settings_of(arguments)),
        "keys": arguments.keys,
    }


def settings_of(arguments: argparse.Namespace) -> "Settings":
    from distseg.inference.predictor import Settings

    return Settings(arguments.batch_size, arguments.flips, arguments.right_angles, arguments.precision)


def find_tasks(arguments: argparse.Namespace, config: "Config", folder: "AuditFolder") -> list[Task]:
    """What each network is to judge, and on what it is calibrated."""
    from distseg.config.load import load_config
    from distseg.data.splits import fold_of
    from distseg.inference.audit.drawn import drawn_elsewhere, drawn_in_training
    from distseg.study.folds import fold_runs

    if not arguments.folds:
        if not arguments.data:
            return [Task("run", arguments.run, *drawn_in_training(config, arguments.run))]
        own = load_config(arguments.run / "config.yaml")
        return [Task("run", arguments.run, drawn_elsewhere(config), calibration_images(own, arguments))]
    drawn, references = drawn_in_training(config, arguments.to if arguments.data else arguments.run)
    runs = fold_runs(config, [each.sample for each in drawn], arguments.folds)
    seed = config.data.split_seed
    return [
        Task(
            f"fold_{index}",
            folder.folds / run.name,
            [each for each in drawn if fold_of(each.sample, arguments.folds, seed) == index],
            references,
        )
        for index, run in runs.items()
    ]


def calibration_images(config: "Config", arguments: argparse.Namespace) -> "list[Sample]":
    """The validation images of the run's own data; none, with a warning, where they are not here."""
    from distseg.inference.audit.drawn import drawn_in_training

    try:
        return drawn_in_training(config, arguments.run)[1]
    except UserError as error:
        logger.warning("the network is believed as it is, for the images to calibrate it on are not here: %s", error)
        return []


def train(arguments: argparse.Namespace, config: "Config", tasks: Sequence[Task], folder: "AuditFolder") -> int:
    """The networks of the folds; an exit code, 0 where all are there."""
    from distseg.models.registry import build_model
    from distseg.study.folds import fold_runs, train_folds

    build_model(config.model, arguments.allow_import, config.data.class_count)  # refuses code that is not allowed
    samples = [each.sample for task in tasks for each in task.drawn]
    return train_folds([*fold_runs(config, samples, arguments.folds).values()], folder.folds, arguments.parallel)


def predict(task: Task, arguments: argparse.Namespace, folder: "AuditFolder", runtime: "Runtime") -> int:
    """This network's logits of the images that it judges and of those that it is calibrated on; how many failed."""
    from distseg.distributed.collectives import main_rank_first
    from distseg.inference.inputs import Item
    from distseg.inference.job import Job
    from distseg.inference.outputs import Outputs, Wanted
    from distseg.inference.predictor import Predictor

    which = "last" if arguments.folds else arguments.checkpoint
    predictor = main_rank_first(
        lambda: Predictor.of_run(
            task.run, runtime.device, settings_of(arguments), which, arguments.allow_import, arguments.keys
        ),
        runtime.device,
    )
    failed = 0
    for to, samples in ((folder.images(task.name), [each.sample for each in task.drawn]),
                        (folder.calibration(task.name), task.references)):  # fmt: skip
        items = sorted(Item(sample.id, sample.image) for sample in samples)
        job = Job(predictor, Outputs(to, Wanted("logits"), predictor.data.decoding), items, [])
        main_rank_first(job.begin if runtime.is_main else _nothing, runtime.device)
        failed += run_share(job, runtime)
        if runtime.is_main:
            job.finish()
    return failed


def judge_of(task: Task, folder: "AuditFolder") -> "Judge":
    from distseg.inference.audit.model import Judge

    images, calibration = folder.images(task.name), folder.calibration(task.name)
    return Judge(
        task.name,
        task.drawn,
        images / "probabilities",
        images / "masks",
        calibration / "probabilities",
        task.references,
    )


def conclude(arguments: argparse.Namespace, config: "Config", folder: "AuditFolder", judges: "list[Judge]") -> int:
    """Fit the label model, judge every mask, and write what was found."""
    from tqdm import tqdm

    from distseg.data.sample import Problem
    from distseg.inference.audit.model import fit
    from distseg.inference.audit.outcome import Audit
    from distseg.inference.audit.report import ranked, write_report
    from distseg.inference.audit.verdicts import judge_masks

    data = config.data
    model = fit(judges, data.decoding, data.class_count)
    count = sum(len(judge.drawn) for judge in judges)
    problems: list[Problem] = []
    found: list[Verdict] = []
    judged = judge_masks(judges, model, folder.proposals, data.decoding, data.threads)
    for each in tqdm(judged, total=count, unit="image", disable=None):
        if isinstance(each, Problem):
            problems.append(each)
        else:
            found += each
    title = f"Audit of {config.data.root.name} by {arguments.run.resolve().name}"
    outcome = Audit(title, _how(arguments), judges, model, ranked(found), sorted(problems, key=_place))
    queued = write_report(outcome, folder, data, arguments.shown, arguments.queue)
    for problem in problems:
        logger.warning("%s", problem)
    say("\n".join(_lines(outcome.verdicts, queued, folder)))
    return SOME_FAILED if problems else 0


def _nothing() -> None:
    """For the ranks that wait for another."""


def _place(problem: "Problem") -> tuple[str, str]:
    return problem.id, problem.file


def _how(arguments: argparse.Namespace) -> str:
    if arguments.folds:
        return (
            f"Each mask is judged by a network that has learned from neither it nor its group: {arguments.folds} folds."
        )
    if arguments.data:
        return "The masks are judged by the network of a run that was trained on other data."
    return "The masks are judged by the network that has learned from them; with --folds by networks that have not."


def _lines(verdicts: "Sequence[Verdict]", queued: int, folder: "AuditFolder") -> list[str]:
    lines = []
    for rank, each in enumerate(verdicts[:_LISTED], start=1):
        by = f" by {each.annotator}" if each.annotator else ""
        lines.append(for_terminal(f"{rank:3d}  expected Dice {each.expected_dice:.3f}  {each.drawn.sample.id}{by}"))
    if verdicts:
        mean = sum(each.expected_dice for each in verdicts) / len(verdicts)
        lines.append(f"{len(verdicts)} masks, mean expected Dice {mean:.3f}")
    lines.append(f"queue   {folder.queue}: {queued} images to be drawn again")
    lines.append(f"page    {folder.page}")
    return lines


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="other data than the run's")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="train N networks, each without a fold")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="folds that are trained at once")
    parser.add_argument("--queue", type=int, default=50, metavar="N", help="images to be drawn again")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    parser.add_argument("--shown", type=int, default=40, metavar="N", help="masks with pictures on the page")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    check_run_arguments(parser, arguments, *_OF_DATA)
    if arguments.folds and arguments.folds < 2:
        parser.error(f"--folds {arguments.folds}: must be at least 2")
    if arguments.folds and arguments.checkpoint != "last":
        parser.error(f"--checkpoint {arguments.checkpoint}: is of the run, and --folds trains networks of their own")
    if arguments.parallel != 1 and not arguments.folds:
        parser.error(f"--parallel {arguments.parallel}: is for --folds")
    for name, least in (("parallel", 1), ("queue", 0), ("shown", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    return arguments


if __name__ == "__main__":
    leave(run_command(main))
