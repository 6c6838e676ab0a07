"""The report of a data set: a page to be looked at, and the same in JSON."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distseg.data.checks import problems_table
from distseg.data.decode import Decoding, read_image, read_mask
from distseg.data.findings import DataFacts, Finding, annotators, lesion_shares, name_of, pairwise, suspects
from distseg.data.inspect import THUMBNAIL
from distseg.data.sample import SPLITS, FileKey, Problem, Sample
from distseg.files import write_atomically
from distseg.pages.figures import heat_maps, png, share_histogram, size_chart
from distseg.pages.html import (
    Card,
    DataPage,
    Fact,
    FoundLine,
    LegendEntry,
    NamedProblem,
    NamedSample,
    Picture,
    Shaded,
    ShadedTable,
    SplitCount,
    data_page,
)
from distseg.pages.thumbnails import jpeg, outline_colours, outlined, wall

_MOST_CARDS = 24
_MOST_PAIRS = 24
_MOST_TILES = 520
"""Of a split's wall."""
_MOST_PROBLEMS = 200
_MOST_ANNOTATORS = 40
_MOST_LISTED = 1000
"""Samples of a finding, and pairs, that the JSON lists."""
_CARD = 300
"""Longer side of a card's picture, pixels."""
_WALL_COLUMNS = 26
_LEAST_CONTRAST = 0.1
"""Of Dice, between the lightest and the darkest cell of the table."""
_BADGES = {"refuse": "refused", "warn": "warning", "note": "note"}


