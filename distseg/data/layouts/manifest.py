"""manifest.csv: a row an image, or a row an annotation; paths relative to the root.

Columns: id, image, and of split, reference (the expert's mask), annotation (a cheap one), annotation:NAME (that of an
annotator of this name), annotator (whose `annotation` is in this row), group and picked (1 where the reference was
drawn because of what the image or its mask looked like) those that there are. `mask` and `noisy_mask` are read as
reference and annotation; beside `annotator`, `mask` is the annotation. Rows of one id are one sample if they agree on
all but their annotations, and name different annotators. Other columns are ignored.

Tables as spreadsheets save them are read too: separated by commas, semicolons or tabs, with a byte order mark, with
backslashes in their paths.
"""

import csv
import io
import os
import stat
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

from distseg.data.layouts.listing import Listing
from distseg.data.sample import SPLITS, Annotation, Problem, Sample, fault_of_id, leaves_root
from distseg.errors import UserError

HEADER = "id,split,image,reference,annotation[,annotation:NAME …][,group][,picked]"
_NAMED = "annotation:"
_OLD_NAMES = {"mask": "reference", "noisy_mask": "annotation"}
_KNOWN = ("id", "split", "image", "reference", "annotation", "annotator", "group", "picked")
_SEPARATORS = ",;\t|"
_MOST_BYTES = 2**28


def read(root: Path) -> Listing | None:
    manifest = root / "manifest.csv"
    if not os.path.lexists(manifest):
        return None
    columns, rows = _table(manifest)
    missing = [column for column in ("id", "image") if column not in columns]
    if not any(column in ("reference", "annotation") or column.startswith(_NAMED) for column in columns):
        missing.append("reference")
    if missing:
        raise UserError(f"{manifest}: lacks the column {missing[0]}; the header is {HEADER}")
    parsed = [_parse_row(root, row, f"{manifest}, row {number}") for number, row in enumerate(rows, start=1)]
    return Listing(
        _merged([row for row in parsed if isinstance(row, Sample)]),
        [row for row in parsed if isinstance(row, Problem)],
        frozenset(row["split"] for row in rows if row.get("split") in SPLITS),
    )


def read_images(table: Path) -> Listing:
    """The images of a table with the columns id and image, which need no masks; paths are relative to its folder."""
    columns, rows = _table(table)
    if missing := [column for column in ("id", "image") if column not in columns]:
        raise UserError(f"{table}: lacks the column {missing[0]}; the header is id,image")
    samples, problems = [], []
    for number, row in enumerate(rows, start=1):
        id, paths = unicodedata.normalize("NFC", row["id"]), {"image": row.get("image", "")}
        fault = f"{'image' if id else 'id'} is empty" if not id or not paths["image"] else None
        fault = fault or fault_of_id(id) or _fault_of_paths(paths)
        if fault is None:
            samples.append(Sample(id, row.get("split", ""), _under(table.parent, paths["image"])))
        else:
            problems.append(Problem(id, f"{table}, row {number}", fault))
    return Listing(samples, problems, frozenset())


def with_references(
    root: Path, new: Mapping[str, str], former: Mapping[str, str], annotator: str, picked: Collection[str] = ()
) -> str:
    """The text of manifest.csv with other references, and the former ones as annotations by `annotator`.

    `new` and `former` are paths relative to the root, by id, and `picked` the ids whose rows are to say so. All other
    cells, rows and columns stay as they are. Where an image has an annotation of this name already, the name gets a
    number.
    """
    header, columns, lines, separator = _lines(root / "manifest.csv")
    header, columns = [*header], [*columns]
    rows = [dict(enumerate([*line, *[""] * (len(header) - len(line))])) for line in lines]

    def place(name: str) -> int:
        if name not in columns:
            header.append(name)
            columns.append(name)
        return columns.index(name)

    ids = [unicodedata.normalize("NFC", row[columns.index("id")].strip()) for row in rows]
    reference = place("reference") if new else 0
    named = {id: _free_column(annotator, columns, [row for row, own in zip(rows, ids, strict=True) if own == id])
             for id in former}  # fmt: skip
    for row, id in zip(rows, ids, strict=True):
        if id in new:
            row[reference] = new[id]
        if id in picked:
            row[place("picked")] = "1"
        if id in named:  # in its first row alone
            row[place(named.pop(id))] = former[id]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([row.get(cell, "") for cell in range(max(len(header), len(row)))] for row in rows)
    return text.getvalue()


def _free_column(annotator: str, columns: Sequence[str], rows: Sequence[Mapping[int, str]]) -> str:
    """annotation:NAME, of a name that none of an image's rows has a mask by."""
    by = columns.index("annotator") if "annotator" in columns else None
    number = 1
    while True:
        name = annotator if number == 1 else f"{annotator}-{number}"
        column = f"{_NAMED}{name}"
        filled = column in columns and any(row.get(columns.index(column), "").strip() for row in rows)
        if not filled and not (by is not None and any(row[by].strip() == name for row in rows)):
            return column
        number += 1


