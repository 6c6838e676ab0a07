"""The metrics of a run as a file: one strict JSON object per line, readable while the run goes on and after a kill."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distseg.errors import UserError


class JsonlLog:
    """Append `{"step": …, name: value, …}` lines to `path`, each flushed as it is written.

    Lines that an earlier run wrote at `from_step` or later are dropped first, and so is a last line that a kill tore: a
    run resumed at a checkpoint writes them again. `from_step=0` starts the file afresh. Raises UserError for a file
    that is not such a log.
    """

    def __init__(self, path: Path, from_step: int = 0):
        if path.exists():
            kept = [record for record in read(path) if record["step"] < from_step]
            aside = path.with_name(path.name + ".tmp")
            aside.write_text("".join(_line(record) for record in kept))
            aside.replace(path)
        self._file = path.open("a")

    def log_metrics(self, metrics: Mapping[str, float | int | str | None], step: int) -> None:
        """Write one line. NaN and infinities become null, which is what strict JSON has for them."""
        self._file.write(_line({"step": step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in file order, without a last line that was torn by a kill.

    Raises UserError, naming file and line, where a line is not a JSON object with a step.
    """
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}: line {number} is not a JSON object with a step; remove that line")
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"
