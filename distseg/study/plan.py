"""The plan of a study: methods × noise levels × clean counts × grids × seeds over one base config.

The files of `configs/experiments/` are of this kind. A grid is a list of values for a key of the config:

    methods:
      finetune: []                                    # section.key=value of this method
      pixel_reweight:
        settings: [method.clean_phase=0.3]
        grid: {optim.lr: [8e-3, 1.6e-2, 3.2e-2]}      # in place of the study's values for this key
    grid:
      optim.lr: [2e-3, 4e-3, 8e-3]
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from distseg.config.load import canonical_key, config_hash, first_problem, load_config
from distseg.config.schema import Config
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.none import NoNoise
from distseg.errors import UserError
from distseg.section import Count, Section

ANY = "any"
"""The noise level or clean count of a run that does not depend on it, and stands for all of them."""

_AXES = {
    "name": "name",
    "seed": "seeds",
    "data.noise.seed": "seeds",  # every seed draws the masks anew
    "data.noise": "noise",
    "data.clean_count": "clean_counts",
}
"""Keys of the config that a study sets itself, and where its file has their values."""

_LONGEST_NAME = 100
_LONGEST_LEVEL = 500

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=_LONGEST_NAME)]
Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=64)]
Level = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=_LONGEST_LEVEL)]
"""A noise level; that of mixed noise names every annotator."""
GridValue = str | int | float | bool
Grid = dict[str, Annotated[tuple[GridValue, ...], Field(min_length=1)]]


def _grid_is_of_keys(grid: Grid) -> Grid:
    for key, values in grid.items():
        if axis := _axis_of(key):
            raise ValueError(
                f"{key}: cannot be in a grid, it is an axis already; write its values as {axis} of the study"
            )
        if key.partition(".")[0] == "tracking":
            raise ValueError(f"{key}: cannot be in a grid, it changes no result")
        if not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key):
            raise ValueError(f"{key}: is no key of the config; write section.key, for instance optim.lr")
        for text in (key, *map(_text, values)):
            if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,64}", text):
                raise ValueError(f"{key}: keys and values must have 1 to 64 printable characters, got {text[:80]!r}")
        # Tables and reports tell values apart by their texts, a config by their values: 1, 1.0 and true are equal.
        if min(len(set(map(_text, values))), len(set(values))) < len(values):
            raise ValueError(f"{key}: one of the values is there twice")
    return grid


class StudyMethod(Section):
    """A method of the study; a list in its place holds the settings alone."""

    settings: tuple[str, ...] = ()
    """`section.key=value`, for instance the method's own learning rate."""
    grid: Grid = Field(default_factory=dict)
    """Values of keys, tried in every combination; in place of the study's grid for the same keys."""

    _keys = field_validator("grid")(_grid_is_of_keys)

    @model_validator(mode="before")
    @classmethod
    def _list_of_settings(cls, value: Any) -> Any:
        return {"settings": value} if isinstance(value, list | tuple) else value


