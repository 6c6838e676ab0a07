"""Bad files are found before training, all of them, and refused or left out by name."""

import csv
import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from distseg.data.agreement import Agreement, agreement, thinned
from distseg.data.cache import open_cache
from distseg.data.config import DataConfig
from distseg.data.decode import Decoding
from distseg.data.findings import DataFacts, Finding, find
from distseg.data.geometry import Frame
from distseg.data.inspect import ImageFacts, MaskFacts, inspect_image, inspect_mask
from distseg.data.roster import Digests
from distseg.data.sample import SPLITS, FileKey, Problem, Sample, first_of
from distseg.data.survey import survey
from distseg.errors import BadFileError, UserError
from distseg.files import write_atomically
from distseg.run_folder import RunFolder
from distseg.text import for_csv, for_terminal

_log = logging.getLogger(__name__)
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class Inspection:
    """What the files hold."""

    problems: list[Problem]
    """By id."""
    images: dict[str, ImageFacts]
    """Of the images that can be decoded, by id; of neither these nor masks where a cache stands for the files."""
    masks: dict[str, dict[FileKey, MaskFacts]]
    """Of the masks that can be decoded, by id."""
    agreements: dict[str, Agreement]
    """Of the masks of each image, by id."""
    digests: Digests


def usable_samples(config: DataConfig, folder: Path, check: bool) -> list[Sample]:
    """`checked_samples` without the digests."""
    return checked_samples(config, folder, check)[0]


def checked_samples(config: DataConfig, folder: Path, check: bool) -> tuple[list[Sample], Digests]:
    """The samples to train and score with, sorted by id: the same on every rank, where the main rank comes first.

    With them the SHA-256 of their files by id, empty unless this call has looked into them.

    With `check` every file is decoded, unless `config.cache` shows that `prepare` has done so. What is bad is refused,
    or left out and written to the run's `folder`, where the ranks that do not check find it.

    Raises UserError, one line, for the first bad file, for a split without samples, for data that is dangerous to train
    on (findings.py) and for a cache that does not fit the data.
    """
    samples, problems = survey(config)
    run, inspection = RunFolder(folder), None
    if config.on_bad == "refuse":
        if check and not problems:
            inspection = _look_into_files(samples, config)
            problems = inspection.problems
        if problems:
            raise UserError(first_of(problems))
    else:
        record = run.left_out
        if check or not record.exists():
            inspection = _look_into_files(samples, config)
            problems += inspection.problems
            _record(problems, record, run.config.exists())
            if problems and check:
                count = len({problem.id for problem in problems})
                counted = f"{count} sample{'s' if count > 1 else ''}"
                _log.warning("left out %s, %s: %s", counted, record, first_of(problems))
        left_out = _read(record)
        samples = [sample for sample in samples if sample.id not in left_out]
    check_splits(samples)
    if check and inspection is not None and inspection.masks:
        facts = facts_of(samples, inspection, config.class_names)
        check_shape(facts, config.frame)
        check_findings(find(facts, config.allow))
    return samples, inspection.digests if inspection else {}


def check_splits(samples: list[Sample]) -> None:
    """Raises UserError for a split without samples."""
    if samples and not any(sample.reference for sample in samples):
        names = sorted({each.annotator for sample in samples for each in sample.annotations if each.annotator})
        listed = for_terminal(", ".join(names[:_SHOWN_NAMES]) + (", …" if len(names) > _SHOWN_NAMES else ""))
        mend = f"name the annotator who is the expert, if one is, by data.expert: {listed}" if names else "give some"
        raise UserError(f"data: no image has a reference mask, against which a network could be scored; {mend}")
    known = len({("group", s.group) if s.group else ("id", s.id) for s in samples if s.reference is not None})
    for split in SPLITS:
        if not any(sample.split == split for sample in samples):
            key = "rows of that split" if split == "train" else f"rows of that split, or a larger data.{split}_fraction"
            if split != "train" and known < len(SPLITS):
                key = (
                    f"an image with a reference mask, of a group of its own, and the others do too: there "
                    f"{'is' if known == 1 else 'are'} {known}, give at least {len(SPLITS)}"
                )
            raise UserError(f"data: the {split} split is empty; it needs {key}")


