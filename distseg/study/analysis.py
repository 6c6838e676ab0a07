"""The finished runs of a study, put into cells, and what the cells show beside each other."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from distseg.errors import UserError
from distseg.evaluation.intervals import paired_difference
from distseg.evaluation.metrics import class_scores, image_scores, read_counts_csv
from distseg.study.plan import ANY, Plan, PlannedRun

REFERENCE = "noisy_only"
"""What the paired tests compare with."""
CEILING = "oracle"
HISTORY = "meta/auroc"
_COUNTS = "test_counts.csv"


class RunSource(Protocol):
    """Where a study's runs are read from: tracking.mlflow.Study, or study.local.LocalRuns for their folders."""

    def read_text(self, artifact: str) -> str | None:
        """A text file of the study itself, None where there is none."""

    def runs(self, histories: Iterable[str], texts: Iterable[str]) -> list[dict[str, Any]]:
        """`run_id`, `name`, `status`, `metrics`, `history` and `texts` of each run, the newest first."""

    def images(self, run_id: str, key: str) -> dict[int, bytes]:
        """A run's PNGs under this key, by step."""


@dataclass(frozen=True)
class FinishedRun:
    """A run of the study that has its test scores."""

    run_id: str
    place: PlannedRun
    metrics: Mapping[str, float]
    auroc: Sequence[tuple[int, float]]
    """Of the alignment map, by step."""
    ids: tuple[str, ...]
    """The test images."""
    scores: Mapping[str, np.ndarray]
    """Of each test image; of more than two classes, macro means."""
    class_dice: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of more than two classes, each test image's Dice of each class but background."""


@dataclass(frozen=True)
class PairedTest:
    """A difference of mean scores over the images that both sides were tested on, its 95 % interval and p."""

    mean: float
    low: float
    high: float
    p: float
    images: int


@dataclass(frozen=True)
class Incomparable:
    """Why there is no paired test."""

    reason: str


