"""The report of a study, made from its tracker alone: tables, figures and one HTML page that holds them all.

Whoever can reach the tracking server can rebuild it: nothing is read from the folders of the runs.
"""

import base64
import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distseg.errors import UserError
from distseg.evaluation.metrics import image_scores, paired_difference, read_counts_csv
from distseg.evaluation.report import bar_chart, line_charts, save_png
from distseg.files import write_atomically

REFERENCE = "noisy_only"
"""What the paired tests compare with."""
CEILING = "oracle"
_ANY = "any"
_HISTORIES = ("meta/auroc",)
_COUNTS = "test_counts.csv"


class Tracker(Protocol):
    """What is asked of the tracker: distseg.tracking.mlflow.Study."""

    run_id: str

    def read_text(self, artifact: str) -> str | None: ...
    def runs(self, histories: Iterable[str], texts: Iterable[str]) -> list[dict[str, Any]]: ...
    def images(self, run_id: str, key: str) -> dict[int, bytes]: ...
    def log_file(self, path: Path, folder: str | None = None) -> None: ...


@dataclass(frozen=True)
class Finished:
    """A run of the study that has its test scores."""

    run_id: str
    name: str
    method: str
    noise: str
    """A level of the plan, or `any`."""
    clean_count: str
    seed: int
    metrics: Mapping[str, float]
    auroc: Sequence[tuple[int, float]]
    ids: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    """Of each test image."""


@dataclass(frozen=True)
class Cell:
    """A method at a noise level and clean count, over its seeds."""

    noise: str
    clean_count: int
    method: str
    runs: Sequence[Finished]

    def of_seeds(self, score: str) -> np.ndarray:
        return np.array([run.scores[score].mean() for run in self.runs])

    def mean(self, score: str) -> float:
        return float(self.of_seeds(score).mean())

    def deviation(self, score: str) -> float | None:
        """Over seeds, n − 1 in the denominator; None for one seed."""
        return float(self.of_seeds(score).std(ddof=1)) if len(self.runs) > 1 else None

    def above(self, other: "Cell", score: str) -> bool:
        """Whether the means are apart by more than both deviations together, which one seed does not tell."""
        spreads = (self.deviation(score), other.deviation(score))
        return None not in spreads and self.mean(score) - other.mean(score) > sum(spreads)

    def against(self, other: "Cell", score: str) -> tuple[float, float, float, float] | None:
        """`paired_difference` of the images' scores, each averaged over the seeds that both have; None without any."""
        mine, theirs = ({run.seed: run for run in cell.runs} for cell in (self, other))
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds or any(mine[s].ids != theirs[s].ids for s in seeds):
            return None
        return paired_difference(
            *(np.mean([runs[seed].scores[score] for seed in seeds], axis=0) for runs in (mine, theirs))
        )


def write_report(study: Tracker, folder: Path) -> str:
    """Write report.html, its PNGs and CSVs into `folder` and the study's artifacts; returns the table for a terminal.

    Raises UserError where the tracker holds no plan or no finished run.
    """
    plan = study.read_text("plan.json")
    if plan is None:
        raise UserError(f"run {study.run_id}: is no study, it has no plan.json; give the run that launch/sweep.py made")
    plan = json.loads(plan)
    finished, missing = collect(study, plan)
    if not finished:
        raise UserError(f"study {plan['name']}: none of its {len(plan['children'])} runs has finished; run it first")
    cells, champion = make_cells(finished, plan), plan.get("champion")

    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(cells, plan) | weight_maps(study, finished, plan)
    texts = {"results.csv": results_csv(cells, champion), "runs.csv": runs_csv(finished)}
    texts["report.html"] = page(plan, cells, missing, pictures)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    for name, (_, picture) in pictures.items():
        if isinstance(picture, bytes):
            write_atomically(folder / name, picture)
        else:
            save_png(picture, folder / name)
    for name in (*texts, *pictures):
        study.log_file(folder / name, "report")
    lines = [terminal_table(cells)]
    if champion:
        lines.append("\n" + verdict(cells, champion))
    if missing:
        lines.append(f"\n{len(missing)} of {len(plan['children'])} runs have not finished: {', '.join(missing[:5])}")
    return "\n".join([*lines, f"\nreport          {folder / 'report.html'}"])


