"""The report of a study: tables, figures, and one HTML page that holds them all."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.pages.figures import bar_chart, line_charts, png
from distseg.pages.html import Picture, Row, StudyPage, Table, study_page
from distseg.study.analysis import (
    CEILING,
    Cell,
    FinishedRun,
    PairedTest,
    RunSource,
    chosen,
    collect,
    make_cells,
    mean_of,
    plus_minus,
    references,
    spread,
    verdict,
)
from distseg.study.plan import Plan, parse_plan
from distseg.study.tables import aligned
from distseg.text import for_csv

_SCORES = ("dice", "jaccard", "sensitivity", "specificity")
_Point = tuple[float | str, float, float]


@dataclass(frozen=True)
class Report:
    text: str
    """For a terminal."""
    files: list[Path]


def write_report(source: RunSource, where: str, folder: Path) -> Report:
    """Write report.html, its PNGs and CSVs into `folder`.

    `source` holds the study, and `where` names it in messages. Raises UserError where the source holds no valid plan
    or no finished run.
    """
    text = source.read_text("plan.json")
    if text is None:
        raise UserError(f"{where}: is no study, it has no plan.json; give the one that launch/sweep.py has made")
    plan = parse_plan(text, where)
    finished, missing = collect(source, plan)
    if not finished:
        raise UserError(f"study {plan.name}: none of its {len(plan.runs)} runs has finished; run it first")
    cells = make_cells(finished, plan)

    pictures = [*_charts(cells, plan), *_weight_maps(source, finished, plan)]
    files = {picture.name: picture.png for picture in pictures}
    files["results.csv"] = results_csv(cells, plan).encode()
    files["runs.csv"] = runs_csv(finished, plan).encode()
    files["report.html"] = study_page(_page(plan, cells, missing, pictures)).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return Report(_terminal_text(plan, cells, missing, folder / "report.html"), [folder / name for name in files])


def results_csv(cells: Sequence[Cell], plan: Plan) -> str:
    """One row a cell, figures at full precision.

    Differences are to the reference's cell of the same setting, at its chosen point of the grid; they are empty where
    the two share no test images.
    """
    others = references(plan.champion)
    header = ["noise", "clean_count", "method", *plan.grid_keys, "seeds"]
    header += [f"{score}_{part}" for score in _SCORES for part in ("mean", "sd")]
    classes = _class_names(cells)
    header += [f"dice_{name}_mean" for name in classes] + ["best_val_dice_mean"]
    header += [f"dice_minus_{name}{part}" for name in others for part in ("", "_low", "_high", "_p", "_images")]
    bases = _bases(cells)
    rows = []
    for cell in cells:
        row = [cell.noise, str(cell.clean_count), cell.method, *_grid_values(cell, plan), str(len(cell.runs))]
        for score in _SCORES:
            row += [str(cell.mean(score)), _or_empty(cell.deviation(score))]
        row += [str(cell.of_class(name).mean()) if name in cell.class_names else "" for name in classes]
        row += [_or_empty(cell.validation)]
        for name in others:
            base = bases.get((*cell.setting, name))
            test = cell.against(base, "dice") if base and base is not cell else None
            if isinstance(test, PairedTest):
                row += [str(value) for value in (test.mean, test.low, test.high, test.p, test.images)]
            else:
                row += [""] * 5
        rows.append(row)
    return _csv([header, *rows])


def runs_csv(finished: Sequence[FinishedRun], plan: Plan) -> str:
    """One row a run. Learning rates are chosen by best_val_dice, never by what stands right of it."""
    names = ("noise_rate", "steps", "seconds", "best_val_dice", "val/dice", "test/dice", "test/jaccard")
    header = ["name", "method", "noise", "clean_count", *plan.grid_keys, "seed", *names]
    rows = []
    for run in finished:
        place = run.place
        row = [place.name, place.method, place.noise, place.clean_count]
        row += [*(place.grid.get(key, "") for key in plan.grid_keys), place.seed]
        rows.append([*row, *(_or_empty(run.metrics.get(name)) for name in names)])
    return _csv([header, *rows])


def _csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO(newline="")
    # Numbers may be negative; texts must not be calculated.
    csv.writer(out, lineterminator="\n").writerows([[_csv_cell(cell) for cell in row] for row in rows])
    return out.getvalue()


def _csv_cell(cell: str) -> str:
    try:
        float(cell)
    except ValueError:
        return for_csv(cell)
    return cell


def _or_empty(value: float | None) -> str:
    return "" if value is None else str(value)


def _grid_values(cell: Cell, plan: Plan) -> list[str]:
    return [cell.grid.get(key, "") for key in plan.grid_keys]


def _bases(cells: Sequence[Cell]) -> dict[tuple[str, int, str], Cell]:
    """By setting and method: the cell that other cells are compared with."""
    return {(*cell.setting, cell.method): cell for cell in chosen(cells)}


def _class_names(cells: Sequence[Cell]) -> list[str]:
    """The classes that have a Dice of their own; none of two classes."""
    return list(dict.fromkeys(name for cell in cells for name in cell.class_names))


def _terminal_text(plan: Plan, cells: Sequence[Cell], missing: Sequence[str], page: Path) -> str:
    grid = plan.grid_keys
    rows = [("noise", "K", "method", *grid, *(["val Dice"] if grid else []), "test Dice", "Jaccard", "seeds")]
    for cell in cells:
        validation = [_rounded(cell.validation)] if grid else []
        place = (cell.noise, str(cell.clean_count), cell.method, *_grid_values(cell, plan))
        rows.append((*place, *validation, plus_minus(cell, "dice"), plus_minus(cell, "jaccard"), str(len(cell.runs))))
    parts = [aligned(rows, texts=3 + len(grid))]
    if grid:
        parts.append("\n".join(_choices(cells)))
    if plan.champion:
        parts.append("\n".join(verdict(chosen(cells), plan.champion)))
    if missing:
        parts.append(f"{len(missing)} of {len(plan.runs)} runs have not finished: {', '.join(missing[:5])}")
    parts.append(f"report          {page}")
    return "\n\n".join(parts)


def _choices(cells: Sequence[Cell]) -> list[str]:
    """For each setting one sentence: which point of the grid each method is best at, by validation Dice."""
    by_setting: dict[tuple[str, int], list[str]] = {}
    for cell in chosen(cells):
        if cell.grid:
            values = ", ".join(f"{key}={value}" for key, value in cell.grid.items())
            best = f"{cell.method} with {values} ({_rounded(cell.validation)})"
            by_setting.setdefault(cell.setting, []).append(best)
    return [
        f"Best by validation Dice at {noise}, K = {k}: {'; '.join(best)}." for (noise, k), best in by_setting.items()
    ]


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _page(plan: Plan, cells: Sequence[Cell], missing: Sequence[str], pictures: Sequence[Picture]) -> StudyPage:
    seeds = ", ".join(str(seed) for seed in plan.seeds)
    about = (
        f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs; seeds {seeds}. Test scores are means over images "
        "at threshold 0.5 of the last step's network; ± is the standard deviation over seeds. Differences are of Dice "
        "at the same noise level and clean count, image by image: runs are paired by seed and images by id, and each "
        "image's difference is averaged over the seeds that tested it. The interval is 95 % and p two-sided, from "
        "10,000 resamples of the test images; p is not corrected for the number of comparisons, and knows nothing of "
        "the spread over seeds. "
    )
    if classes := _class_names(cells):
        about += f"Scores are macro means over {', '.join(classes)}; those of each class have tables of their own. "
    if plan.grid_keys:
        about += (
            f"Points of the grid ({', '.join(plan.grid_keys)}) are chosen by validation Dice; differences and figures "
            "take each method at its chosen point. "
        )
    about += f"The best mean other than {CEILING} is bold."
    warning = f"{len(missing)} runs have not finished and are left out: {', '.join(missing)}" if missing else ""
    paragraphs = [about, *_choices(cells)]
    if plan.champion:
        paragraphs += verdict(chosen(cells), plan.champion)
    return StudyPage(plan.name, paragraphs, warning, _tables(plan, cells), pictures)


def _tables(plan: Plan, cells: Sequence[Cell]) -> list[Table]:
    """One table a noise level and clean count."""
    others, grid = references(plan.champion), plan.grid_keys
    header = ["method", *grid, *(["val Dice"] if grid else []), "test Dice", "Jaccard"]
    header += [title for name in others for title in (f"Dice − {name}", "p")]
    bases, tables = _bases(cells), []
    for setting in dict.fromkeys(cell.setting for cell in cells):
        here = [cell for cell in cells if cell.setting == setting]
        rivals = [cell for cell in chosen(here) if cell.method != CEILING]
        best = max(rivals, key=lambda cell: cell.mean("dice"), default=None)
        rows = []
        for cell in here:
            texts = [cell.method, *_grid_values(cell, plan), *([_rounded(cell.validation)] if grid else [])]
            texts += [plus_minus(cell, "dice"), plus_minus(cell, "jaccard")]
            for name in others:
                texts += _difference(cell, bases.get((*setting, name)))
            rows.append(Row([*texts, str(len(cell.runs))], best=cell is best))
        title = f"{setting[0]}, K = {setting[1]}"
        tables.append(Table(title, [*header, "seeds"], rows))
        if classes := _class_names(here):
            tables.append(_class_table(f"{title}: Dice of each class", here, classes, plan))
    return tables


def _class_table(title: str, cells: Sequence[Cell], classes: Sequence[str], plan: Plan) -> Table:
    """A row a cell, a column a class."""
    rows = [
        Row(
            [
                cell.method,
                *_grid_values(cell, plan),
                *(spread(cell.of_class(name)) if name in cell.class_names else "–" for name in classes),
                str(len(cell.runs)),
            ]
        )
        for cell in cells
    ]
    return Table(title, ["method", *plan.grid_keys, *classes, "seeds"], rows)


def _difference(cell: Cell, base: Cell | None) -> tuple[str, str]:
    """The texts of a paired test: the difference with its interval, and p."""
    if base is None or base is cell:
        return "–", "–"
    test = cell.against(base, "dice")
    if not isinstance(test, PairedTest):
        return test.reason, "–"
    tested = {name for run in cell.runs for name in run.ids}
    part = "" if test.images == len(tested) else f" ({test.images} images)"
    return f"{test.mean:+.3f} [{test.low:+.3f}, {test.high:+.3f}]{part}", f"{test.p:.2g}"


def _charts(every: Sequence[Cell], plan: Plan) -> list[Picture]:
    """The figures that the metrics give; each method at the chosen point of its grid."""
    cells = chosen(every)
    at = {(*cell.setting, cell.method): cell for cell in cells}
    levels, counts, methods = plan.noise, plan.clean_counts, plan.methods

    def point(x: float | str, noise: str, count: int, method: str) -> list[_Point]:
        cell = at.get((noise, count, method))
        return [(x, cell.mean("dice"), cell.deviation("dice") or 0.0)] if cell else []

    pictures = [
        Picture(
            "dice_by_noise.png",
            "Test Dice by noise level, mean and standard deviation over seeds",
            _lines(
                {f"K = {k}": {m: [p for n in levels for p in point(n, n, k, m)] for m in methods} for k in counts},
                "noise level",
                "test Dice",
            ),
        ),
        Picture(
            "dice_by_clean_count.png",
            "Test Dice by the number of clean images K",
            _lines(
                {n: {m: [p for k in counts for p in point(float(k), n, k, m)] for m in methods} for n in levels},
                "K",
                "test Dice",
            ),
        ),
    ]
    rates = {level: rate for level in levels if (rate := _noise_rate(level, cells)) is not None}
    if known := sorted(rates, key=lambda level: rates[level]):
        series = {
            f"K = {k}": {m: [p for n in known for p in point(100 * rates[n], n, k, m)] for m in methods} for k in counts
        }
        caption = "Test Dice by the share of wrong pixels in the noisy masks: mean and deviation over seeds"
        pictures.append(Picture("dice_by_wrong_pixels.png", caption, _lines(series, "wrong pixels, %", "test Dice")))
    pictures += [_grid_chart(number, key, every) for number, key in enumerate(plan.grid_keys)]
    pictures += [*_detection_chart(cells, levels), *_cost_chart(cells, methods)]
    return pictures


def _lines(panels: dict[str, dict[str, list[_Point]]], x_label: str, y_label: str, log_x: bool = False) -> bytes:
    return png(line_charts(panels, x_label, y_label, log_x))


def _noise_rate(level: str, cells: Sequence[Cell]) -> float | None:
    runs = [run for cell in cells if cell.noise == level for run in cell.runs if run.place.noise == level]
    return mean_of(run.metrics.get("noise_rate") for run in runs)


def _grid_chart(number: int, key: str, cells: Sequence[Cell]) -> Picture:
    """Validation Dice along one key of the grid; a line for each method and each point of the other keys."""
    varied = [cell for cell in cells if key in cell.grid and cell.validation is not None]
    values = [_number(cell.grid[key]) for cell in varied]
    numbers = [value for value in values if value is not None]
    numeric = len(numbers) == len(values)
    panels: dict[str, dict[str, list[_Point]]] = {}
    for cell, value in zip(varied, values, strict=True):
        others = {name: text for name, text in cell.grid.items() if name != key}
        label = Cell(cell.noise, cell.clean_count, cell.method, others, cell.runs).label
        x = value if numeric and value is not None else cell.grid[key]
        series = panels.setdefault(f"{cell.noise}, K = {cell.clean_count}", {})
        series.setdefault(label, []).append((x, cell.validation or 0.0, 0.0))
    if numeric:
        panels = {title: {name: sorted(points) for name, points in series.items()} for title, series in panels.items()}
    wide = numeric and bool(numbers) and min(numbers) > 0 and max(numbers) >= 8 * min(numbers)
    return Picture(
        f"grid_{number}_{re.sub(r'[^A-Za-z0-9]+', '_', key)}.png",  # the key may be anybody's
        f"Best validation Dice by {key}, mean over seeds",
        _lines(panels, key, "best validation Dice", log_x=wide),
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _detection_chart(cells: Sequence[Cell], levels: Sequence[str]) -> list[Picture]:
    panels = {
        level: {f"{c.label}, K = {c.clean_count}": curve for c in cells if c.noise == level and (curve := _auroc(c))}
        for level in levels
    }
    if panels := {level: series for level, series in panels.items() if series}:
        caption = "How well the alignment map U tells wrong pixels from right ones over training: AUROC, 0.5 is chance"
        return [Picture("auroc.png", caption, _lines(panels, "step", "AUROC of U"))]
    return []


def _cost_chart(cells: Sequence[Cell], methods: Sequence[str]) -> list[Picture]:
    cost = {m: mean_of(_seconds_per_step(r) for c in cells if c.method == m for r in c.runs) for m in methods}
    if known := {method: value for method, value in cost.items() if value is not None}:
        caption = "Cost of each method: wall-clock of training over its steps, validations included"
        return [Picture("cost.png", caption, png(bar_chart(known, "seconds a step")))]
    return []


def _weight_maps(source: RunSource, finished: Sequence[FinishedRun], plan: Plan) -> list[Picture]:
    """For each noise level the first and the last training panel of one run whose weights were diagnosed."""
    pictures = []
    for number, level in enumerate(plan.noise):
        weighted = [run for run in finished if run.place.noise == level and run.auroc]
        if not weighted:
            continue
        run = min(weighted, key=_by_interest)
        panels = sorted(source.images(run.run_id, "training batch").items())
        for when, (step, picture) in zip(("early", "late"), (panels[0], panels[-1]) if panels else (), strict=False):
            what = f"{run.place.method}, {level}, K = {run.place.clean_count}, step {step}"
            name = f"weights_{number}_{when}.png"
            pictures.append(Picture(name, f"Weights beside the wrong labels: {what}", picture))
    return pictures


def _by_interest(run: FinishedRun) -> tuple[bool, int, int]:
    """pixel_reweight first, then the first seed, then the largest clean count."""
    count = run.place.clean_count
    return run.place.method != "pixel_reweight", int(run.place.seed), -int(count) if count.isdecimal() else 0


def _auroc(cell: Cell) -> list[_Point]:
    """Mean over seeds at the steps that all of them have."""
    histories = [dict(run.auroc) for run in cell.runs if run.auroc]
    steps = sorted(set.intersection(*(set(history) for history in histories))) if histories else []
    return [(float(step), sum(h[step] for h in histories) / len(histories), 0.0) for step in steps]


def _seconds_per_step(run: FinishedRun) -> float | None:
    seconds, steps = run.metrics.get("seconds"), run.metrics.get("steps")
    return seconds / steps if seconds is not None and steps else None
