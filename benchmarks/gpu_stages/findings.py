"""What a stage is told, and where it writes what it finds."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine


@dataclass(frozen=True)
class Setting:
    device: str
    """cuda or cpu."""
    tiny: bool
    """Whether sizes are those of a rehearsal."""


class Findings:
    """Tables of rows, on the disk after every row: a stage that is cut off leaves what it had."""

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        machine = describe_machine(device) | {"triton": version("triton"), "CUDA": torch.version.cuda or "none"}
        self._content: dict[str, Any] = {"machine": machine, "tables": {}}

    def add(self, table: str, row: dict[str, Any]) -> None:
        """One more row of a table; its values are numbers or short texts by column."""
        self._content["tables"].setdefault(table, []).append(row)
        aside = self._path.with_suffix(".part")
        aside.write_text(json.dumps(self._content, indent=2) + "\n")
        aside.replace(self._path)
        print(table, row, flush=True)
