"""The metrics of a run as a file: one strict JSON object per line, readable while the run goes on and after a kill."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.errors import StorageError, UserError
from distseg.files import open_regular, write_atomically


class JsonlLog:
    """Append `{"step": …, name: value, …}` lines to `path`, each written at once.

    Lines that an earlier run wrote at `from_step` or later are dropped first, and so is a last line that a kill tore: a
    run resumed at a checkpoint writes them again. `from_step=0` starts the file afresh. Raises UserError for a file
    that is not such a log, StorageError where it cannot be written.
    """

    def __init__(self, path: Path, from_step: int = 0):
        kept = [record for record in read(path) if record["step"] < from_step] if path.exists() else []
        write_atomically(path, "".join(_line(record) for record in kept))
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[bytes] = []

    def log_metrics(self, metrics: Mapping[str, float | int | str | None], step: int) -> None:
        """Write one line. NaN and infinities become null, which is what strict JSON has for them.

        Raises StorageError where it cannot be written, for instance on a full disk. The file then still ends with a
        whole line, and the next call tries this one again.
        """
        self._waiting.append(_line({"step": step, **metrics}).encode())
        self._write()

    def close(self) -> None:
        """Raises StorageError where lines are still not written."""
        try:
            if self._waiting:
                self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        content, end = b"".join(self._waiting), self._file.seek(0, 2)
        try:
            written = 0
            while written < len(content):
                written += self._file.write(content[written:]) or 0
        except OSError as error:
            self._file.truncate(end)
            raise StorageError.of(self._path, error) from error
        self._waiting.clear()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in file order, without a last line that was torn by a kill.

    Raises UserError, naming file and line, where a line is not a JSON object with a step, and for what is no file.
    """
    try:
        with open_regular(path) as file:
            *lines, _torn = file.read().split(b"\n")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); put a file in its place, or remove it"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{path}: line {number} is not a JSON object with a step; remove that line")
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
