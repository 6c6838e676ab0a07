"""Bad files are found before training, all of them, and refused or left out by name."""

import csv
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distseg.data.cache import open_cache
from distseg.data.config import DataConfig
from distseg.data.decode import check_image, check_mask
from distseg.data.sample import SPLITS, Problem, Sample, first_of
from distseg.data.survey import survey
from distseg.errors import BadFileError, UserError
from distseg.files import write_atomically

LEFT_OUT = "left_out.csv"
"""In a run's folder under `data.on_bad=skip`: id, file and reason of every sample that it does without."""


def usable_samples(config: DataConfig, folder: Path, check: bool) -> list[Sample]:
    """The samples to train and score with, sorted by id: the same on every rank, where the main rank comes first.

    With `check` every file is decoded, unless `config.cache` shows that `prepare` has done so. What is bad is refused,
    or left out and written to `folder`, where the ranks that do not check find it.

    Raises UserError, one line, for the first bad file, for a split without samples, for a cache that does not fit the
    data and where a run is resumed and other files are bad than when it began.
    """
    samples, problems = survey(config)
    if config.on_bad == "refuse":
        if check and not problems:
            problems = _look_into_files(samples, config)
        if problems:
            raise UserError(first_of(problems))
    else:
        record = folder / LEFT_OUT
        if check or not record.exists():
            problems += _look_into_files(samples, config)
            _record(problems, record)
            if problems and check:
                count = len({problem.id for problem in problems})
                print(f"left out {count} samples, {record}: {first_of(problems)}", file=sys.stderr)
        with record.open(newline="") as file:
            left_out = {row["id"] for row in csv.DictReader(file)}
        samples = [sample for sample in samples if sample.id not in left_out]
    check_splits(samples)
    return samples


def check_splits(samples: list[Sample]) -> None:
    for split in SPLITS:
        if not any(sample.split == split for sample in samples):
            key = "rows of that split" if split == "train" else f"rows of that split, or a larger data.{split}_fraction"
            raise UserError(f"data: the {split} split is empty; it needs {key}")


def find_bad_files(samples: list[Sample], threads: int) -> list[Problem]:
    """Every file that is missing, empty, truncated, no image, not of its image's size, not binary or of an odd kind.

    Each file is decoded once, by `threads` threads, so that no more images than that are in memory. By id.
    """
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(_find_problems, sorted(samples, key=lambda sample: sample.id))
        return [problem for problems in found for problem in problems]


def problems_table(problems: list[Problem]) -> str:
    """CSV with the columns id, file, reason."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "file", "reason"])
    rows.writerows([problem.id, problem.file, problem.reason] for problem in problems)
    return table.getvalue()


def _look_into_files(samples: list[Sample], config: DataConfig) -> list[Problem]:
    cache = open_cache(config)
    if cache is None:
        return find_bad_files(samples, config.threads)
    bad = {problem.id for problem in cache.left_out}
    cache.check_holds([sample for sample in samples if sample.id not in bad], config)
    return [problem for problem in cache.left_out if problem.id in {sample.id for sample in samples}]


def _find_problems(sample: Sample) -> list[Problem]:
    problems, sizes = [], {}
    for kind, path in sample.files.items():
        try:
            sizes[kind] = check_image(path) if kind == "image" else check_mask(path)
        except BadFileError as error:
            problems.append(Problem(sample.id, str(path), str(error).removeprefix(f"{path}: ")))
    width, height = sizes.pop("image", (0, 0))
    for kind, size in sizes.items():
        if width and size != (width, height):
            reason = (
                f"mask is {size[0]}×{size[1]} and its image {sample.image.name} {width}×{height}; "
                "resample the mask, nearest neighbour"
            )
            problems.append(Problem(sample.id, str(sample.files[kind]), reason))
    return problems


def _record(problems: list[Problem], record: Path) -> None:
    content = problems_table(problems)
    if record.exists() and record.read_text() != content:
        raise UserError(f"{record}: other files are bad now than when this run began; mend them, or take another name=")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, content)
