"""manifest.csv as it is written; layouts/manifest.py reads it."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from distseg.data.sample import Sample
from distseg.files import write_atomically


def write_manifest(root: Path, samples: Sequence[Sample]) -> None:
    """Write ROOT/manifest.csv, aside and renamed."""
    write_atomically(root / "manifest.csv", manifest_text(root, samples))


def manifest_text(root: Path, samples: Sequence[Sample]) -> str:
    """`id,split,image`, and what there is of `reference`, `annotation`, `annotation:NAME`, `group` and `picked`.

    Files lie below the root. An empty split is one that is to be drawn.
    """
    roles = {key for sample in samples for key in sample.files if key != "image"}
    columns = [*sorted(roles & {"reference"}), *sorted(roles - {"reference"})]
    more = {"group": lambda sample: sample.group, "picked": lambda sample: "1" if sample.picked else ""}
    shown = {name: cell for name, cell in more.items() if any(map(cell, samples))}
    table = io.StringIO(newline="")
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["id", "split", "image", *columns, *shown])
    for sample in samples:
        paths = {key: path.relative_to(root).as_posix() for key, path in sample.files.items()}
        cells = [paths.get(column, "") for column in ("image", *columns)]
        rows.writerow([sample.id, sample.split, *cells, *(cell(sample) for cell in shown.values())])
    return table.getvalue()
