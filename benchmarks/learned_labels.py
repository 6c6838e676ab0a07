"""How wrong the labels were that the runs of a study learned from, beside the drawn ones, once correction set in.

    python benchmarks/learned_labels.py STUDY [--csv FILE]

STUDY is a folder of runs whose truth is known and kept back. A logged step tells of its batch, and counts where the
number of wrong labels is not that of the drawn ones: `worst` is the largest ratio of the two, and `above` how many of
these steps are above 1.02.
"""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distseg.files import write_atomically

DRAWN, LEARNED = "meta/noise_rate", "meta/corrected_noise_rate"
BOUND = 1.02


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of the lines of metrics.jsonl; None for a run that corrects no labels or whose truth is not known."""
    known = [(row["step"], row[DRAWN], row[LEARNED]) for row in rows if LEARNED in row]
    if not known:
        return None
    corrected = [each for each in known if each[1] != each[2]]
    if not corrected:
        return {"corrects_from": None, "steps": 0}
    ratios = [learned / drawn if drawn else float("inf") for _, drawn, learned in corrected]
    return {
        "corrects_from": corrected[0][0],
        "steps": len(corrected),
        "drawn": sum(each[1] for each in corrected) / len(corrected),
        "learned": sum(each[2] for each in corrected) / len(corrected),
        "worst": max(ratios),
        "worst_at": corrected[ratios.index(max(ratios))][0],
        "above": sum(ratio > BOUND for ratio in ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--csv", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    out = io.StringIO(newline="")
    names = ("run", "corrects_from", "steps", "drawn", "learned", "worst", "worst_at", "above")
    table = csv.DictWriter(out, names, restval="", lineterminator="\n")
    table.writeheader()
    for path in sorted(arguments.study.glob("*/metrics.jsonl")):
        found = figures([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        if found:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}
            table.writerow({"run": path.parent.name} | rounded)
    print(out.getvalue(), end="")
    if arguments.csv:
        write_atomically(arguments.csv, out.getvalue())


if __name__ == "__main__":
    main()