@dataclass(frozen=True)
class Cell:
    """A method at a noise level, a clean count and a point of its grid, over its seeds."""

    noise: str
    clean_count: int
    method: str
    grid: Mapping[str, str]
    runs: Sequence[FinishedRun]

    @property
    def setting(self) -> tuple[str, int]:
        return self.noise, self.clean_count

    @property
    def label(self) -> str:
        """The method with its point of the grid, by the last parts of the keys."""
        values = (f"{key.rpartition('.')[2]} {value}" for key, value in self.grid.items())
        return ", ".join([self.method, *values])

    def of_seeds(self, score: str) -> np.ndarray:
        return np.array([run.scores[score].mean() for run in self.runs])

    @property
    def class_names(self) -> list[str]:
        """The classes that have scores of their own, in every run; none of two classes."""
        return [name for name in self.runs[0].class_dice if all(name in run.class_dice for run in self.runs)]

    def of_class(self, name: str) -> np.ndarray:
        """The mean Dice of one class by seed."""
        return np.array([run.class_dice[name].mean() for run in self.runs])

    def mean(self, score: str) -> float:
        return float(self.of_seeds(score).mean())

    def deviation(self, score: str) -> float | None:
        """Over seeds, n − 1 in the denominator; None for one seed."""
        return float(self.of_seeds(score).std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def validation(self) -> float | None:
        """Mean over seeds of the best validation Dice: what a point of the grid is chosen by."""
        return mean_of(run.metrics.get("best_val_dice") for run in self.runs)

    def above(self, other: "Cell", score: str) -> bool:
        """Whether the means are apart by more than both deviations together, which one seed does not tell."""
        ours, theirs = self.deviation(score), other.deviation(score)
        if ours is None or theirs is None or isinstance(self.against(other, score), Incomparable):
            return False
        return self.mean(score) - other.mean(score) > ours + theirs

    def against(self, other: "Cell", score: str) -> PairedTest | Incomparable:
        """This cell's scores less the other's, image by image.

        Runs are paired by seed and their test images by id; each image's difference is averaged over the seeds that
        tested it, because where the data brings no test split, seeds may test other images.
        """
        mine, theirs = ({run.place.seed: run for run in cell.runs} for cell in (self, other))
        seeds = [seed for seed in mine if seed in theirs]
        if not seeds:
            return Incomparable("no common seed")
        differences: dict[str, list[float]] = {}
        for seed in seeds:
            ours = dict(zip(mine[seed].ids, mine[seed].scores[score], strict=True))
            for name, value in zip(theirs[seed].ids, theirs[seed].scores[score], strict=True):
                if name in ours:
                    differences.setdefault(name, []).append(ours[name] - value)
        if not differences:
            return Incomparable("other test images")
        per_image = np.array([np.mean(values) for values in differences.values()])
        return PairedTest(*paired_difference(per_image, np.zeros_like(per_image)), len(per_image))


def collect(source: RunSource, plan: Plan) -> tuple[list[FinishedRun], list[str]]:
    """The finished runs in the order of the plan, and the names of the others.

    Raises UserError for a run whose test counts cannot be read.
    """
    places = {place.name: place for place in plan.runs}
    found: dict[str, FinishedRun] = {}
    for run in source.runs([HISTORY], [_COUNTS]):
        name, counts = run["name"], run["texts"][_COUNTS]
        if name not in places or name in found or counts is None or run["status"] != "FINISHED":
            continue
        try:
            ids, table, names = read_counts_csv(counts)
        except ValueError as error:
            raise UserError(f"{_COUNTS} of run {name}: {error}; remove the run's folder to make it again") from None
        if ids:
            metrics = {key: value for key, value in run["metrics"].items() if math.isfinite(value)}
            auroc = [(step, value) for step, value in run["history"][HISTORY] if math.isfinite(value)]
            class_dice = dict(zip(names, class_scores(table)["dice"].T, strict=True)) if names else {}
            found[name] = FinishedRun(
                run["run_id"], places[name], metrics, auroc, tuple(ids), image_scores(table), class_dice
            )
    return [found[name] for name in places if name in found], [name for name in places if name not in found]


def make_cells(finished: Sequence[FinishedRun], plan: Plan) -> list[Cell]:
    """Noise levels × clean counts × methods × grids; a run that stands for all levels or counts is in each of them."""
    points: dict[str, list[dict[str, str]]] = {method: [] for method in plan.methods}
    for place in plan.runs:
        if place.method in points and place.grid not in points[place.method]:
            points[place.method].append(place.grid)
    places = [(method, grid) for method in plan.methods for grid in points[method]]
    cells = []
    for noise in plan.noise:
        for clean_count in plan.clean_counts:
            for method, grid in places:
                runs = [
                    run
                    for run in finished
                    if (run.place.method, run.place.grid) == (method, grid)
                    and run.place.noise in (noise, ANY)
                    and run.place.clean_count in (str(clean_count), ANY)
                ]
                if runs:
                    cells.append(Cell(noise, clean_count, method, grid, runs))
    return cells


def chosen(cells: Sequence[Cell]) -> list[Cell]:
    """Of each method in each setting, the cell of the grid's point with the best mean validation Dice."""
    best: dict[tuple[str, int, str], Cell] = {}
    for cell in cells:
        key = (*cell.setting, cell.method)
        if key not in best or (cell.validation or 0) > (best[key].validation or 0):
            best[key] = cell
    return list(best.values())


def verdict(cells: Sequence[Cell], champion: str) -> list[str]:
    """Where the champion is above all others but the ceiling, outside the spread over seeds, and where it is not.

    `cells` has one cell a method and setting, as `chosen` returns them. One sentence an item.
    """
    ours = {cell.setting: cell for cell in cells if cell.method == champion}
    short: dict[tuple[str, int], list[str]] = {}
    for cell in cells:
        if (
            cell.setting in ours
            and cell.method not in (champion, CEILING)
            and not ours[cell.setting].above(cell, "dice")
        ):
            apart = ours[cell.setting].against(cell, "dice")
            reason = f"; {apart.reason}" if isinstance(apart, Incomparable) else ""
            short.setdefault(cell.setting, []).append(f"{cell.label} ({plus_minus(cell, 'dice')}{reason})")
    sentences = [
        f"{champion} is above every other method but the {CEILING}, by more than the deviations over seeds of both "
        f"together, in {len(ours) - len(short)} of {len(ours)} settings."
    ]
    for setting, rivals in short.items():
        noise, clean_count = setting
        score = plus_minus(ours[setting], "dice")
        sentences.append(f"Not at {noise}, K = {clean_count}: {score} against {', '.join(rivals)}.")
    return sentences


def references(champion: str | None) -> list[str]:
    """The methods that differences are taken to."""
    return list(dict.fromkeys([REFERENCE, *([champion] if champion else [])]))


def plus_minus(cell: Cell, score: str) -> str:
    """Mean ± deviation over seeds."""
    return spread(cell.of_seeds(score))


def spread(of_seeds: np.ndarray) -> str:
    """Mean ± deviation, n − 1 in the denominator; the number alone for one seed."""
    deviation = f" ± {of_seeds.std(ddof=1):.3f}" if len(of_seeds) > 1 else ""
    return f"{of_seeds.mean():.3f}{deviation}"


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
