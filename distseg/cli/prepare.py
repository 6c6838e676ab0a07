"""Look through a data set before training on it, and decode its originals once and for all.

    python launch/prepare.py --config configs/isic2017.yaml data.root=PATH [section.key=value …]
        [--report FOLDER]    report.html, a page to look at: every bad file and its reason, what the data shows, who
                             agrees with whom, the most suspicious images; the same in report.json, .csv and .txt
        [--noisy-masks FOLDER]    the noisy stream's masks as training draws them, PNG, with manifest.csv (kind,
                             parameters, seed, wrong-pixel rate) and contact_sheet.png
        [--cache FOLDER]     the images and masks at data.image_size, for data.cache=FOLDER; a stopped run is taken up
        [--threads N]        all cores by default
        [--export FORMAT --to PATH [--as ROLE]]    the data as an annotation tool reads it
    python launch/prepare.py --import FORMAT=PATH [--as ROLE] [--images FOLDER] [--import …] --to FOLDER
                             annotation tools' files as a data set with manifest.csv; --unmarked empty|skip
    python launch/prepare.py ROOT --merge FORMAT=PATH [--images FOLDER]
                             masks that were drawn again become references; manifest.csv is kept as manifest.N.csv

FORMAT is label-studio, cvat, coco or nnunet; ROLE, whose masks they are, reference, annotation or annotation:NAME.

Exit codes: 0 the data can be trained on, as this config would; 2 bad config, bad files and not data.on_bad=skip, or a
dangerous finding that data.allow does not name; 1 anything else.
"""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distseg.cli.convert import add_arguments, check_arguments, export_samples, import_files, merge_files
from distseg.cli.process import say
from distseg.data.cache import write_cache
from distseg.data.checks import check_findings, check_shape, check_splits, facts_of, inspect_files
from distseg.data.decode import read_image, read_mask
from distseg.data.findings import DataFacts, Finding, find
from distseg.data.noise.write import write_noisy_masks
from distseg.data.sample import SPLITS, Problem, Sample
from distseg.data.splits import check_roles, split_clean
from distseg.data.survey import survey
from distseg.errors import UserError
from distseg.files import write_atomically

if TYPE_CHECKING:
    from distseg.config.schema import Config

SHOWN = 20
SHOWN_MASKS = 6


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parse_arguments(argv, prog)
    if arguments.imports:
        return import_files(arguments)
    if arguments.merge:
        return merge_files(arguments)
    # Late: help must not wait for what a config needs.
    from distseg.config.load import load_config

    return prepare(load_config(arguments.config, arguments.overrides), arguments)


def prepare(config: "Config", arguments: argparse.Namespace) -> int:
    # The whole data set, whatever an earlier cache says.
    samples, problems = survey(config.data)
    inspection = inspect_files(samples, config.data.decoding, arguments.threads, progress=True)
    problems += inspection.problems
    bad = {problem.id for problem in problems}
    good = [sample for sample in samples if sample.id not in bad]

    lines = summary(good, problems)
    say("\n".join(lines[: SHOWN + 3]))
    if len(lines) > SHOWN + 3:
        say(f"… and {len(lines) - SHOWN - 3} more" + ("" if arguments.report else "; --report FOLDER lists them"))
    facts = facts_of(good, inspection, config.data.class_names)
    findings = find(facts, config.data.allow)
    if arguments.report:
        report(config, arguments.report, lines, facts, findings, problems)
    if problems and config.data.on_bad == "refuse":
        what = f"{len(problems)} problems; mend them, or leave the samples out with data.on_bad=skip"
        raise UserError(f"{config.data.root}: {what}")
    if arguments.export:  # data that cannot be trained on yet may still need a tool
        export_samples(config, good, arguments)
        return 0
    check_splits(good)
    check_roles(good, config.data.clean_count, config.method.needs_clean)
    check_shape(facts, config.data.frame)
    check_findings(findings)
    if arguments.cache:
        written, kept = write_cache(good, problems, config.data, arguments.cache, arguments.threads)
        size = config.data.image_size
        say(f"{arguments.cache}: {len(good)} samples at {size}², {written} shards written, {kept} kept")
    if arguments.noisy_masks:
        draw_noisy_masks(config, good, arguments.noisy_masks)
    return 0


def draw_noisy_masks(config: "Config", good: list[Sample], folder: Path) -> None:
    """What `data.noise` makes of the training images that are not clean ones, to be looked at and shared."""
    # Late: it takes the seconds that torch takes to import.
    from distseg.pages.figures import contact_sheet, save_png

    noise = config.data.noise
    if noise.kind == "none":
        raise UserError(f"--noisy-masks {folder}: data.noise.kind none draws nothing; set data.noise.kind=polygon")
    _, samples = split_clean([s for s in good if s.split == "train"], config.data.clean_count, config.seed)
    samples = [sample for sample in samples if not sample.picked]  # right masks, which training leaves alone too
    try:
        samples, rate = write_noisy_masks(samples, noise, folder, config.data.decoding)
        shown = samples[:SHOWN_MASKS]
        sheet = contact_sheet(
            [read_image(sample.image, config.data.decoding) for sample in shown],
            [read_mask(sample.truth, config.data.decoding) for sample in shown],
            {noise.level: [read_mask(sample.annotations[0].mask, config.data.decoding) for sample in shown]},
            config.data.class_names,
        )
        save_png(sheet, folder / "contact_sheet.png")
    except OSError as error:
        raise UserError(f"--noisy-masks {folder}: cannot be written: {error.strerror}") from None
    say(f"{folder}: {len(samples)} masks of {noise.level}, {rate:.1%} of their pixels wrong")


def summary(good: list[Sample], problems: list[Problem]) -> list[str]:
    splits = Counter(sample.split for sample in good)
    counts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    known = sum(sample.split == "train" and sample.reference is not None for sample in good)
    if known < splits["train"]:
        counts += f"; of the training images {known} have a reference, the others annotations alone"
    bad = {problem.id or problem.file for problem in problems}
    found = f"{len(problems)} problems in {len(bad)} samples" if problems else "no problems"
    return [f"{len(good)} good samples: {counts}", found, *(str(problem) for problem in problems)]


def report(
    config: "Config",
    folder: Path,
    lines: list[str],
    facts: DataFacts,
    findings: list[Finding],
    problems: list[Problem],
) -> None:
    # Late: it takes the seconds that torch takes to import.
    from distseg.data.report import write_report

    try:
        write_report(folder, config.data.root.name or "data", facts, findings, problems, config.data.decoding)
        write_atomically(folder / "report.txt", "\n".join([*lines, *map(str, findings)]) + "\n")
    except OSError as error:
        raise UserError(f"--report {folder}: cannot be written: {error.strerror}") from None
    say(f"{folder / 'report.html'}: {len(findings)} findings")


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="a YAML file of configs/; needed but for --import")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="where to write the report")
    parser.add_argument("--noisy-masks", type=Path, metavar="FOLDER", help="where to write them, with a contact sheet")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where to write the decoded images and masks")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="decoding at once")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    check_arguments(parser, arguments)
    if arguments.threads < 1:
        parser.error("--threads must be at least 1")
    return arguments
