"""The files that a run leaves, checked as they are read: they may come from another machine, or another person."""

import math
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distseg.config.load import first_problem
from distseg.errors import UserError
from distseg.run_folder import RunFolder

_LARGEST_LOG = 2**30
"""Bytes. A metrics.jsonl of a million lines has about 300 MB."""
_LARGEST_FILE = 2**20
"""Bytes of a config.yaml or result.json, which have a few thousand."""

Score = Annotated[float, Field(strict=True, ge=0, le=1)]


class _Record(BaseModel):
    """Foreign files may hold more keys; those that are named here are checked."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def numbers(self) -> dict[str, float]:
        """Every finite number by its key in the file."""
        values = self.model_dump(by_alias=True)
        return {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        }


class RunResult(_Record):
    """result.json."""

    method: Annotated[str, Field(max_length=200)]
    dice: Annotated[Score | None, Field(alias="test/dice")] = None
    dice_low: Annotated[Score | None, Field(alias="test/dice_low")] = None
    dice_high: Annotated[Score | None, Field(alias="test/dice_high")] = None
    jaccard: Annotated[Score | None, Field(alias="test/jaccard")] = None
    sensitivity: Annotated[Score | None, Field(alias="test/sensitivity")] = None
    specificity: Annotated[Score | None, Field(alias="test/specificity")] = None
    noise_rate: Score | None = None
    steps: Annotated[int | None, Field(strict=True, ge=0, lt=2**63)] = None
    seconds: Annotated[float | None, Field(strict=True, ge=0)] = None
    world_size: Annotated[int | None, Field(strict=True, ge=1, lt=2**31)] = None


class HistoryRecord(_Record):
    """A line of metrics.jsonl."""

    step: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
    validation_dice: Annotated[Score | None, Field(alias="val/dice")] = None


def read_result(run: RunFolder) -> RunResult:
    """The result of a finished run. Raises UserError, one line that names the file, for anything else."""
    try:
        return RunResult.model_validate_json(_read(run.result, _LARGEST_FILE))
    except FileNotFoundError:
        raise UserError(f"{run.path}: has no result.json; give folders of finished runs") from None
    except ValidationError as error:
        raise UserError(f"{run.result}: {first_problem(error, RunResult)}; is this a run's folder?") from None


def read_history(path: Path) -> list[HistoryRecord]:
    """The records of a metrics.jsonl, without a last line that was cut off by a kill.

    Raises UserError, naming file and line, where a line is not a JSON object with a step.
    """
    try:
        *lines, _torn = _read(path, _LARGEST_LOG).split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give folders that hold a run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(HistoryRecord.model_validate_json(line))
        except ValidationError as error:
            problem = first_problem(error, HistoryRecord)
            raise UserError(f"{path}: line {number}: {problem}; remove that line") from None
    return records


def read_settings(run: RunFolder) -> dict[str, Any]:
    """The leaves of a run's config.yaml under dotted names, whatever version of distseg has written it."""
    try:
        text = _read(run.config, _LARGEST_FILE).decode()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # they can stand for 2^n leaves
            raise UserError(f"{run.config}: has YAML aliases, which no run writes; give folders that hold a run")
        written = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{run.path}: has no config.yaml; give folders that hold a run") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{run.config}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(written, dict):
        raise UserError(f"{run.config}: must be a mapping of sections; give folders that hold a run")
    try:
        return _leaves(written, "")
    except RecursionError:
        raise UserError(f"{run.config}: is nested too deeply; give folders that hold a run") from None


def _leaves(node: dict[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, largest: int) -> bytes:
    """A regular file of at most `largest` bytes; FileNotFoundError where there is none."""
    try:
        if not path.exists():
            raise FileNotFoundError(path)
        if not path.is_file():
            raise UserError(f"{path}: is no regular file; give folders that hold a run")
        if path.stat().st_size > largest:
            raise UserError(f"{path}: has more than {largest >> 20} MiB; give folders that hold a run")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
