"""Test Dice of each method over the share of pixels that are drawn wrong: a table, and the curve as a PNG.

    python benchmarks/noise_levels.py RUNS.csv… [--clean-count 50] [--seeds 0 1 2] [--png FILE]

RUNS.csv is what launch/sweep.py writes; several are of one network and budget. A run that is in two of them counts
once, the first. One that does not depend on the noise or on K, as clean_only or oracle, stands for all of them. A
method is drawn at the levels where it has all the seeds; the table says how many it has where some are missing.
"""

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distseg.files import write_atomically
from distseg.pages.figures import line_charts, png
from distseg.study.plan import ANY

Row = dict[str, str]


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """The rows of all files, each method's run of a noise level, K and seed once."""
    rows: dict[tuple[str, ...], Row] = {}
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault(tuple(row[key] for key in ("method", "noise", "clean_count", "seed")), row)
    return list(rows.values())


def wrong_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Of each noise level, from the least: the share of pixels of the noisy masks that are wrong, a mean over runs."""
    levels = dict.fromkeys(row["noise"] for row in rows if row["noise"] != ANY)
    shares = {
        level: statistics.fmean(float(row["noise_rate"]) for row in rows if row["noise"] == level) for level in levels
    }
    return dict(sorted(shares.items(), key=lambda item: item[1]))


class Point(NamedTuple):
    """Of a method at a noise level."""

    wrong: float
    """Share of pixels."""
    mean: float
    deviation: float
    seeds: int


def curve(rows: Sequence[Row], method: str, clean_count: str, seeds: Sequence[str]) -> dict[str, Point]:
    """The method's points by level, from the least share of wrong pixels; none where it has not run."""
    own = [row for row in rows if row["method"] == method and row["clean_count"] in (clean_count, ANY)]
    points = {}
    for level, wrong in wrong_shares(rows).items():
        found = [float(row["test/dice"]) for row in own if row["noise"] in (level, ANY) and row["seed"] in seeds]
        if found:
            deviation = statistics.stdev(found) if len(found) > 1 else 0.0
            points[level] = Point(wrong, statistics.fmean(found), deviation, len(found))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--clean-count", default="50")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    rows = read_rows(arguments.runs)
    levels = wrong_shares(rows)
    curves = {
        method: curve(rows, method, arguments.clean_count, arguments.seeds)
        for method in dict.fromkeys(row["method"] for row in rows)
    }
    print("| method | " + " | ".join(f"{level}, {100 * wrong:.1f} %" for level, wrong in levels.items()) + " |")
    print("|---|" + "---:|" * len(levels))
    for method, points in curves.items():
        cells = (_cell(points.get(level), len(arguments.seeds)) for level in levels)
        print(f"| `{method}` | " + " | ".join(cells) + " |")
    if arguments.png:
        drawn: dict[str, list[tuple[float | str, float, float]]] = {
            method: [
                (100 * point.wrong, point.mean, point.deviation)
                for point in points.values()
                if point.seeds == len(arguments.seeds)
            ]
            for method, points in curves.items()
        }
        chart = line_charts({f"K = {arguments.clean_count}": drawn}, "wrong pixels, %", "test Dice")
        write_atomically(arguments.png, png(chart))


def _cell(point: Point | None, seeds: int) -> str:
    if point is None:
        return "–"
    return f"{point.mean:.3f} ± {point.deviation:.3f}" + ("" if point.seeds == seeds else f" ({point.seeds})")


if __name__ == "__main__":
    main()