class StudyConfig(Section):
    name: Name
    base: Path
    """The config that every run starts from, relative to this file."""
    settings: tuple[str, ...] = ()
    """`section.key=value` for every run."""
    methods: Annotated[dict[Label, StudyMethod], Field(min_length=1)]
    """What is compared. The label is the method's name, or that of a variant which sets method.name itself."""
    champion: str | None = None
    """The method that the report compares with each other one."""
    noise: Annotated[tuple[NoiseConfig, ...], Field(min_length=1)]
    """The noise levels. The masks are drawn anew for every seed."""
    clean_counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    grid: Grid = Field(default_factory=dict)
    """Values of keys, tried in every combination by every method."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]
    ranks: Count = 1
    """Processes of each run."""

    _keys = field_validator("grid")(_grid_is_of_keys)

    @field_validator("noise", "clean_counts", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({repr(value) for value in values}) < len(values):
            raise ValueError("one of them is there twice")
        return values

    @field_validator("noise")
    @classmethod
    def _levels_can_be_told_apart(cls, noise: tuple[NoiseConfig, ...]) -> tuple[NoiseConfig, ...]:
        if seeded := next((item for item in noise if item.seed), None):
            raise ValueError(f"{seeded.level[:80]}: seed {seeded.seed}: each of seeds draws the masks; remove it")
        levels = [item.level for item in noise]
        if repeated := next((level for level in levels if levels.count(level) > 1), None):
            raise ValueError(f"{repeated[:80]} is there twice")
        if longest := next((level for level in levels if len(level) > _LONGEST_LEVEL), None):
            raise ValueError(f"{longest[:80]}… has more than {_LONGEST_LEVEL} characters; use fewer annotators")
        return noise

    @model_validator(mode="after")
    def _champion_takes_part(self) -> Self:
        if self.champion is not None and self.champion not in self.methods:
            raise ValueError(f"champion {self.champion}: is none of methods ({', '.join(self.methods)})")
        return self

    def points(self, method: str) -> Iterator[dict[str, GridValue]]:
        """The points of the grid that a method is tried at: one value for each key; a single empty one without grid."""
        grid = self.grid | self.methods[method].grid
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    method: str
    noise: str
    """The level as papers write it, or `any`."""
    clean_count: int | str
    """K, or `any`."""
    seed: int
    config: Config
    grid: Mapping[str, str] = field(default_factory=dict)
    """The run's point of the grid: key → value as text."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tags(self) -> dict[str, str]:
        """What the run is called in the tracker's columns."""
        place = {"method": self.method, "noise": self.noise, "clean_count": str(self.clean_count)}
        return place | dict(self.grid) | {"seed": str(self.seed)}


class PlannedRun(Section):
    """A run as plan.json names it: its place in the study."""

    name: Name
    method: Label
    noise: Level
    clean_count: Annotated[str, Field(pattern=r"^([1-9][0-9]{0,17}|any)$")]
    grid: dict[Label, Label] = Field(default_factory=dict)
    seed: Annotated[str, Field(pattern=r"^[0-9]{1,19}$")]


class Plan(Section):
    """plan.json: what a study consists of, as a report needs it. It may come from anybody's tracking server."""

    name: Name
    methods: Annotated[tuple[Label, ...], Field(min_length=1, max_length=1000)]
    champion: Label | None = None
    noise: Annotated[tuple[Level, ...], Field(min_length=1, max_length=100)]
    clean_counts: Annotated[tuple[Count, ...], Field(min_length=1, max_length=100)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]
    runs: Annotated[tuple[PlannedRun, ...], Field(validation_alias=AliasChoices("runs", "children"))]
    """`children` in studies of distseg 0.1.0."""

    @property
    def grid_keys(self) -> tuple[str, ...]:
        """The keys of all grids, in the order of the runs."""
        return tuple(dict.fromkeys(key for run in self.runs for key in run.grid))


def load_study(path: Path, overrides: list[str] | None = None) -> tuple[StudyConfig, list[StudyRun]]:
    """The study of `path` and its runs, in the order in which they are made; `overrides` act on every run.

    Seeds come first and methods last, so that a study that is cut off has whole comparisons. A method that looks at no
    noisy mask runs once for all noise levels, and one without a clean stream once for all clean counts: its noisy
    stream lacks the images of the smallest K. Raises UserError, one line, for what is wrong.
    """
    study = _read(path)
    configs = [
        (label, point, _config_of(path, study, overrides or [], label, point))
        for label in study.methods
        for point in study.points(label)
    ]
    runs: dict[str, StudyRun] = {}
    for seed in study.seeds:
        for noise in study.noise:
            for clean_count in study.clean_counts:
                for label, point, config in configs:
                    run = _run(label, point, config, noise, clean_count, min(study.clean_counts), seed)
                    runs.setdefault(run.name, run)
    return study, list(runs.values())


