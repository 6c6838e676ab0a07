"""Finished runs of any origin beside each other, in groups that differ in seed and name only."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.config.load import has_no_effect
from distseg.run_folder import RunFolder
from distseg.study.records import RunResult, read_result, read_settings

_OF_THE_RUN = ("name", "seed", "data.noise.seed")  # in a study the noise has the run's seed
"""Keys that tell the runs of one experiment apart."""


@dataclass(frozen=True)
class FinishedFolder:
    """A finished run, by its folder."""

    path: Path
    result: RunResult
    settings: dict[str, str]
    """What makes the experiment: key of the config → value as JSON; `ranks` too, as batch sizes are per rank."""


@dataclass(frozen=True)
class Group:
    """Runs of one experiment."""

    method: str
    settings: dict[str, str]
    runs: list[FinishedFolder]


def read_run(path: Path) -> FinishedFolder:
    """Read result.json and config.yaml of a folder. Raises UserError, one line that names the file and the mend."""
    run = RunFolder(path)
    result = read_result(run)
    settings = {
        key: _text(value)
        for key, value in read_settings(run).items()
        if key not in _OF_THE_RUN and not has_no_effect(key)
    }
    if result.world_size is not None:
        settings["ranks"] = str(result.world_size)
    return FinishedFolder(path, result, settings)


def group_runs(runs: Sequence[FinishedFolder]) -> list[Group]:
    """Runs whose configs and ranks are equal but for seed, name and what changes no result, in the order given."""
    groups: dict[str, Group] = {}
    for run in runs:
        key = json.dumps([run.result.method, sorted(run.settings.items())])
        groups.setdefault(key, Group(run.result.method, run.settings, [])).runs.append(run)
    return list(groups.values())


def differing_keys(groups: Sequence[Group]) -> list[str]:
    """The keys that tell groups of one method apart, in alphabetical order."""
    keys: set[str] = set()
    for method in {group.method for group in groups}:
        own = [group.settings for group in groups if group.method == method]
        every = {key for settings in own for key in settings}
        keys |= {key for key in every if len({settings.get(key) for settings in own}) > 1}
    return sorted(keys)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
