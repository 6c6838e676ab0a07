"""What an audit writes of its verdicts: the tables, the page and the queue."""

import csv
import io
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distseg.data.checks import problems_table
from distseg.data.config import DataConfig
from distseg.data.formats.convert import export_proposals
from distseg.data.seeding import stable_hash
from distseg.evaluation.intervals import grouped_interval
from distseg.files import write_atomically
from distseg.inference.audit.folder import AuditFolder
from distseg.inference.audit.outcome import Audit
from distseg.inference.audit.page import audit_html
from distseg.inference.audit.verdicts import Verdict
from distseg.text import for_csv

COLUMNS: dict[str, Callable[[Verdict], float]] = {
    "expected_dice": lambda verdict: verdict.expected_dice,
    "expected_wrong": lambda verdict: verdict.wrong,
    "softmin": lambda verdict: verdict.softmin,
    "disagreement": lambda verdict: 1 - verdict.prediction_dice,
    "random": lambda verdict: stable_hash("audit", verdict.drawn.sample.id, verdict.annotator) / 2**128,
    "agreement": lambda verdict: verdict.agreement,
    "shift": lambda verdict: verdict.shift,
    "relative_shift": lambda verdict: verdict.relative_shift,
    "true_dice": lambda verdict: verdict.true_dice,
}
"""Numbers of the table, beside those of areas; an empty cell where there is none."""
HABITS: dict[str, Callable[[Verdict], float]] = {
    "expected_dice": lambda verdict: verdict.expected_dice,
    "agreement": lambda verdict: verdict.agreement,
    "shift": lambda verdict: verdict.shift,
    "relative_shift": lambda verdict: verdict.relative_shift,
    "missed": lambda verdict: float(verdict.missed) if verdict.proposed_area else math.nan,
    "invented": lambda verdict: float(verdict.invented) if verdict.area else math.nan,
    "true_dice": lambda verdict: verdict.true_dice,
}
"""What is averaged over the masks of an annotator for which there is such a number. Missed is a share of the images in
which something is proposed, invented of those in which something is drawn."""


def write_report(audit: Audit, folder: AuditFolder, data: DataConfig, shown: int, queued: int) -> int:
    """Write tables, page and queue into a folder that has the proposals; how many images are in the queue.

    Raises StorageError; UserError for classes that an annotation tool has no names for.
    """
    verdicts = audit.verdicts
    folder.keep_proposals({each.drawn.sample.id for each in verdicts})
    figures = annotator_figures(verdicts)
    write_atomically(folder.table, table(verdicts))
    write_atomically(folder.annotators, annotators_table(figures))
    if audit.problems:
        write_atomically(folder.failed, problems_table(audit.problems))
    else:
        folder.failed.unlink(missing_ok=True)
    page = audit_html(audit, figures, folder.proposals, data.decoding, shown, data.threads)
    write_atomically(folder.page, page)
    folder.add({"annotators": figures})
    return write_queue(verdicts, folder, data, queued)


def write_queue(verdicts: Sequence[Verdict], folder: AuditFolder, data: DataConfig, count: int) -> int:
    """The images of the first masks, each once, with their proposals, for each of the tools; how many there are."""
    samples = list({each.drawn.sample.id: each.drawn.sample for each in verdicts}.values())[:count]
    for path in (folder.label_studio, folder.cvat):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if samples:
        proposals = [folder.proposals / f"{sample.id}.png" for sample in samples]
        for format, to in (("label-studio", folder.label_studio), ("cvat", folder.cvat)):
            export_proposals(samples, proposals, data.class_names, format, to, data.decoding)
    return len(samples)


def ranked(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The most suspicious first."""
    return sorted(verdicts, key=lambda each: (each.expected_dice, -each.wrong, each.drawn.sample.id, each.annotator))


def table(verdicts: Sequence[Verdict]) -> str:
    """CSV: a row a mask, in the order given."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["rank", "id", "annotator", "group", "file", "height", "width", "area", "proposed_area", *COLUMNS])
    for rank, each in enumerate(verdicts, start=1):
        sample = each.drawn.sample
        names = [for_csv(cell) for cell in (sample.id, each.annotator, sample.group, str(each.file))]
        numbers = [_cell(value(each)) for value in COLUMNS.values()]
        rows.writerow([rank, *names, *each.size, each.area, each.proposed_area, *numbers])
    return text.getvalue()


def annotator_figures(verdicts: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """By annotator the number of masks, and of HABITS what there is: mean, and low and high of its 95 % bootstrap
    interval over groups."""
    figures: dict[str, dict[str, Any]] = {}
    for annotator in sorted({each.annotator for each in verdicts}):
        own = [each for each in verdicts if each.annotator == annotator]
        figures[annotator] = {"masks": len(own)}
        for name, value in HABITS.items():
            known = [(value(each), each.drawn.group) for each in own if not math.isnan(value(each))]
            if known:
                values, groups = zip(*known, strict=True)
                mean, low, high = grouped_interval(np.array(values), groups)
                figures[annotator][name] = {"mean": mean, "low": low, "high": high, "masks": len(known)}
    return figures


def annotators_table(figures: dict[str, dict[str, Any]]) -> str:
    """CSV: a row an annotator, each figure with its interval."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["annotator", "masks", *(f"{name}{end}" for name in HABITS for end in ("", "_low", "_high"))])
    for annotator, found in figures.items():
        cells = [found.get(name, {}).get(part, math.nan) for name in HABITS for part in ("mean", "low", "high")]
        rows.writerow([for_csv(annotator), found["masks"], *map(_cell, cells)])
    return text.getvalue()


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"
