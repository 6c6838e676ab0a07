"""Score predictions, or a run, against references: of the run's own data, or of any other.

    distseg evaluate RUN --to FOLDER [--data ROOT] [--split test]
    distseg evaluate FOLDER --config FILE --to FOLDER [--data ROOT]    # of masks, ID.png, that are there already

FOLDER gets report.html (scores with intervals, the worst and median cases, reliability), evaluation.json and
scores.csv; of a run also predictions/, which another start takes up. A run that is tracked gets the page and the means
in MLflow.

Exit codes: 0 done; 1 some images could not be scored, which the page lists; 2 bad arguments, one line on stderr.
"""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg.cli.predict import SOME_FAILED, add_run_arguments, check_run_arguments, run_share
from distseg.cli.process import say
from distseg.errors import UserError
from distseg.text import for_terminal

if TYPE_CHECKING:
    import numpy as np

    from distseg.config.schema import Config
    from distseg.data.sample import Problem, Sample
    from distseg.inference.report import Evaluation

logger = logging.getLogger(__name__)
_OF_DATA = ("layout", "expert", "follow_links", "classes", "ignore", "threshold", "split_seed")
SPLITS = ("train", "val", "test", "all")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    is_run = (arguments.source / "config.yaml").is_file()
    if not is_run and not arguments.config:
        raise UserError(
            f"{arguments.source}: is no run; for a folder of masks say with --config FILE how the data is read (a "
            "run's config.yaml serves)"
        )
    # Late: help must not wait for what a config needs.
    from distseg.config.load import load_config

    root = [f"data.root={arguments.data}"] if arguments.data else []
    config = load_config(arguments.config or arguments.source / "config.yaml", [*root, *arguments.keys])
    samples, problems = find_samples(config, arguments.split)
    arguments.to.mkdir(parents=True, exist_ok=True)
    network = None
    masks = arguments.source
    if is_run:
        masks = arguments.to / "predictions"
        network = predict_and_count(arguments, [*root, *arguments.keys], config, samples, masks)
    evaluation = evaluated(arguments, config, samples, problems, masks, network)
    return report(evaluation, arguments, config, masks, is_run)


def find_samples(config: "Config", split: str) -> "tuple[list[Sample], list[Problem]]":
    """Those of a split that have a reference. Raises UserError where there are none."""
    from distseg.data.survey import survey

    samples, problems = survey(config.data)
    chosen = [each for each in samples if each.reference is not None and split in ("all", each.split)]
    for problem in problems:
        logger.warning("%s", problem)
    if not chosen:
        raise UserError(f"{config.data.root}: its split {split} has no image with a reference; choose another --split")
    return chosen, problems


def predict_and_count(
    arguments: argparse.Namespace, keys: Sequence[str], config: "Config", samples: "list[Sample]", to: Path
) -> "np.ndarray":
    """Predict into `to`, with probabilities, and count at the network's resolution as training does."""
    from distseg.distributed.runtime import start_runtime, stop_runtime
    from distseg.inference.inputs import Item
    from distseg.inference.job import Job
    from distseg.inference.outputs import Outputs, Wanted
    from distseg.inference.predictor import Predictor, Settings
    from distseg.run_lock import run_lock
    from distseg.training.scoring import score

    settings = Settings(arguments.batch_size, arguments.flips, arguments.right_angles, arguments.precision)
    runtime = start_runtime()
    try:
        predictor = Predictor.of_run(
            arguments.source, runtime.device, settings, arguments.checkpoint, arguments.allow_import, keys
        )
        wanted = Wanted(probabilities="png" if config.data.class_count == 2 else "npz")
        items = sorted(Item(sample.id, sample.image) for sample in samples)
        job = Job(predictor, Outputs(to, wanted, predictor.data.decoding), items, [])
        job.check_folder()
        with run_lock(to, "evaluates into this folder now; wait for its end"):
            job.begin()
            run_share(job, runtime)
            job.finish()
        readable = [sample for sample in samples if job.outputs.mask(sample.id).is_file()]
        by_id = dict(zip((sample.id for sample in readable), score(
            predictor.network, readable, config.data, runtime, arguments.batch_size, sharded=False, own=False
        ).network, strict=True)) if readable else {}  # fmt: skip
    finally:
        stop_runtime()
    import numpy as np

    nowhere = np.full_like(next(iter(by_id.values()), np.zeros(4, np.int64)), -1)
    return np.array([by_id.get(sample.id, nowhere) for sample in samples])


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
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    check_run_arguments(parser, arguments, *_OF_DATA)
    if not 0 < arguments.tolerance < 1:
        parser.error(f"--tolerance {arguments.tolerance}: must be between 0 and 1")
    return arguments


def _lines(content: dict[str, Any]) -> list[str]:
    lines = [for_terminal(f"{content['title']}: {content['images']} images, {content['groups']} groups")]
    for part in ("own", "network"):
        for name in ("dice", "jaccard", "sensitivity", "specificity"):
            if part in content:
                value = content[part][name]
                lines.append(f"{part:8} {name:12} {value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]")
    if content.get("calibration", {}).get("bins"):
        lines.append(f"{'own':8} {'ECE':12} {content['calibration']['ece']:.4f}")
    return lines