def collect(study: Tracker, plan: Mapping[str, Any]) -> tuple[list[Finished], list[str]]:
    """The finished runs in the order of the plan, and the names of the others."""
    found: dict[str, Finished] = {}
    for run in study.runs(_HISTORIES, [_COUNTS]):
        counts = run["texts"][_COUNTS]
        if counts is None or run["status"] != "FINISHED" or run["name"] in found:
            continue
        ids, table = read_counts_csv(counts)
        tags = run["tags"]
        found[run["name"]] = Finished(
            run["run_id"],
            run["name"],
            tags["method"],
            tags["noise"],
            tags["clean_count"],
            int(tags["seed"]),
            run["metrics"],
            run["history"]["meta/auroc"],
            tuple(ids),
            image_scores(table),
        )
    names = [child["name"] for child in plan["children"]]
    return [found[name] for name in names if name in found], [name for name in names if name not in found]


def make_cells(finished: Sequence[Finished], plan: Mapping[str, Any]) -> list[Cell]:
    """Noise levels × clean counts × methods; a run that stands for all levels or counts is in each of them."""
    cells = []
    for noise in plan["noise"]:
        for clean_count in plan["clean_counts"]:
            for method in plan["methods"]:
                runs = [
                    run
                    for run in finished
                    if run.method == method
                    and run.noise in (noise, _ANY)
                    and run.clean_count in (str(clean_count), _ANY)
                ]
                if runs:
                    cells.append(Cell(noise, clean_count, method, runs))
    return cells


def verdict(cells: Sequence[Cell], champion: str) -> str:
    """Where the champion is above all others but the ceiling, outside the spread over seeds, and where it is not."""
    settings = list(dict.fromkeys((cell.noise, cell.clean_count) for cell in cells if cell.method == champion))
    at = {(cell.noise, cell.clean_count, cell.method): cell for cell in cells}
    short: dict[tuple[str, int], list[str]] = {}
    for noise, clean_count in settings:
        ours = at[noise, clean_count, champion]
        for cell in cells:
            rival = (cell.noise, cell.clean_count) == (noise, clean_count) and cell.method not in (champion, CEILING)
            if rival and not ours.above(cell, "dice"):
                short.setdefault((noise, clean_count), []).append(f"{cell.method} ({_plus_minus(cell, 'dice')})")
    told = [
        f"{champion} is above every other method but the {CEILING}, by more than the deviations over seeds of both "
        f"together, in {len(settings) - len(short)} of {len(settings)} settings."
    ]
    for (noise, clean_count), rivals in short.items():
        ours = _plus_minus(at[noise, clean_count, champion], "dice")
        told.append(f"Not at {noise}, K = {clean_count}: {ours} against {', '.join(rivals)}.")
    return "\n".join(told)


def results_csv(cells: Sequence[Cell], champion: str | None = None) -> str:
    """One row a cell, figures at full precision."""
    out = io.StringIO(newline="")
    rows = csv.writer(out, lineterminator="\n")
    scores = ("dice", "jaccard", "sensitivity", "specificity")
    header = ["noise", "clean_count", "method", "seeds"]
    header += [f"{score}_{part}" for score in scores for part in ("mean", "sd")]
    references = _references(champion)
    header += [f"dice_minus_{name}{part}" for name in references for part in ("", "_low", "_high", "_p")]
    rows.writerow(header)
    at = {(c.noise, c.clean_count, c.method): c for c in cells}
    for cell in cells:
        row = [cell.noise, cell.clean_count, cell.method, len(cell.runs)]
        for score in scores:
            row += [cell.mean(score), "" if cell.deviation(score) is None else cell.deviation(score)]
        for name in references:
            base = at.get((cell.noise, cell.clean_count, name))
            row += (cell.against(base, "dice") if base and base is not cell else None) or [""] * 4
        rows.writerow(row)
    return out.getvalue()


def runs_csv(finished: Sequence[Finished]) -> str:
    """One row a run. Learning rates are chosen by best_val_dice, never by what stands right of it."""
    out = io.StringIO(newline="")
    rows = csv.writer(out, lineterminator="\n")
    names = ("noise_rate", "steps", "seconds", "best_val_dice", "val/dice", "test/dice", "test/jaccard")
    rows.writerow(["name", "method", "noise", "clean_count", "seed", *names])
    for run in finished:
        rows.writerow(
            [run.name, run.method, run.noise, run.clean_count, run.seed, *(run.metrics.get(n, "") for n in names)]
        )
    return out.getvalue()


