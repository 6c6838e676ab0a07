"""The page of an audit: the annotators, the worst masks with proposals and suspicion maps, and the ranking."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from distseg.data.decode import Decoding, read_canvas, read_mask
from distseg.data.geometry import Frame
from distseg.data.resize import resize_mask
from distseg.inference.audit.model import Judge, LabelModel
from distseg.inference.audit.outcome import Audit
from distseg.inference.audit.verdicts import Verdict, wrong_map
from distseg.pages.figures import bar_chart, png
from distseg.pages.html import AuditCard, AuditPage, Fact, LegendEntry, NamedProblem, Picture, Row, Table, audit_page
from distseg.pages.thumbnails import OUTLINES, jpeg, outlined, shaded

_CARD = 300
"""Side of a picture, pixels."""
_MOST_ROWS = 300
_PROPOSED, _DRAWN, _TRUE = OUTLINES[0], OUTLINES[1], OUTLINES[3]
_DOUBTFUL = 0.8
"""Expected Dice below which the page counts a mask as doubtful."""
_STEPS = 10
_HEADS = {
    "expected_dice": "expected Dice",
    "agreement": "Dice with others",
    "shift": "contour, px",
    "relative_shift": "contour, % of size",
    "missed": "missed, %",
    "invented": "invented, %",
    "true_dice": "Dice with reference",
}


def audit_html(
    audit: Audit,
    annotators: Mapping[str, dict[str, Any]],
    proposals: Path,
    decoding: Decoding,
    shown: int,
    threads: int,
) -> str:
    """One document; the first `shown` masks have pictures. `annotators`: as from `annotator_figures`.

    Raises BadFileError, OSError for a file that has gone since it was judged.
    """

    judges, verdicts = {judge.name: judge for judge in audit.judges}, audit.verdicts

    def card(verdict: Verdict) -> AuditCard:
        judge = judges[verdict.judge]
        return AuditCard(
            verdict.drawn.sample.id, _facts(verdict), _pictures(verdict, judge, audit.model, proposals, decoding)
        )

    with ThreadPoolExecutor(threads) as pool:
        cards = list(pool.map(card, verdicts[:shown]))
    known = [each for each in verdicts if not math.isnan(each.true_dice)]
    legend = [LegendEntry("drawn", _DRAWN), LegendEntry("proposed", _PROPOSED)]
    if known:
        legend.append(LegendEntry("reference", _TRUE))
    rows = [
        Row([str(rank), each.drawn.sample.id, _named(each.annotator), f"{each.expected_dice:.3f}", *_values(each)])
        for rank, each in enumerate(verdicts[:_MOST_ROWS], start=1)
    ]
    header = [
        "rank",
        "image",
        "annotator",
        "expected Dice",
        "wrong, %",
        "1 − Dice of prediction",
        "softmin",
        "reference",
    ]
    return audit_page(
        AuditPage(
            title=audit.title,
            paragraphs=[audit.how],
            facts=_counts(verdicts, known),
            annotators_text="Means with 95 % bootstrap intervals over groups. Contour: how far it is drawn outside of "
            "the proposed one (+) or inside (−); the size of an object is the root of its area. Missed: nothing drawn "
            "where something is proposed; invented: the reverse.",
            annotators=_annotators(annotators),
            legend=legend,
            cards_text=f"The {len(cards)} masks of the lowest expected Dice. Right: the redder, the more probably the "
            "drawn label is wrong.",
            cards=cards,
            charts=_charts(verdicts),
            masks=Table(f"Ranking, {len(rows)} of {len(verdicts)}; table.csv has all", header, rows),
            problems=[NamedProblem(each.id, f"{each.file}: {each.reason}") for each in audit.problems],
        )
    )


def _facts(verdict: Verdict) -> list[str]:
    facts = [f"expected Dice {verdict.expected_dice:.2f}; {verdict.wrong:.1%} of the pixels expected to be wrong"]
    if verdict.annotator:
        facts.insert(0, f"by {verdict.annotator}")
    if verdict.missed:
        facts.append("nothing drawn")
    elif verdict.invented:
        facts.append("nothing proposed")
    elif not math.isnan(verdict.shift):
        facts.append(f"contour {verdict.shift:+.1f} px, {verdict.relative_shift:+.0%} of the object's size")
    if not math.isnan(verdict.true_dice):
        facts.append(f"Dice with the reference {verdict.true_dice:.2f}")
    return facts


def _values(verdict: Verdict) -> list[str]:
    true = "" if math.isnan(verdict.true_dice) else f"{verdict.true_dice:.3f}"
    return [f"{100 * verdict.wrong:.1f}", f"{1 - verdict.prediction_dice:.3f}", f"{verdict.softmin:.3f}", true]


def _pictures(verdict: Verdict, judge: Judge, model: LabelModel, proposals: Path, decoding: Decoding) -> list[bytes]:
    sample = verdict.drawn.sample
    frame = Frame(_CARD, "letterbox")
    canvas, size = read_canvas(sample.image, frame, decoding)
    place = frame.place(*size)
    image = np.ascontiguousarray(canvas[place.picture])
    paths = [(_PROPOSED, proposals / f"{sample.id}.png"), (_DRAWN, verdict.file)]
    if verdict.drawn.truth is not None:
        paths.insert(0, (_TRUE, verdict.drawn.truth))
    masks = [(colour, resize_mask(read_mask(path, decoding), *image.shape[:2])) for colour, path in paths]
    wrong = wrong_map(judge, model, verdict.drawn, verdict.annotator, decoding)
    return [jpeg(outlined(image, masks, _CARD)), jpeg(shaded(image, wrong, _CARD))]


def _counts(verdicts: Sequence[Verdict], known: Sequence[Verdict]) -> list[Fact]:
    doubtful = sum(each.expected_dice < _DOUBTFUL for each in verdicts)
    facts = [
        Fact(f"{len(verdicts):,}", "masks"),
        Fact(f"{len({each.drawn.sample.id for each in verdicts}):,}", "images"),
        Fact(f"{np.mean([each.expected_dice for each in verdicts]) if verdicts else 0:.3f}", "mean expected Dice"),
        Fact(f"{doubtful:,}", f"expected below {_DOUBTFUL}"),
    ]
    if known:
        facts.append(Fact(f"{np.mean([each.true_dice for each in known]):.3f}", "mean Dice with references"))
    return facts


def _annotators(figures: Mapping[str, dict[str, Any]]) -> Table:
    names = [name for name in _HEADS if any(name in each for each in figures.values())]
    rows = []
    for annotator, found in figures.items():
        cells = [_named(annotator), str(found["masks"])]
        for name in names:
            factor, digits = (100, 1) if _HEADS[name].endswith("%") or "%" in _HEADS[name] else (1, 2)
            value = found.get(name)
            parts = [factor * value[part] for part in ("mean", "low", "high")] if value else []
            cells.append(f"{parts[0]:.{digits}f} [{parts[1]:.{digits}f}, {parts[2]:.{digits}f}]" if parts else "")
        rows.append(Row(cells))
    return Table("Annotators", ["annotator", "masks", *(_HEADS[name] for name in names)], rows)


def _charts(verdicts: Sequence[Verdict]) -> list[Picture]:
    places = [min(int(_STEPS * each.expected_dice), _STEPS - 1) for each in verdicts]
    counts = {f"{step / _STEPS:.1f} to {(step + 1) / _STEPS:.1f}": float(places.count(step)) for step in range(_STEPS)}
    return [Picture("expected.png", "Expected Dice", png(bar_chart(counts, "masks")))] if verdicts else []


def _named(annotator: str) -> str:
    return annotator or "not named"