def check_shape(facts: DataFacts, frame: Frame) -> None:
    """Raises UserError where crops would show whole images, each in a corner of padding."""
    if frame.shape != "crop" or not facts.images:
        return
    width, height = max((image.size for image in facts.images.values()), key=max)
    place = frame.place(height, width)
    if max(place.height, place.width) < frame.size:
        raise UserError(
            f"data.scale {frame.scale:g}: the largest image, {width}×{height}, is then {place.width}×{place.height}, "
            f"and crops are {frame.size}×{frame.size}; set a larger data.scale, a smaller data.image_size, or "
            "data.shape=letterbox"
        )


def check_findings(findings: Sequence[Finding]) -> None:
    """Refuse what is dangerous and warn of the rest, but for what `data.allow` names."""
    open_ones = [finding for finding in findings if not finding.allowed]
    refused = [finding for finding in open_ones if finding.severity == "refuse"]
    if refused:
        names = ",".join(dict.fromkeys(finding.name for finding in refused))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise UserError(f"data: {for_terminal(refused[0].text)}{more}; data.allow=[{names}] trains on it as it is")
    for finding in open_ones:
        if finding.severity == "warn":
            _log.warning("data: %s", for_terminal(finding.text))


def facts_of(samples: Sequence[Sample], inspection: Inspection, class_names: tuple[str, ...]) -> DataFacts:
    """What `inspection` has found of `samples`, which it has no problem with."""
    return DataFacts(samples, inspection.images, inspection.masks, inspection.agreements, class_names)


def inspect_files(samples: Sequence[Sample], decoding: Decoding, threads: int, progress: bool = False) -> Inspection:
    """Every file that is missing, empty, truncated, no image, not of its image's size, not binary or of an odd kind.

    Also every image that is in two splits under two names. Each file is decoded once, by `threads` threads, so that no
    more images than that are in memory. With `progress` a bar on stderr, if that is a terminal.
    """
    ordered = sorted(samples, key=lambda sample: sample.id)
    with ThreadPoolExecutor(threads) as pool:
        looked = pool.map(lambda sample: _inspect(sample, decoding), ordered)
        # disable=None: a bar is for terminals, and a log has no use for it.
        files = list(tqdm(looked, desc="data", total=len(ordered), unit="image", disable=None if progress else True))
    problems = [problem for each in files for problem in each.problems]
    images = {sample.id: each.image for sample, each in zip(ordered, files, strict=True) if each.image is not None}
    masks = {sample.id: each.masks for sample, each in zip(ordered, files, strict=True)}
    problems += _twins([(sample, images[sample.id]) for sample in ordered if sample.id in images])
    digests = {sample.id: each.digests for sample, each in zip(ordered, files, strict=True)}
    agreements = {sample.id: each.agreement for sample, each in zip(ordered, files, strict=True)}
    return Inspection(sorted(problems, key=lambda problem: problem.id), images, masks, agreements, digests)


def problems_table(problems: Sequence[Problem]) -> str:
    """CSV with the columns id, file, reason."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "file", "reason"])
    rows.writerows([for_csv(text) for text in (each.id, each.file, each.reason)] for each in problems)
    return table.getvalue()


def _look_into_files(samples: list[Sample], config: DataConfig) -> Inspection:
    cache = open_cache(config)
    if cache is None or config.cache is None:
        return inspect_files(samples, config.decoding, config.threads)
    bad = {problem.id for problem in cache.left_out}
    cache.check_holds([sample for sample in samples if sample.id not in bad], config.cache)
    ids = {sample.id for sample in samples}
    digests: Digests = {
        sample.id: {kind: cache.digests[path] for kind, path in sample.files.items()}
        for sample in samples
        if sample.id not in bad
    }
    return Inspection([problem for problem in cache.left_out if problem.id in ids], {}, {}, {}, digests)


@dataclass
class _Files:
    """What is known of one sample's files."""

    problems: list[Problem]
    digests: dict[FileKey, str]
    masks: dict[FileKey, MaskFacts]
    agreement: Agreement
    image: ImageFacts | None = None


