"""Predict masks of images with a trained run, at the images' own size.

    distseg predict RUN INPUT [INPUT …] --to FOLDER
    deepspeed launch/predict.py RUN INPUT … --to FOLDER        # on all GPUs, or on several ranks of the CPU

INPUT is an image, a folder, a table (.csv with the columns id and image), or - for a list on stdin, a path a line.
FOLDER gets masks/ID.png, of each image's own size and with the values that data.classes names (0 and 255 by default),
and table.csv: area, components, mean confidence, seconds. Start it again after a stop: what is done stays.

Exit codes: 0 done; 1 some images could not be predicted, which failed.csv lists; 2 bad arguments, one line on stderr.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from distseg.cli.process import INTERRUPTED, run_command, say_in_passing, tell, tell_error
from distseg.distributed.ending import leave
from distseg.errors import BadFileError, StorageError, UserError
from distseg.text import counted

if TYPE_CHECKING:
    from distseg.distributed.runtime import Runtime
    from distseg.inference.job import Job

SOME_FAILED = 1
_OF_INFERENCE = ("overlap", "threads", "max_pixels", "max_scans", "max_file_bytes", "orientation")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predict; returns the exit code. The process must then end by `leave`."""
    arguments = parse_arguments(argv, prog)
    return told_by_one(lambda: run(arguments))


def told_by_one(command: Callable[[], int]) -> int:
    """The exit code of a command that all ranks run; what ends it is told by one of them."""
    try:
        return command()
    except UserError as error:
        if _is_first_rank() or isinstance(error, BadFileError):
            tell_error(error)
        return 2
    except StorageError as error:
        tell_error(error)
        return 1
    except KeyboardInterrupt:
        if _is_first_rank():
            tell("interrupted; the same command goes on from here")
        return INTERRUPTED


def run(arguments: argparse.Namespace) -> int:
    """Join the other ranks, predict, and take leave of them; returns the exit code."""
    # Late: help must not wait for what torch takes to import.
    from distseg.distributed.collectives import FailedElsewhere
    from distseg.distributed.runtime import start_runtime, stop_runtime

    runtime = start_runtime()
    try:
        return predict(arguments, runtime)
    except FailedElsewhere:
        return 2
    finally:
        stop_runtime()


def predict(arguments: argparse.Namespace, runtime: "Runtime") -> int:
    from distseg.distributed.collectives import main_rank_first
    from distseg.run_lock import run_lock

    job = make_job(arguments, runtime)

    def begin(stack: ExitStack) -> None:
        if runtime.is_main:
            job.check_folder()
            stack.enter_context(run_lock(arguments.to, "predicts into this folder now; wait for its end"))
            job.begin()

    with ExitStack() as stack:
        main_rank_first(lambda: begin(stack), runtime.device)
        return finish(job, run_share(job, runtime), runtime)


def make_job(arguments: argparse.Namespace, runtime: "Runtime") -> "Job":
    """The same on every rank; rank 0 is the first to read the run and to list the files."""
    from distseg.distributed.collectives import gather_bytes, main_rank_first
    from distseg.inference.inputs import find_items
    from distseg.inference.job import Job
    from distseg.inference.outputs import Outputs, Wanted
    from distseg.inference.predictor import Predictor, Settings

    settings = Settings(arguments.batch_size, arguments.flips, arguments.right_angles, arguments.precision)
    listed = b""
    if "-" in arguments.inputs:
        listed = gather_bytes(sys.stdin.buffer.read() if runtime.is_main else b"", runtime.device)[0]

    def make() -> Job:
        predictor = Predictor.of_run(
            arguments.run, runtime.device, settings, arguments.checkpoint, arguments.allow_import, arguments.keys
        )
        wanted = Wanted(arguments.probabilities, arguments.contours, arguments.overlays)
        if wanted.probabilities == "png" and predictor.data.class_count > 2:
            raise UserError("--probabilities png: holds one class, and this run has several; choose npz")
        lines = os.fsdecode(listed).splitlines()
        items, problems = find_items([each for each in arguments.inputs if each != "-"], lines, arguments.to)
        return Job(predictor, Outputs(arguments.to, wanted, predictor.data.decoding), items, problems)

    return main_rank_first(make, runtime.device)


def run_share(job: "Job", runtime: "Runtime") -> int:
    """Predict this rank's share; how many files failed on all ranks."""
    import torch

    from distseg.distributed.collectives import sum_over_ranks

    shard = runtime.shard
    if runtime.is_main:
        for problem in job.problems:
            tell(f"warning: {problem}")
    hidden = not (runtime.is_main and sys.stderr.isatty())
    with tqdm(total=job.count(shard), unit="image", disable=hidden) as bar:
        failures = job.run(shard, bar.update)
    # Also the point at which every rank has written its journal.
    return int(sum_over_ranks(torch.tensor(len(failures), device=runtime.device)))


def finish(job: "Job", failed: int, runtime: "Runtime") -> int:
    failed += len(job.problems)
    if runtime.is_main:
        done, failed = job.finish()
        rest = f"; {failed} failed, {job.folder / 'failed.csv'}" if failed else ""
        say_in_passing(f"{job.folder}: {counted(done, 'image')}{rest}")
    return SOME_FAILED if failed else 0


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a trained run")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, table, or - for a list on stdin")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where the predictions go")
    add_run_arguments(parser)
    parser.add_argument("--probabilities", choices=("none", "png", "npz"), default="none",
                        help="png: 65535 · P(lesion), 16 bits; npz: every class, float16")  # fmt: skip
    parser.add_argument("--contours", choices=("none", "geojson", "coco"), default="none",
                        help="geojson: a file an image; coco: contours.json")  # fmt: skip
    parser.add_argument("--overlays", action="store_true", help="JPEGs of the images with outlines")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher appends it
    arguments = parser.parse_intermixed_args(argv)
    check_run_arguments(parser, arguments)
    return arguments


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """How a run's network is used, for every command that uses one."""
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or the number of a step")
    parser.add_argument("--batch-size", type=int, default=8, help="images, or tiles of one, at a time")
    parser.add_argument("--flips", action="store_true", help="average over mirror images")
    parser.add_argument("--right-angles", action="store_true", help="average over right angles")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is for GPUs")
    parser.add_argument("--allow-import", action="store_true", help="run the code that the run's model.name names")
    parser.add_argument("--set", dest="keys", action="append", default=[], metavar="data.KEY=VALUE",
                        help=f"another value for this command: {', '.join(_OF_INFERENCE)}")  # fmt: skip


def check_run_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *more: str) -> None:
    if arguments.batch_size < 1:
        parser.error(f"--batch-size {arguments.batch_size}: must be at least 1")
    known = (*_OF_INFERENCE, *more)
    for given in arguments.keys:
        key, equals, _ = given.partition("=")
        if not equals or key.removeprefix("data.").partition(".")[0] not in known or not key.startswith("data."):
            parser.error(f"{given}: must be data.KEY=VALUE with KEY one of {', '.join(known)}")


def _is_first_rank() -> bool:
    # Under srun a rank has no RANK before it starts.
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    leave(run_command(main))
