"""manifest.csv with the columns id, split, image, mask and optionally noisy_mask; paths relative to the root."""

import csv
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from distseg.data.layouts.listing import Listing
from distseg.data.sample import SPLITS, Problem, Sample
from distseg.errors import UserError

_COLUMNS = ("id", "split", "image", "mask")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")  # an id names files that are written, so it must not hold a path


def read(root: Path) -> Listing | None:
    manifest = root / "manifest.csv"
    if not manifest.is_file():
        return None
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
            columns = rows[0].keys() if rows else _COLUMNS
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest}: cannot be read as UTF-8 CSV: {error}") from None
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise UserError(f"{manifest}: lacks the column {missing[0]}; the header is {','.join(_COLUMNS)}[,noisy_mask]")
    parsed = [_parse_row(root, row, f"{manifest}, row {number}") for number, row in enumerate(rows, start=1)]
    return Listing(
        [row for row in parsed if isinstance(row, Sample)],
        [row for row in parsed if isinstance(row, Problem)],
        frozenset(row["split"] for row in rows if row["split"] in SPLITS),
    )


def _parse_row(root: Path, row: dict[str, str | None], where: str) -> Sample | Problem:
    values = {column: (row.get(column) or "").strip() for column in (*_COLUMNS, "noisy_mask")}
    empty = [column for column in _COLUMNS if not values[column]]
    if empty:
        return Problem(values["id"], where, f"{empty[0]} is empty")
    if not _ID.fullmatch(values["id"]):
        return Problem(values["id"], where, f"id {values['id']!r} must be letters, digits, '.', '_', '-' and blanks")
    if values["split"] not in SPLITS:
        return Problem(values["id"], where, f"split {values['split']!r} must be train, val or test")
    paths = {column: values[column] for column in ("image", "mask", "noisy_mask") if values[column]}
    for column, path in paths.items():
        if _leaves_root(path):
            reason = f"{column} {path!r} leaves the folder; paths are relative to it, without '..'"
            return Problem(values["id"], where, reason)
    return Sample(values["id"], values["split"], **{column: root / path for column, path in paths.items()})


def _leaves_root(path: str) -> bool:
    return any(".." in kind(path).parts or kind(path).anchor for kind in (PurePosixPath, PureWindowsPath))
