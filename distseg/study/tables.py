"""Tables of text: aligned columns for a terminal, or GitHub's markdown."""

from collections.abc import Sequence

import numpy as np

from distseg.study.comparison import FinishedFolder, Group, differing_keys
from distseg.study.records import RunResult
from distseg.text import for_terminal

_FIGURES = ("test Dice [95 %]", "Jaccard", "sensitivity", "specificity", "noise rate", "steps", "minutes")


def results_table(runs: Sequence[FinishedFolder], markdown: bool = False) -> str:
    """Table of final figures, one row a run, by method, and by name too where a method has several runs.

    A figure that is absent or null is shown as –.
    """
    named = len({run.result.method for run in runs}) < len(runs)
    header = ("method", *(["run"] if named else []), *_FIGURES)
    rows = [
        (run.result.method, *([run.path.name] if named else []), *_figures(run.result))
        for run in runs
    ]  # fmt: skip
    return aligned([header, *rows], markdown, texts=1 + named)


def groups_table(groups: Sequence[Group], markdown: bool = False) -> str:
    """Table of groups of runs, each with mean ± standard deviation (n − 1) over its runs.

    Between the method and the figures stand the keys that tell groups of one method apart.
    """
    keys = differing_keys(groups)
    rows = [("method", *keys, "runs", "test Dice", "Jaccard")]
    for group in groups:
        results = [run.result for run in group.runs]
        rows.append(
            (
                group.method,
                *(str(group.settings.get(key, "–")) for key in keys),
                str(len(results)),
                _spread([result.dice for result in results]),
                _spread([result.jaccard for result in results]),
            )
        )
    return aligned(rows, markdown)


def aligned(rows: Sequence[Sequence[str]], markdown: bool = False, texts: int = 1) -> str:
    """Columns of equal width under a header and a rule: the first `texts` to the left, figures to the right."""
    shown = [[_cell(cell, markdown) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        padded = [cell.ljust(width) for cell, width in zip(row[:texts], widths, strict=False)]
        lines.append(padded + [cell.rjust(width) for cell, width in zip(row[texts:], widths[texts:], strict=True)])
    rule = ["-" * width for width in widths]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], rule, *lines[1:]])
    rule = [dashes if place < texts else dashes[:-1] + ":" for place, dashes in enumerate(rule)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _cell(text: str, markdown: bool) -> str:
    text = for_terminal(text)
    return text.replace("|", "\\|") if markdown else text


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{deviation}"


def _figures(result: RunResult) -> tuple[str, ...]:
    def shown(value: float | None, form: str, scale: float = 1.0) -> str:
        return "–" if value is None else format(value * scale, form)

    dice = shown(result.dice, ".3f")
    if result.dice is not None:
        dice += f" [{shown(result.dice_low, '.3f')}, {shown(result.dice_high, '.3f')}]"
    return (
        dice,
        shown(result.jaccard, ".3f"),
        shown(result.sensitivity, ".3f"),
        shown(result.specificity, ".3f"),
        shown(result.noise_rate, ".1%"),
        shown(result.steps, ".0f"),
        shown(result.seconds, ".1f", 1 / 60),
    )
