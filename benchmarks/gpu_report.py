"""The summary of `benchmarks/gpu.py`: Markdown and a plot, of whatever its stages have found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PLOTTED = {"meta_step": "× plain", "kernels": "× copy", "training": "images/s", "labels": "ms", "decoding": "images/s"}
"""The column that is drawn of each stage's tables."""


def markdown(outcomes: Sequence[Mapping[str, Any]], figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of how each stage ended, then the stages' own tables.

    outcomes: stage, title, status, seconds and why of each; figures: by stage, what it has written.
    """
    machine = next((each["machine"] for each in figures.values()), {})
    rows = [{"stage": o["stage"], "": o["status"], "seconds": o["seconds"], "why": o["why"]} for o in outcomes]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items()), table(rows)]
    for outcome in outcomes:
        tables = figures.get(outcome["stage"], {}).get("tables", {})
        if tables:
            parts.append(f"## {outcome['title']}")
        for title, own in tables.items():
            parts += [title, table(own)]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows; a column that some row lacks is empty there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel of bars for each table that has a column to draw."""
    from matplotlib.figure import Figure

    panels = [
        (title, column, [row for row in rows if isinstance(row.get(column), int | float)])
        for stage, column in PLOTTED.items()
        for title, rows in figures.get(stage, {}).get("tables", {}).items()
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    heights = [0.7 + 0.16 * len(rows) for *_, rows in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.3), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, column, rows) in zip(every, panels, strict=True):
        labels = [" ".join(value for value in row.values() if isinstance(value, str)) for row in rows]
        axes.barh(range(len(rows)), [row[column] for row in rows], color="#0072B2")
        axes.set_yticks(range(len(rows)), labels, fontsize=6)
        axes.invert_yaxis()
        axes.set_title(f"{title} [{column}]", fontsize=7)
        axes.tick_params(axis="x", labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")