def draw(cells: Sequence[Cell], plan: Mapping[str, Any]) -> dict[str, tuple[str, np.ndarray]]:
    """File name to (caption, picture)."""
    levels, counts, methods = plan["noise"], plan["clean_counts"], plan["methods"]
    at = {(cell.noise, cell.clean_count, cell.method): cell for cell in cells}

    def point(x: float | str, noise: str, count: int, method: str) -> list[tuple[float | str, float, float]]:
        cell = at.get((noise, count, method))
        return [(x, cell.mean("dice"), cell.deviation("dice") or 0.0)] if cell else []

    rates = {level: _mean(r.metrics.get("noise_rate") for c in cells if c.noise == level for r in c.runs
                          if r.noise == level) for level in levels}  # fmt: skip
    pictures = {
        "dice_by_noise.png": (
            "Test Dice by noise level, mean and standard deviation over seeds",
            line_charts(
                {f"K = {k}": {m: [p for n in levels for p in point(n, n, k, m)] for m in methods} for k in counts},
                "noise level",
                "test Dice",
            ),
        ),
        "dice_by_clean_count.png": (
            "Test Dice by the number of clean images K",
            line_charts(
                {n: {m: [p for k in counts for p in point(k, n, k, m)] for m in methods} for n in levels},
                "K",
                "test Dice",
            ),
        ),
    }
    known = sorted((level for level in levels if rates[level] is not None), key=lambda level: rates[level])
    if known:
        series = {
            f"K = {k}": {m: [p for n in known for p in point(100 * rates[n], n, k, m)] for m in methods} for k in counts
        }
        pictures["dice_by_wrong_pixels.png"] = (
            "Test Dice by the share of wrong pixels in the noisy masks: mean and deviation over seeds",
            line_charts(series, "wrong pixels, %", "test Dice"),
        )
    detection = {
        level: {f"{c.method}, K = {c.clean_count}": curve for c in cells if c.noise == level and (curve := _auroc(c))}
        for level in levels
    }
    if any(detection.values()):
        pictures["auroc.png"] = (
            "How well the alignment map U tells wrong pixels from right ones over training: AUROC, 0.5 is chance",
            line_charts({level: series for level, series in detection.items() if series}, "step", "AUROC of U"),
        )
    cost = {m: _mean(_seconds_per_step(r) for c in cells if c.method == m for r in c.runs) for m in methods}
    if cost := {method: value for method, value in cost.items() if value is not None}:
        pictures["cost.png"] = (
            "Cost of each method: wall-clock of training over its steps, validations included",
            bar_chart(cost, "seconds a step"),
        )
    return pictures


def weight_maps(study: Tracker, finished: Sequence[Finished], plan: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """For each noise level the first and the last training panel of one run whose weights were diagnosed."""
    pictures = {}
    for place, level in enumerate(plan["noise"]):
        weighted = [run for run in finished if run.noise == level and run.auroc]
        if not weighted:
            continue
        run = min(weighted, key=lambda r: (r.method != "pixel_reweight", r.seed, -int(r.clean_count)))
        panels = sorted(study.images(run.run_id, "training batch").items())
        for name, (step, picture) in zip(("early", "late"), (panels[0], panels[-1]) if panels else (), strict=False):
            caption = f"Weights beside the wrong labels: {run.method}, {level}, K = {run.clean_count}, step {step}"
            pictures[f"weights_{place}_{name}.png"] = (caption, picture)
    return pictures


def page(
    plan: Mapping[str, Any],
    cells: Sequence[Cell],
    missing: Sequence[str],
    pictures: Mapping[str, tuple[str, np.ndarray | bytes]],
) -> str:
    """One HTML document with its pictures inside, for a browser and for the artifact viewer of the tracker."""
    seeds = ", ".join(str(seed) for seed in plan["seeds"])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{html.escape(plan['name'])}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(plan['name'])}</h1>",
        f"<p>{len(plan['children']) - len(missing)} of {len(plan['children'])} runs; seeds {seeds}. Test scores are "
        "means over images at threshold 0.5 of the last step's network; ± is the standard deviation over seeds. "
        "Differences are of Dice at the same noise level, image by image (each image's Dice averaged over the seeds "
        "first), with a 95&nbsp;% interval and a two-sided p from 10,000 resamples of the test images; p is not "
        "corrected for the number of comparisons, and knows nothing of the spread over seeds. The best mean other than "
        f"{CEILING} is bold.</p>",
    ]
    if champion := plan.get("champion"):
        parts += [f"<p>{html.escape(line)}</p>" for line in verdict(cells, champion).splitlines()]
    if missing:
        parts.append(
            f"<p class=warn>{len(missing)} runs have not finished and are left out: "
            f"{html.escape(', '.join(missing))}</p>"
        )
    for noise in plan["noise"]:
        for clean_count in plan["clean_counts"]:
            parts.append(_html_table(noise, clean_count, cells, champion))
    for name, (caption, picture) in pictures.items():
        encoded = base64.b64encode(picture if isinstance(picture, bytes) else _png(picture)).decode()
        parts.append(
            f"<figure><figcaption>{html.escape(caption)}</figcaption>"
            f'<img alt="{html.escape(name)}" src="data:image/png;base64,{encoded}"></figure>'
        )
    return "\n".join(parts) + "\n</html>\n"