def write_report(
    folder: Path, title: str, facts: DataFacts, findings: Sequence[Finding], problems: Sequence[Problem],
    decoding: Decoding,
) -> None:  # fmt: skip
    """report.html, report.json and, of the problems alone, report.csv.

    The files were decoded once, for `facts`; those of the at most hundred samples that the page shows large are
    decoded again, one sample a thread at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.csv", problems_table(problems))
    content = as_json(facts, findings, problems)
    write_atomically(folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.html", data_page(_page(title, facts, findings, problems, decoding)))


def as_json(facts: DataFacts, findings: Sequence[Finding], problems: Sequence[Problem]) -> dict[str, Any]:
    """What the page shows, for other programs; Dice and shares are fractions."""
    return {
        "good": dict(Counter(sample.split for sample in facts.samples)),
        "problems": [{"id": p.id, "file": p.file, "reason": p.reason} for p in problems],
        "findings": [
            {
                "name": each.name,
                "severity": each.severity,
                "allowed": each.allowed,
                "text": each.text,
                "samples": dict(list(each.suspects.items())[:_MOST_LISTED]),
                "pairs": each.pairs[:_MOST_LISTED],
            }
            for each in findings
        ],
        "splits": {split: _of_split(facts, split) for split in SPLITS if facts.of_split(split)},
        "annotators": {
            name_of(key): {"masks": each.masks, "empty": each.empty, "reference": each.reference, "others": each.others}
            for key, each in annotators(facts).items()
        },
        "agreement": [
            {"between": [name_of(first), name_of(second)], "dice": statistics.fmean(values), "images": len(values)}
            for (first, second), values in pairwise(facts).items()
        ],
    }


def _of_split(facts: DataFacts, split: str) -> dict[str, Any]:
    samples = facts.of_split(split)
    thumbnails = facts.thumbnails(samples)
    masks = [mask for sample in samples for mask in facts.masks[sample.id].values()]
    lit = np.array([mask.lit for mask in masks])
    shares = np.array([mask.shares for mask in masks])
    sizes = Counter(facts.images[sample.id].size for sample in samples)
    return {
        "images": len(samples),
        "references": sum(sample.reference is not None for sample in samples),
        "annotations": sum(len(sample.annotations) for sample in samples),
        "class_shares": dict(zip(facts.class_names, shares.mean(axis=0).tolist(), strict=True)) if masks else {},
        "marked_share_quartiles": np.quantile(lit, (0, 0.25, 0.5, 0.75, 1)).tolist() if masks else [],
        "empty_masks": int((lit == 0).sum()),
        "full_masks": int((lit == 1).sum()),
        "mean_colour": thumbnails.mean(axis=(0, 1, 2)).tolist(),
        "sizes": [[*size, count] for size, count in sizes.most_common(20)],
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(
    title: str, facts: DataFacts, findings: Sequence[Finding], problems: Sequence[Problem], decoding: Decoding
) -> DataPage:
    keys = list(dict.fromkeys(key for sample in facts.samples for key in list(sample.files)[1:]))
    keys.sort(key=lambda key: (key != "reference", key))
    colours = outline_colours(keys)
    by_id = {sample.id: sample for sample in facts.samples}
    reasons = suspects(findings)
    pairs = [pair for finding in findings for pair in finding.pairs]
    disagreements = _disagreements(facts)

    def card(ids: Sequence[str], why: Sequence[str], with_masks: bool) -> Card:
        samples = [by_id[id] for id in ids]
        jpegs = [_picture(sample, colours if with_masks else {}, decoding) for sample in samples]
        return Card([NamedSample(sample.id, sample.split) for sample in samples], jpegs, why)

    with ThreadPoolExecutor(2) as pool:
        suspect_cards = list(pool.map(lambda id: card([id], reasons[id], True), list(reasons)[:_MOST_CARDS]))
        pair_cards = list(pool.map(lambda pair: card(pair, [], False), pairs[:_MOST_PAIRS]))
        disagreeing = list(pool.map(lambda item: card([item[0]], [item[1]], True), disagreements))
    return DataPage(
        title=title,
        subtitle="What distseg prepare --report saw in the images and masks.",
        facts=_numbers(facts, problems),
        splits=[SplitCount(split, len(facts.of_split(split))) for split in SPLITS],
        findings=[_line(finding) for finding in findings],
        legend=[LegendEntry(name_of(key), colours[key]) for key in keys[:_MOST_ANNOTATORS]],
        suspects_text=_of_many(len(suspect_cards), len(reasons), "images that something was found about"),
        suspects=suspect_cards,
        pairs_text=_of_many(len(pair_cards), len(pairs), "pairs, across splits first; turned and mirrored ones count"),
        pairs=pair_cards,
        agreement_text="Mean Dice of every two, over the images that both have drawn: 1 is the same, 0 nothing shared.",
        agreement=_agreement_table(facts),
        disagreements=disagreeing,
        charts=_charts(facts),
        walls_text="Images from dark to bright. What does not belong stands out.",
        walls=_walls(facts),
        problems_text=_of_many(min(len(problems), _MOST_PROBLEMS), len(problems), "problems; report.csv has them all"),
        problems=[NamedProblem(each.id, f"{each.file}: {each.reason}") for each in problems[:_MOST_PROBLEMS]],
    )  # fmt: skip


def _numbers(facts: DataFacts, problems: Sequence[Problem]) -> list[Fact]:
    samples = facts.samples
    names = {each.annotator for sample in samples for each in sample.annotations}
    groups = {sample.group for sample in samples if sample.group}
    counts = [
        (len(samples), "images"),
        (sum(sample.reference is not None for sample in samples), "reference masks"),
        (sum(len(sample.annotations) for sample in samples), "annotations"),
        (len(names - {""}), "annotators by name"),
        (len(groups), "groups"),
        (len(facts.class_names) if len(facts.class_names) > 2 else 0, "classes"),
        (len({problem.id or problem.file for problem in problems}), "unusable samples"),
    ]
    return [Fact(f"{count:,}", name) for count, name in counts if count]


def _line(finding: Finding) -> FoundLine:
    look = "note" if finding.allowed else finding.severity
    badge = "allowed" if finding.allowed else _BADGES[finding.severity]
    key = f"data.allow=[{finding.name}]" if finding.severity != "note" and not finding.allowed else ""
    end = "" if finding.text.endswith("?") else "."
    return FoundLine(look, badge, f"{finding.text[:1].upper()}{finding.text[1:]}{end}", key)


def _of_many(shown: int, count: int, what: str) -> str:
    return f"{shown} of {count} {what}." if shown < count else f"{count} {what}."


def _picture(sample: Sample, colours: Mapping[FileKey, str], decoding: Decoding) -> bytes:
    image = read_image(sample.image, decoding)
    masks = [(colours[key], read_mask(path, decoding)) for key, path in sample.files.items() if key in colours]
    return jpeg(outlined(image, masks, _CARD))


def _disagreements(facts: DataFacts) -> list[tuple[str, str]]:
    """(id, reason) of the images whose masks agree least, where an image has several annotations."""
    found = []
    for sample in facts.samples:
        values = list(facts.agreements[sample.id].values())
        if len(sample.annotations) > 1 and values:
            found.append((statistics.fmean(values), sample.id))
    return [(id, f"mean Dice {value:.2f}") for value, id in sorted(found)[: _MOST_CARDS // 2]]


def _agreement_table(facts: DataFacts) -> ShadedTable | None:
    known = annotators(facts)
    means = {pair: statistics.fmean(values) for pair, values in pairwise(facts).items()}
    if not means:
        return None
    low = min(min(means.values()), max(means.values()) - _LEAST_CONTRAST)
    keys = [key for key in ("reference", *list(known)[:_MOST_ANNOTATORS]) if any(key in pair for pair in means)]
    rows = []
    for key in keys:
        cells = [Shaded(name_of(key)), Shaded(f"{known[key].masks:,}" if key in known else "")]
        cells.append(Shaded(f"{known[key].empty:,}" if key in known else ""))
        for other in keys:
            value = means.get((key, other), means.get((other, key)))
            cells.append(
                Shaded("") if value is None else Shaded(f"{value:.2f}", _shade(value, low, max(means.values())))
            )
        rows.append(cells)
    return ShadedTable(["", "masks", "empty", *(name_of(key) for key in keys)], rows)


def _shade(value: float, low: float, high: float) -> float:
    return round(0.1 + 0.8 * (value - low) / (high - low), 3)


def _charts(facts: DataFacts) -> list[Picture]:
    with_reference = any(lesion_shares(facts, split, reference=True) for split in SPLITS)
    shares = {split: lesion_shares(facts, split, reference=with_reference) for split in SPLITS}
    sizes = {split: [facts.images[sample.id].size for sample in facts.of_split(split)] for split in SPLITS}
    whose = "references" if with_reference else "annotations"
    charts = [
        ("shares.png", f"How much of the frame the {whose} mark", share_histogram(shares, "marked share of the frame")),
        ("sizes.png", "Sizes of the images", size_chart(sizes)),
    ]
    places = _places(facts, with_reference)
    if places:
        charts.insert(1, ("places.png", f"Where the {whose} mark", heat_maps(places)))
    return [Picture(name, caption, png(pixels)) for name, caption, pixels in charts]


def _places(facts: DataFacts, reference: bool) -> dict[str, NDArray[np.float64]]:
    """(16, 16) a split: how many of its masks mark each place of the squashed frame."""
    maps = {}
    for split in SPLITS:
        thumbnails = [
            mask.thumbnail
            for sample in facts.of_split(split)
            for key, mask in facts.masks[sample.id].items()
            if (key == "reference") == reference
        ]
        if thumbnails:
            stack = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL)
            maps[split] = stack.mean(axis=0) / 255
    return maps


def _walls(facts: DataFacts) -> list[Picture]:
    walls = []
    for split in SPLITS:
        samples = facts.of_split(split)
        if not samples:
            continue
        brightness = facts.thumbnails(samples).mean(axis=(1, 2, 3))
        order = np.argsort(brightness, kind="stable")
        shown = order[np.linspace(0, len(order) - 1, min(len(order), _MOST_TILES)).round().astype(int)]
        tiles = [facts.images[samples[place].id].tile for place in shown]
        columns = min(len(tiles), _WALL_COLUMNS)
        counted = f"{len(tiles)} of {len(samples)}" if len(tiles) < len(samples) else str(len(samples))
        walls.append(Picture(f"wall_{split}.jpg", f"{split}: {counted}", wall(tiles, columns)))
    return walls
