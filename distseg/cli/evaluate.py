"""Score predictions, or a run, against references: of the run's own data, or of any other.

    distseg evaluate RUN --to FOLDER [--data ROOT] [--split test] [data.KEY=VALUE …]
    distseg evaluate FOLDER --config FILE --to FOLDER [--data ROOT]    # of masks, ID.png, that are there already
    deepspeed launch/evaluate.py RUN --to FOLDER                       # on all GPUs, or on several ranks of the CPU

FOLDER gets report.html (scores with intervals, the worst and median cases, reliability), evaluation.json and
scores.csv; of a run also predictions/, which another start takes up. A run that is tracked gets the page and the means
in MLflow.

Exit codes: 0 done; 1 some images could not be scored, which the page lists; 2 bad arguments, one line on stderr.
"""

import argparse
import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg.cli.predict import SOME_FAILED, add_run_arguments, check_run_arguments, run_share, told_by_one
from distseg.cli.process import say
from distseg.errors import UserError
from distseg.text import counted, for_terminal

if TYPE_CHECKING:
    import numpy as np

    from distseg.config.schema import Config
    from distseg.data.sample import Problem, Sample
    from distseg.distributed.runtime import Runtime
    from distseg.inference.report import Evaluation

logger = logging.getLogger(__name__)
_OF_DATA = ("root", "layout", "expert", "follow_links", "classes", "ignore", "threshold", "split_seed")
SPLITS = ("train", "val", "test", "all")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    return told_by_one(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    is_run = (arguments.source / "config.yaml").is_file()
    if not is_run and not arguments.config:
        raise UserError(
            f"{arguments.source}: is no run; for a folder of masks say with --config FILE how the data is read (a "
            "run's config.yaml serves)"
        )
    # Late: help must not wait for what a config needs.
    from distseg.config.load import load_config

    if arguments.data:
        arguments.keys.insert(0, f"data.root={arguments.data}")
    config = load_config(arguments.config or arguments.source / "config.yaml", arguments.keys)
    if is_run:
        return evaluate_run(arguments, config)
    samples, problems = find_samples(config, arguments.split)
    arguments.to.mkdir(parents=True, exist_ok=True)
    evaluation = evaluated(arguments, config, samples, problems, arguments.source, None)
    return report(evaluation, arguments, config, arguments.source, is_run=False)


def evaluate_run(arguments: argparse.Namespace, config: "Config") -> int:
    """Ranks share the network's work; rank 0 scores the masks and writes the report, and the others end before it."""
    from distseg.distributed.collectives import FailedElsewhere, main_rank_first
    from distseg.distributed.runtime import start_runtime, stop_runtime

    runtime = start_runtime()
    try:
        samples, problems = main_rank_first(lambda: find_samples(config, arguments.split), runtime.device)
        masks = arguments.to / "predictions"
        network = predict_and_count(arguments, config, samples, masks, runtime)
    except FailedElsewhere:
        return 2
    finally:
        stop_runtime()
    if not runtime.is_main:
        return 0
    evaluation = evaluated(arguments, config, samples, problems, masks, network)
    return report(evaluation, arguments, config, masks, is_run=True)


def find_samples(config: "Config", split: str) -> "tuple[list[Sample], list[Problem]]":
    """Those of a split that have a reference. Raises UserError where there are none."""
    from distseg.data.survey import survey

    samples, problems = survey(config.data)
    chosen = [each for each in samples if each.reference is not None and split in ("all", each.split)]
    if not chosen:
        raise UserError(f"{config.data.root}: its split {split} has no image with a reference; choose another --split")
    return chosen, problems


def predict_and_count(
    arguments: argparse.Namespace, config: "Config", samples: "list[Sample]", to: Path, runtime: "Runtime"
) -> "np.ndarray":
    """Predict into `to`, with probabilities, and count at the network's resolution as training does."""
    import numpy as np

    from distseg.distributed.collectives import gather_bytes, main_rank_first
    from distseg.inference.inputs import Item
    from distseg.inference.job import Job
    from distseg.inference.outputs import Outputs, Wanted
    from distseg.inference.predictor import Predictor, Settings
    from distseg.run_lock import run_lock
    from distseg.training.scoring import score

    settings = Settings(arguments.batch_size, arguments.flips, arguments.right_angles, arguments.precision)

    def begin(stack: ExitStack) -> Job:
        predictor = Predictor.of_run(
            arguments.source, runtime.device, settings, arguments.checkpoint, arguments.allow_import, arguments.keys
        )
        wanted = Wanted(probabilities="png" if config.data.class_count == 2 else "npz")
        items = sorted(Item(sample.id, sample.image) for sample in samples)
        job = Job(predictor, Outputs(to, wanted, predictor.data.decoding), items, [])
        if runtime.is_main:
            to.parent.mkdir(parents=True, exist_ok=True)
            job.check_folder()
            stack.enter_context(run_lock(to, "evaluates into this folder now; wait for its end"))
            job.begin()
        return job

    with ExitStack() as stack:
        job = main_rank_first(lambda: begin(stack), runtime.device)
        run_share(job, runtime)
        if runtime.is_main:
            job.finish()
    # Rank 0 says which there are: on a shared disk another may see a file later.
    there = bytes(job.outputs.mask(sample.id).is_file() for sample in samples)
    there = gather_bytes(there, runtime.device)[0]
    readable = [sample for sample, is_there in zip(samples, there, strict=True) if is_there]
    if not readable:
        return np.full((len(samples), 4), -1)
    counts = score(
        job.predictor.network, readable, config.data, runtime, arguments.batch_size, sharded=False, own=False
    ).network
    found = np.full((len(samples), *counts.shape[1:]), -1, counts.dtype)
    found[np.frombuffer(there, np.bool_)] = counts
    return found


def evaluated(
    arguments: argparse.Namespace,
    config: "Config",
    samples: "list[Sample]",
    problems: "list[Problem]",
    masks: Path,
    network: "np.ndarray | None",
) -> "Evaluation":
    from tqdm import tqdm

    from distseg.inference.report import Evaluation
    from distseg.inference.scores import Scored, score_masks

    tolerance = None if arguments.no_surfaces else arguments.tolerance
    found = score_masks(samples, masks, config.data.decoding, tolerance, config.data.threads)
    scored, counted = [], []
    for place, each in enumerate(tqdm(found, total=len(samples), unit="image", disable=None)):
        if isinstance(each, Scored):
            scored.append(each)
            counted.append(place)
        else:
            problems.append(each)
    title = f"{arguments.source.resolve().name} on {config.data.root.name}, {arguments.split}"
    rows = None if network is None or not counted else network[counted]
    return Evaluation(title, config.data.class_names, scored, rows, problems, tolerance)


def report(evaluation: "Evaluation", arguments: argparse.Namespace, config: "Config", masks: Path, is_run: bool) -> int:
    from distseg.inference.report import figures_of, write_report

    folder = masks / "masks" if (masks / "masks").is_dir() else masks

    def mask_of(sample: "Sample") -> Path:
        return folder / f"{sample.id}.png"

    files = write_report(evaluation, arguments.to, mask_of, config.data.decoding)
    content = figures_of(evaluation)
    if is_run and config.tracking.mlflow and not arguments.no_tracking:
        track(content, files, arguments.source, config, arguments.split)
    for problem in evaluation.problems:
        logger.warning("%s", problem)
    say("\n".join(_lines(content)))
    say(str(arguments.to / "report.html"))
    return SOME_FAILED if evaluation.problems else 0


def track(content: dict[str, Any], files: Sequence[Path], run: Path, config: "Config", split: str) -> None:
    """Beside the run in MLflow. That it cannot be reached is told, and no failure: the files are there."""
    from distseg.inference.report import flat_metrics
    from distseg.run_folder import RunFolder
    from distseg.tracking.mlflow import Study, store_of

    id_file = RunFolder(run).mlflow_run_id
    if not id_file.is_file():
        logger.warning("%s: has no run in MLflow; the evaluation is in its files alone", run)
        return
    try:
        tracked = Study(store_of(config), id_file.read_text().strip())
        data = re.sub(r"[^A-Za-z0-9_.-]", "_", config.data.root.name)  # names of metrics take no others
        tracked.log_metrics(flat_metrics(content, f"evaluate/{data}/{split}"))
        for file in files:
            tracked.log_file(file, "evaluation")
    except UserError as error:
        logger.warning("the evaluation is in its files alone: %s", error)


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN|FOLDER", help="a trained run, or a folder of masks")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="other data than the config's")
    parser.add_argument("--config", type=Path, metavar="FILE", help="how the data is read, if the source is no run")
    parser.add_argument("--split", choices=SPLITS, default="test", help="all: every image with a reference")
    parser.add_argument("--tolerance", type=float, default=0.005, metavar="SHARE",
                        help="of the surface Dice, as a share of the image's diagonal")  # fmt: skip
    parser.add_argument("--no-surfaces", action="store_true", help="no Hausdorff distances and surface Dice")
    parser.add_argument("--no-tracking", action="store_true", help="nothing to MLflow")
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="as --set, and data.root")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    add_run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    arguments.keys += arguments.overrides
    check_run_arguments(parser, arguments, *_OF_DATA)
    if not 0 < arguments.tolerance < 1:
        parser.error(f"--tolerance {arguments.tolerance}: must be between 0 and 1")
    return arguments


def _lines(content: dict[str, Any]) -> list[str]:
    lines = [
        for_terminal(f"{content['title']}: {counted(content['images'], 'image')}, ")
        + counted(content["groups"], "group")
    ]
    for part in ("own", "network"):
        for name in ("dice", "jaccard", "sensitivity", "specificity"):
            if part in content:
                value = content[part][name]
                lines.append(f"{part:8} {name:12} {value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]")
    if content.get("calibration", {}).get("bins"):
        lines.append(f"{'own':8} {'ECE':12} {content['calibration']['ece']:.4f}")
    return lines