def plan_json(study: StudyConfig, runs: list[StudyRun]) -> str:
    """The text of plan.json; `parse_plan` reads it back."""
    rows = [
        PlannedRun(
            name=run.name,
            method=run.method,
            noise=run.noise,
            clean_count=str(run.clean_count),
            grid=dict(run.grid),
            seed=str(run.seed),
        )
        for run in runs
    ]
    plan = {
        "name": study.name,
        "methods": list(study.methods),
        "champion": study.champion,
        "noise": [noise.level for noise in study.noise],
        "clean_counts": list(study.clean_counts),
        "seeds": list(study.seeds),
        "runs": [row.model_dump() for row in rows],
    }
    return json.dumps(plan, indent=2) + "\n"


def parse_plan(text: str, source: str) -> Plan:
    """Check the text of a plan.json that comes from `source`. Raises UserError, one line that names the key."""
    mend = "run launch/sweep.py on its study file again, which writes it anew"
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"plan.json of {source}: {first_problem(error, Plan)}; {mend}") from None


def _axis_of(key: str) -> str | None:
    """Where the study file has the values of `key` of the config; None if the study does not set it itself."""
    return next((axis for name, axis in _AXES.items() if key == name or key.startswith(f"{name}.")), None)


def _read(path: Path) -> StudyConfig:
    try:
        return StudyConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except FileNotFoundError:
        raise UserError(f"study {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"study {path}: cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"study {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"study {path}: {first_problem(error, StudyConfig)}") from None


def _config_of(
    path: Path, study: StudyConfig, overrides: list[str], label: str, point: Mapping[str, GridValue]
) -> Config:
    """What the runs of one method at one point of its grid share."""
    own = study.methods[label].settings
    for source, items in (("", overrides), ("settings: ", study.settings), (f"methods.{label}: ", own)):
        for item in items:
            key = item.partition("=")[0]
            if axis := _axis_of(key):
                mend = f"remove it, and set {axis} in the study file"
                what = "the study names its runs" if axis == "name" else "is an axis of the study"
                raise UserError(f"study {path}: {source}{item}: {what}; {mend}")
            if canonical_key(key) in map(canonical_key, point) and items is not study.settings:
                raise UserError(f"study {path}: {source}{item}: the grid varies {key}; remove one of the two")
    # JSON's scalars are YAML's, and a text in quotes stays a text.
    chosen = [f"{key}={json.dumps(value)}" for key, value in point.items()]
    settings = [*study.settings, *study.methods[label].settings, *chosen, *overrides]
    if not any(item.startswith("method.name=") for item in settings):
        settings.append(f"method.name={label}")
    try:
        return load_config(path.parent / study.base, [*settings, "name=run"])
    except UserError as error:
        raise UserError(f"study {path}: methods.{label}: {error}") from None


def _run(
    label: str,
    point: Mapping[str, GridValue],
    config: Config,
    noise: NoiseConfig,
    clean_count: int,
    fewest: int,
    seed: int,
) -> StudyRun:
    method = config.method
    level = noise if method.needs_noisy else NoNoise()
    count = clean_count if method.needs_clean else fewest
    data = config.data.model_copy(
        update={"noise": level.model_copy(update={"seed": seed if method.needs_noisy else 0}), "clean_count": count}
    )
    config = config.model_copy(update={"data": data, "seed": seed})
    noise_name = level.level if method.needs_noisy else ANY
    count_name = count if method.needs_clean else ANY
    grid = {key: _text(value) for key, value in point.items()}
    variant = "-".join([label, *(f"{key.rpartition('.')[2]}{value}" for key, value in grid.items())])
    readable = f"{variant}-{noise_name}-k{count_name}-s{seed}".replace(", ", "_").replace(")", "")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", readable).lstrip("._-")
    ending = f"-{config_hash(config)}"
    name = safe[: _LONGEST_NAME - len(ending)] + ending
    try:
        config = Config.model_validate(config.model_dump() | {"name": name})
    except ValidationError as error:
        raise UserError(f"run {name}: {first_problem(error)}") from None
    return StudyRun(label, noise_name, count_name, seed, config, grid)


def _text(value: GridValue) -> str:
    """A value of a grid as names and tables have it; different values have different texts."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