def terminal_table(cells: Sequence[Cell]) -> str:
    """Dice of every cell in aligned columns."""
    rows = [("noise", "K", "method", "test Dice", "Jaccard", "seeds")]
    for cell in cells:
        scores = (_plus_minus(cell, "dice"), _plus_minus(cell, "jaccard"))
        rows.append((cell.noise, str(cell.clean_count), cell.method, *scores, str(len(cell.runs))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.3rem 0 1.5rem }
td, th { padding: 0.15rem 0.9rem; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid #999; font-weight: 600 }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
figure { margin: 2rem 0 } figcaption { font-weight: 600; margin-bottom: 0.4rem } img { max-width: 100% }
h2 { font-size: 1.05rem; margin: 1.2rem 0 0.2rem } .warn { color: #9C3A00 }
"""


def _html_table(noise: str, clean_count: int, cells: Sequence[Cell], champion: str | None) -> str:
    here = {cell.method: cell for cell in cells if cell.noise == noise and cell.clean_count == clean_count}
    if not here:
        return ""
    best = max((cell for cell in here.values() if cell.method != CEILING), key=lambda c: c.mean("dice"), default=None)
    references = _references(champion)
    columns = "".join(f"<th>Dice − {html.escape(name)}<th>p" for name in references)
    lines = [
        f"<h2>{html.escape(noise)}, K = {clean_count}</h2>"
        f"<table><tr><th>method<th>test Dice<th>Jaccard{columns}<th>seeds</tr>"
    ]
    for cell in here.values():
        dice = f"<b>{_plus_minus(cell, 'dice')}</b>" if cell is best else _plus_minus(cell, "dice")
        columns = "".join(_html_difference(cell, here.get(name)) for name in references)
        lines.append(
            f"<tr><td>{html.escape(cell.method)}<td>{dice}<td>{_plus_minus(cell, 'jaccard')}{columns}"
            f"<td>{len(cell.runs)}</tr>"
        )
    return "\n".join([*lines, "</table>"])


def _references(champion: str | None) -> list[str]:
    """What differences are taken to."""
    return list(dict.fromkeys([REFERENCE, *([champion] if champion else [])]))


def _html_difference(cell: Cell, base: Cell | None) -> str:
    test = cell.against(base, "dice") if base and base is not cell else None
    return f"<td>{test[0]:+.3f} [{test[1]:+.3f}, {test[2]:+.3f}]<td>{test[3]:.2g}" if test else "<td>–<td>–"


def _plus_minus(cell: Cell, score: str) -> str:
    deviation = cell.deviation(score)
    return f"{cell.mean(score):.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def _auroc(cell: Cell) -> list[tuple[int, float, float]]:
    """Mean over seeds at the steps that all of them have."""
    histories = [dict(run.auroc) for run in cell.runs if run.auroc]
    steps = sorted(set.intersection(*(set(history) for history in histories))) if histories else []
    return [(step, float(np.mean([history[step] for history in histories])), 0.0) for step in steps]


def _seconds_per_step(run: Finished) -> float | None:
    seconds, steps = run.metrics.get("seconds"), run.metrics.get("steps")
    return seconds / steps if seconds is not None and steps else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
