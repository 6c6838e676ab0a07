"""manifest.csv with the columns id, split, image, mask and optionally noisy_mask; paths relative to the root.

Tables as spreadsheets save them are read too: separated by commas, semicolons or tabs, with a byte order mark, with
backslashes in their paths. Other columns are ignored.
"""

import csv
import os
import stat
from pathlib import Path, PureWindowsPath

from distseg.data.layouts.listing import Listing
from distseg.data.sample import SPLITS, Problem, Sample, fault_of_id, leaves_root
from distseg.errors import UserError

_COLUMNS = ("id", "split", "image", "mask")
_FILES = ("image", "mask", "noisy_mask")
_SEPARATORS = ",;\t|"
_MOST_BYTES = 2**28


def read(root: Path) -> Listing | None:
    manifest = root / "manifest.csv"
    if not os.path.lexists(manifest):
        return None
    columns, rows = _table(manifest)
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise UserError(f"{manifest}: lacks the column {missing[0]}; the header is {','.join(_COLUMNS)}[,noisy_mask]")
    parsed = [_parse_row(root, row, f"{manifest}, row {number}") for number, row in enumerate(rows, start=1)]
    return Listing(
        [row for row in parsed if isinstance(row, Sample)],
        [row for row in parsed if isinstance(row, Problem)],
        frozenset(row["split"] for row in rows if row["split"] in SPLITS),
    )


def _table(manifest: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header's columns, and each row's cells by column."""
    text = _text(manifest)
    first, _, rest = text.partition("\n")
    if first.strip().lower().removeprefix('"').startswith("sep="):  # how Excel names its separator
        text = rest
    header = text.partition("\n")[0]
    separator = max(_SEPARATORS, key=header.count)
    try:
        lines = [line for line in csv.reader(text.splitlines(keepends=True), delimiter=separator, strict=True) if line]
    except csv.Error as error:
        raise UserError(f"{manifest}: cannot be read as CSV: {error}; save it again as CSV") from None
    columns = [cell.strip().lower() for cell in lines[0]] if lines else []
    if not lines:
        return list(_COLUMNS), []
    doubled = [column for column in columns if column in (*_COLUMNS, "noisy_mask") and columns.count(column) > 1]
    if doubled:
        raise UserError(f"{manifest}: has the column {doubled[0]} twice; keep one")
    padded = [line + [""] * (len(columns) - len(line)) for line in lines[1:] if any(cell.strip() for cell in line)]
    return columns, [dict(zip(columns, map(str.strip, line), strict=False)) for line in padded]


def _text(manifest: Path) -> str:
    try:
        status = manifest.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise UserError(
                f"{manifest}: is {what}; put the table there, or set data.layout to read the root without it"
            )
        if status.st_size > _MOST_BYTES:
            raise UserError(f"{manifest}: has {status.st_size:,} bytes, above {_MOST_BYTES:,}; is it a table?")
        content = manifest.read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest}: cannot be read as UTF-8: {error}; save it as CSV UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{manifest}: a link to a file that does not exist; mend the link or remove it") from None
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "its links lead in a circle"
        raise UserError(f"{manifest}: cannot be read: {reason}") from None


def _parse_row(root: Path, values: dict[str, str], where: str) -> Sample | Problem:
    id, split = values["id"], values["split"]
    empty = [column for column in _COLUMNS if not values[column]]
    if empty:
        return Problem(id, where, f"{empty[0]} is empty")
    if (fault := fault_of_id(id)) is not None:
        return Problem(id, where, fault)
    if split not in SPLITS:
        return Problem(id, where, f"split {split!r} must be train, val or test")
    paths = {column: values[column] for column in _FILES if values.get(column)}
    for column, path in paths.items():
        if leaves_root(path):
            return Problem(id, where, f"{column} {path!r} leaves the folder; paths are relative to it, without '..'")
        if not path.isprintable():
            return Problem(id, where, f"{column} {path!r} must be of printable letters")
    noisy = paths.get("noisy_mask")
    return Sample(
        id, split, _under(root, paths["image"]), _under(root, paths["mask"]), _under(root, noisy) if noisy else None
    )


def _under(root: Path, path: str) -> Path:
    """With backslashes as separators, unless there is a file of that very name."""
    return root / path if "\\" not in path or (root / path).exists() else root / PureWindowsPath(path).as_posix()
