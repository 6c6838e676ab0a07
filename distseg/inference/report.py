"""What an evaluation says: one HTML page, JSON, and a CSV with a row an image and class."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distseg.data.decode import Decoding, read_canvas, read_mask
from distseg.data.geometry import Frame
from distseg.data.resize import resize_mask
from distseg.data.sample import Problem, Sample
from distseg.evaluation.calibration import BINS, expected_calibration_error
from distseg.evaluation.intervals import grouped_interval
from distseg.evaluation.metrics import SCORES, image_scores
from distseg.files import write_atomically
from distseg.inference.scores import SURFACES, Scored, class_scores
from distseg.pages.figures import contact_sheet, line_charts, png
from distseg.pages.html import Picture, Row, StudyPage, Table, study_page
from distseg.text import counted, for_csv

_SHOWN_CASES = 6
_SHOWN_GROUPS = 50
_CASE_SIDE = 360
"""Pixels of a picture on the page."""
_TITLES = {"hausdorff95": "HD95, px", "hausdorff95_share": "HD95, % of diagonal", "surface_dice": "surface Dice"}


@dataclass(frozen=True)
class Evaluation:
    """What was found; its figures follow from it."""

    title: str
    """What was evaluated on what."""
    classes: tuple[str, ...]
    scored: Sequence[Scored]
    network: NDArray[np.int64] | None
    """Counts at the network's resolution, as training makes them, of the same images; of a run alone."""
    problems: Sequence[Problem]
    tolerance: float | None

    @property
    def groups(self) -> list[str]:
        """Of each image; one without a group is its own."""
        return [each.sample.group or f"\0{each.sample.id}" for each in self.scored]

    @property
    def dice(self) -> NDArray[np.float64]:
        """(n,); of several classes the mean over all but background."""
        return image_scores(np.stack([each.counted for each in self.scored]))["dice"]

    @property
    def bins(self) -> NDArray[np.float64] | None:
        """(n, BINS, 3), unless an image has no probabilities."""
        bins = [each.calibration for each in self.scored if each.calibration is not None]
        return np.stack(bins) if len(bins) == len(self.scored) else None

    def by_class(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Scores (n,) of each class but background, by name."""
        return {name: class_scores(self.scored, place) for place, name in enumerate(self.classes) if place}

    def by_group(self) -> dict[str, tuple[int, float]]:
        """Images and mean Dice, of each group that has a name."""
        found: dict[str, list[float]] = {}
        for each, dice in zip(self.scored, self.dice, strict=True):
            if each.sample.group:
                found.setdefault(each.sample.group, []).append(float(dice))
        return {group: (len(values), float(np.mean(values))) for group, values in sorted(found.items())}


def figures_of(evaluation: Evaluation) -> dict[str, Any]:
    """One object of JSON: means with 95 % bootstrap intervals over groups; NaN never occurs in it."""
    groups = evaluation.groups
    content: dict[str, Any] = {
        "title": evaluation.title,
        "images": len(evaluation.scored),
        "groups": len(set(groups)),
        "failed": [{"id": p.id, "file": p.file, "reason": p.reason} for p in evaluation.problems],
    }
    if evaluation.tolerance is not None:
        content["surface_tolerance_share_of_diagonal"] = evaluation.tolerance
    if not evaluation.scored:
        return content
    content["own"] = _with_intervals(image_scores(np.stack([each.counted for each in evaluation.scored])), groups)
    if evaluation.network is not None:
        content["network"] = _with_intervals(image_scores(evaluation.network), groups)
    content["classes"] = {name: _with_intervals(each, groups) for name, each in evaluation.by_class().items()}
    content["by_group"] = {name: {"images": n, "dice": dice} for name, (n, dice) in evaluation.by_group().items()}
    if evaluation.bins is not None:
        content["calibration"] = _calibration(evaluation.bins, groups)
    return content


def scores_csv(evaluation: Evaluation) -> str:
    """A row an image and class, at full precision."""
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    names = [*SCORES, *(SURFACES if evaluation.tolerance is not None else ())]
    rows.writerow(["id", "group", "class", "height", "width", "tp", "fp", "fn", "tn", *names])
    for place, name in enumerate(evaluation.classes):
        if not place or not evaluation.scored:
            continue
        scores = class_scores(evaluation.scored, place)
        for number, each in enumerate(evaluation.scored):
            texts = [for_csv(text) for text in (each.sample.id, each.sample.group, name)]
            values = [repr(float(scores[score][number])) for score in names]
            rows.writerow([*texts, *each.size, *each.counts[place].tolist(), *values])
    return table.getvalue()


def write_report(
    evaluation: Evaluation, folder: Path, mask_of: Callable[[Sample], Path], decoding: Decoding
) -> list[Path]:
    """evaluation.json, scores.csv and report.html in `folder`, which is there. Raises StorageError."""
    content = figures_of(evaluation)
    pictures: list[Picture] = []
    if evaluation.scored:
        pictures = _case_pictures(evaluation, mask_of, decoding)
        if evaluation.bins is not None:
            pictures.append(_reliability(evaluation.bins.sum(axis=0)))
    files = {
        "evaluation.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        "scores.csv": scores_csv(evaluation),
        "report.html": study_page(_page(evaluation, content, pictures)),
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def flat_metrics(content: dict[str, Any], prefix: str) -> dict[str, float]:
    """The means as a tracker's metrics, `{prefix}/own/dice` and so on."""
    metrics = {}
    for part in ("own", "network"):
        for name, value in content.get(part, {}).items():
            metrics[f"{prefix}/{part}/{name}"] = value["mean"]
    for number, scores in enumerate(content.get("classes", {}).values(), start=1):
        for name, value in scores.items():
            metrics[f"{prefix}/class_{number}/{name}"] = value["mean"]
    if "calibration" in content:
        metrics[f"{prefix}/ece"] = content["calibration"]["ece"]
    return metrics


def _with_intervals(scores: dict[str, NDArray[np.float64]], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name, values in scores.items():
        mean, low, high = grouped_interval(values, groups)
        found[name] = {"mean": mean, "low": low, "high": high, "median": float(np.median(values))}
    return found


def _calibration(bins: NDArray[np.float64], groups: Sequence[str]) -> dict[str, Any]:
    """Over all pixels together; the interval is over resampled groups."""
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    grouped = np.zeros((place.max() + 1, BINS, 3))
    np.add.at(grouped, place, bins)
    rng = np.random.default_rng(0)
    drawn = [
        expected_calibration_error(grouped[rng.integers(len(grouped), size=len(grouped))].sum(axis=0))
        for _ in range(1000)
    ]
    whole = bins.sum(axis=0)
    low, high = np.nanpercentile(drawn, (2.5, 97.5)) if not np.isnan(drawn).all() else (math.nan, math.nan)
    ece = expected_calibration_error(whole)
    rows = [{"pixels": int(n), "confidence": c / n, "right": r / n} for n, c, r in whole.tolist() if n]
    return {"ece": ece, "low": float(low), "high": float(high), "bins": rows} if math.isfinite(ece) else {"bins": []}


def _page(evaluation: Evaluation, content: dict[str, Any], pictures: Sequence[Picture]) -> StudyPage:
    count, groups = content["images"], content["groups"]
    paragraphs = [
        f"{counted(count, 'image')}, {counted(groups, 'group')}. Means over images, with 95 % "
        "bootstrap intervals over groups."
    ]
    if evaluation.tolerance is not None:
        paragraphs.append(
            f"Surface Dice: the share of the outlines within {evaluation.tolerance:.2%} of the image's diagonal of "
            "each other. Where one of two regions is empty, the diagonal stands for the Hausdorff distance."
        )
    if content.get("calibration", {}).get("bins"):
        found = content["calibration"]
        paragraphs.append(
            f"Expected calibration error over pixels, {BINS} bins: {found['ece']:.4f} "
            f"[{found['low']:.4f}, {found['high']:.4f}]."
        )
    over = "images and classes" if len(evaluation.classes) > 2 else "images"
    tables = []
    if count:
        columns = {"own": "at the files' own resolution", "network": "at the network's resolution"}
        shown = {title: content[part] for part, title in columns.items() if part in content}
        tables = [_scores_table(f"Means over {over}", shown), _scores_table("Classes", content["classes"])]
    if content.get("by_group"):
        worst = sorted(content["by_group"].items(), key=lambda item: item[1]["dice"])[:_SHOWN_GROUPS]
        groups_shown = [Row([name, str(each["images"]), f"{each['dice']:.3f}"]) for name, each in worst]
        tables.append(Table("Groups, the worst first", ["group", "images", "Dice"], groups_shown))
    if count:
        order = np.argsort(evaluation.dice, kind="stable")[: 4 * _SHOWN_CASES]
        worst_images = [Row([evaluation.scored[n].sample.id, f"{evaluation.dice[n]:.3f}"]) for n in order]
        tables.append(Table("Images, the worst first", ["image", "Dice"], worst_images))
    if evaluation.problems:
        rows = [Row([problem.id, problem.file, problem.reason]) for problem in evaluation.problems]
        tables.append(Table("Not scored", ["id", "file", "reason"], rows))
    warning = f"{counted(len(evaluation.problems), 'image')} could not be scored." if evaluation.problems else ""
    return StudyPage(evaluation.title, paragraphs, warning, tables, pictures)


def _scores_table(title: str, columns: dict[str, dict[str, Any]]) -> Table:
    """A row a score."""
    rows = []
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        factor = 100 if name.endswith("_share") else 1
        cells = [_TITLES.get(name, name.capitalize())]
        for column in columns.values():
            mean, low, high = (factor * column[name][part] for part in ("mean", "low", "high"))
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(Row(cells))
    return Table(title, ["", *columns], rows)


def _case_pictures(evaluation: Evaluation, mask_of: Callable[[Sample], Path], decoding: Decoding) -> list[Picture]:
    order = np.argsort(evaluation.dice, kind="stable")
    middle = max(0, len(order) // 2 - _SHOWN_CASES // 2)
    chosen = {"worst": order[:_SHOWN_CASES], "median": order[middle : middle + _SHOWN_CASES]}
    pictures = []
    for name, places in chosen.items():
        samples = [evaluation.scored[place].sample for place in places]
        drawn = [_reduced(sample, mask_of(sample), decoding) for sample in samples]
        images, truths, masks = zip(*drawn, strict=True)
        listed = ", ".join(
            f"{sample.id} ({evaluation.dice[place]:.3f})" for sample, place in zip(samples, places, strict=True)
        )
        sheet = contact_sheet(images, truths, {"prediction": masks})
        caption = f"The {name} cases by Dice, from the top: {listed}. Blue: reference; yellow: prediction"
        pictures.append(Picture(f"{name}.png", caption, png(sheet)))
    return pictures


def _reduced(sample: Sample, mask: Path, decoding: Decoding) -> tuple[NDArray[np.uint8], ...]:
    """Image, reference and prediction at a size to be looked at."""
    frame = Frame(_CASE_SIDE, "letterbox")
    canvas, size = read_canvas(sample.image, frame, decoding)
    place = frame.place(*size)
    masks = [resize_mask(read_mask(path, decoding), place.height, place.width) for path in (sample.truth, mask)]
    return canvas[place.picture], *masks


def _reliability(bins: NDArray[np.float64]) -> Picture:
    used = bins[bins[:, 0] > 0]
    points = [(float(c / n), float(r / n), 0.0) for n, c, r in used]
    ideal = [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0)]
    chart = line_charts({"reliability": {"network": points, "ideal": ideal}}, "confidence", "share of right pixels")
    return Picture("reliability.png", "Reliability: how often pixels of a confidence are right", png(chart))