def _inspect(sample: Sample, decoding: Decoding) -> _Files:
    found = _Files([], {}, {}, {})
    sizes: dict[FileKey, tuple[int, int]] = {}
    drawn: dict[FileKey, NDArray[np.uint8]] = {}
    for kind, path in sample.files.items():
        try:
            if kind == "image":
                found.image = inspect_image(path, decoding)
                sizes[kind], found.digests[kind] = found.image.size, found.image.digest
            else:
                facts, ids = inspect_mask(path, decoding)
                found.masks[kind] = facts
                if len(sample.files) > 2:
                    drawn[kind] = thinned(ids)
                sizes[kind], found.digests[kind] = facts.size, facts.digest
        except BadFileError as error:
            found.problems.append(Problem(sample.id, str(path), str(error).removeprefix(f"{path}: ")))
    found.agreement = agreement(drawn)
    if found.image is not None:
        for kind, size in sizes.items():
            if size != found.image.size:
                reason = _size_reason(size, sample.image.name, found.image, decoding)
                found.problems.append(Problem(sample.id, str(sample.files[kind]), reason))
    return found


def _size_reason(size: tuple[int, int], name: str, image: ImageFacts, decoding: Decoding) -> str:
    (width, height), (own_width, own_height) = image.size, size
    reason = f"mask is {own_width}×{own_height} and its image {name} {width}×{height}"
    if image.orientation >= 5 and (own_width, own_height) == (height, width):
        if decoding.orientation == "apply":
            return (
                f"{reason}, turned by its EXIF orientation; the mask was drawn as stored: set data.orientation=ignore"
            )
        return f"{reason}, as stored; the mask was drawn as EXIF turns it: set data.orientation=apply"
    if abs(own_width * height - own_height * width) < max(width, height, own_width, own_height):
        return f"{reason}; resample the mask, nearest neighbour"
    return f"{reason}, of another shape; is it another image's mask? Give the one that was drawn on this image"


def _twins(images: list[tuple[Sample, ImageFacts]]) -> list[Problem]:
    """Images with the same content in two splits: what is learned from one would be scored on the other."""
    same: dict[str, list[Sample]] = {}
    for sample, facts in images:
        same.setdefault(facts.digest, []).append(sample)
    problems = []
    for samples in same.values():
        for sample in samples:
            other = next((each for each in samples if each.split != sample.split), None)
            if other is not None and other.image != sample.image:
                where = f"{other.image.name}, which is {other.id} of the {other.split} split"
                reason = f"in {sample.split}, has the same content as {where}; remove one, or give both one group"
                problems.append(Problem(sample.id, str(sample.image), reason))
    return problems


def _record(problems: list[Problem], record: Path, begun: bool) -> None:
    """Write `problems` to `record`; where the run has begun, only if they are of the same samples as those in it.

    Neither paths nor reasons count: data may move, and a decoder may put it in other words.
    """
    if begun and record.exists():
        changes = _changes(_read(record), problems)
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UserError(
                f"{record}: other files are bad now than when this run began: {changes[0]}{more}; put the data back as "
                "it was, or choose another name="
            )
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, problems_table(problems))


def _read(record: Path) -> dict[str, str]:
    """One bad file of each sample that is left out, by id."""
    try:
        with record.open(newline="", encoding="utf-8") as file:
            return {row["id"]: row["file"] for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(f"{record}: is damaged; put it back, or choose another name=") from None


def _changes(before: dict[str, str], problems: list[Problem]) -> list[str]:
    now = {for_csv(problem.id): problem for problem in reversed(problems)}
    mended = [f"{for_terminal(before[id])} is no longer bad" for id in sorted(before.keys() - now.keys())]
    return [str(now[id]) for id in sorted(now.keys() - before.keys())] + mended
