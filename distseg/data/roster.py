"""The samples that a run began with, by content: it goes on with these or not at all."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from distseg.data.sample import Kind, Sample
from distseg.errors import UserError
from distseg.files import write_atomically

Digests = dict[str, dict[Kind, str]]
"""The SHA-256 of each sample's files, by id."""
_KINDS: tuple[Kind, ...] = ("image", "mask", "noisy_mask")
_COLUMNS = ("id", "split", *_KINDS)


def keep_roster(samples: Sequence[Sample], digests: Digests, record: Path, begun: bool) -> None:
    """Write the samples to `record`, or where the run has begun hold them against it. Paths do not count.

    Raises UserError that names the first sample that is new, gone, in another split or of another content.
    """
    rows = [
        {"id": sample.id, "split": sample.split, **{kind: digests[sample.id].get(kind, "") for kind in _KINDS}}
        for sample in samples
    ]
    if begun and record.exists():
        changes = _changes(_read(record), {row["id"]: row for row in rows})
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UserError(
                f"{record}: the data is not what this run began with: {changes[0]}{more}; put it back as it was, or "
                "start a new run with another name="
            )
        return
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, table.getvalue())


def _read(record: Path) -> dict[str, dict[str, str]]:
    try:
        with record.open(newline="", encoding="utf-8") as file:
            return {row["id"]: {column: row[column] for column in _COLUMNS} for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(f"{record}: is damaged; put it back, or start a new run with another name=") from None


def _changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    changes = []
    for id in sorted(before.keys() | now.keys()):
        if id not in before or id not in now:
            changes.append(f"{id} is {'new' if id in now else 'gone'}")
        elif before[id]["split"] != now[id]["split"]:
            changes.append(f"{id} was in {before[id]['split']} and is in {now[id]['split']}")
        else:
            changes += [f"the {kind} of {id} has changed" for kind in _KINDS if before[id][kind] != now[id][kind]]
    return changes