def _table(manifest: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header's columns, and each row's cells by column."""
    _, columns, lines, _ = _lines(manifest)
    padded = [line + [""] * (len(columns) - len(line)) for line in lines]
    return columns, [dict(zip(columns, map(str.strip, line), strict=False)) for line in padded]


def _lines(manifest: Path) -> tuple[list[str], list[str], list[list[str]], str]:
    """The header as it is written, its columns by name, the other lines that are not empty, and the separator."""
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
    if not lines:
        return ["id", "image", "reference"], ["id", "image", "reference"], [], separator
    columns = [_column(cell) for cell in lines[0]]
    if "annotator" in columns and "annotation" not in columns:  # a row an annotation, its file under `mask`
        columns = ["annotation" if column == "reference" else column for column in columns]
    doubled = [column for column in columns if _is_known(column) and columns.count(column) > 1]
    if doubled:
        raise UserError(f"{manifest}: has the column {doubled[0]} twice; keep one")
    return lines[0], columns, [line for line in lines[1:] if any(cell.strip() for cell in line)], separator


def _column(cell: str) -> str:
    """A column's name, without regard to case but for the names of annotators."""
    kind, colon, annotator = cell.strip().partition(":")
    name = kind.strip().lower()
    return f"{name}:{annotator.strip()}" if colon else _OLD_NAMES.get(name, name)


def _is_known(column: str) -> bool:
    return column in _KNOWN or column.startswith(_NAMED)


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
        return _decoded(manifest.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest}: cannot be read as text: {error}; save it as CSV UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{manifest}: a link to a file that does not exist; mend the link or remove it") from None
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "its links lead in a circle"
        raise UserError(f"{manifest}: cannot be read: {reason}") from None


def _decoded(content: bytes) -> str:
    """Unicode, or else the code page that Windows gives to tables of Western languages. UnicodeDecodeError for others.

    A table of yet another code page names files that are not there, which is told when they are looked for.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in content:
            raise
        return content.decode("cp1252")


def _parse_row(root: Path, values: dict[str, str], where: str) -> Sample | Problem:
    id, split = unicodedata.normalize("NFC", values["id"]), values.get("split") or "train"
    paths = {column: path for column, path in values.items() if path and _is_file(column)}
    fault = _fault(id, split, paths, values)
    if fault is not None:
        return Problem(id, where, fault)
    files = {column: _under(root, path) for column, path in paths.items()}
    image, reference = files.pop("image"), files.pop("reference", None)
    named = {column: column.removeprefix(_NAMED) for column in files} | {"annotation": values.get("annotator", "")}
    annotations = sorted((Annotation(named[column], path) for column, path in files.items()), key=lambda a: a.annotator)
    picked = values.get("picked", "") == "1" and reference is not None
    return Sample(id, split, image, reference, tuple(annotations), values.get("group", ""), picked)


def _is_file(column: str) -> bool:
    return column in ("image", "reference", "annotation") or column.startswith(_NAMED)


def _fault(id: str, split: str, paths: dict[str, str], values: dict[str, str]) -> str | None:
    """What is wrong with a row, or None."""
    if not id or "image" not in paths:
        return f"{'image' if id else 'id'} is empty"
    if (fault := fault_of_id(id)) is not None:
        return fault
    if split not in SPLITS:
        return f"split {split!r} must be train, val or test"
    if values.get("picked", "") not in ("", "0", "1"):
        return f"picked {values['picked']!r} must be 1, 0 or empty"
    if len(paths) == 1:
        return "has neither a reference nor an annotation"
    names = [column.removeprefix(_NAMED) for column in paths if column.startswith(_NAMED)]
    names += [values["annotator"]] if "annotation" in paths and values.get("annotator") else []
    for name in names:
        if (fault := fault_of_id(name)) is not None:
            return fault.replace("id", "annotator", 1)
        if names.count(name) > 1:
            return f"annotator {name} is there twice; keep one"
    return _fault_of_paths(paths)


def _fault_of_paths(paths: dict[str, str]) -> str | None:
    for column, path in paths.items():
        if leaves_root(path):
            return f"{column} {path!r} leaves the folder; paths are relative to it, without '..'"
        if not path.isprintable():
            return f"{column} {path!r} must be of printable letters"
    return None


def _merged(rows: Sequence[Sample]) -> list[Sample]:
    """Rows that are alike but for their annotators are one sample; others of one id stay, and are refused later."""
    by_id: dict[str, list[Sample]] = {}
    for row in rows:
        by_id.setdefault(row.id, []).append(row)
    samples = []
    for same in by_id.values():
        annotations = sorted((each for row in same for each in row.annotations), key=lambda each: each.annotator)
        names = [each.annotator for each in annotations]
        alike = len({replace(row, annotations=()) for row in same}) == 1 and all(row.annotations for row in same)
        if alike and "" not in names and len(set(names)) == len(names):
            samples.append(replace(same[0], annotations=tuple(annotations)))
        else:
            samples += same
    return samples


def _under(root: Path, path: str) -> Path:
    """With backslashes as separators, and accents as the file system has them, unless there is a file of that name."""
    if (path.isascii() and "\\" not in path) or (root / path).exists():
        return root / path
    posix = PureWindowsPath(path).as_posix()
    forms = (unicodedata.normalize(form, posix) for form in ("NFC", "NFD"))
    return next((root / form for form in forms if (root / form).exists()), root / posix)
