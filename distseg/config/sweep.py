"""A study as a grid: methods × noise levels × clean counts × seeds over one base config (`configs/experiments/`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from distseg.config.load import config_hash, first_problem, load_config
from distseg.config.schema import Config
from distseg.data.noise.config import NoiseConfig
from distseg.data.noise.none import NoNoise
from distseg.errors import UserError
from distseg.methods.config import MethodConfig
from distseg.section import Count, Section

ANY = "any"
"""The noise level or clean count of a child that does not depend on it, and stands for all of them."""


class SweepConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: Path
    """The config that every child starts from, relative to this file."""
    settings: tuple[str, ...] = ()
    """`section.key=value` for every child."""
    methods: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    """What is compared, and `section.key=value` of each, for instance its own learning rate. The label is the method's
    name, or that of a variant which sets method.name itself."""
    champion: str | None = None
    """The method that the report holds against each other one."""
    noise: Annotated[tuple[NoiseConfig, ...], Field(min_length=1)]
    """The noise levels. The masks are drawn anew for every seed."""
    clean_counts: Annotated[tuple[Count, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    ranks: Count = 1
    """Processes of each child."""

    @field_validator("noise", "clean_counts", "seeds")
    @classmethod
    def _each_once(cls, values: tuple) -> tuple:
        if len({repr(value) for value in values}) < len(values):
            raise ValueError("one of them is there twice")
        return values

    @model_validator(mode="after")
    def _champion_takes_part(self) -> Self:
        if self.champion is not None and self.champion not in self.methods:
            raise ValueError(f"champion {self.champion}: is none of methods ({', '.join(self.methods)})")
        return self


@dataclass(frozen=True)
class Child:
    """One run of a study."""

    method: str
    noise: str
    """The level as papers write it, or `any`."""
    clean_count: int | str
    """K, or `any`."""
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tags(self) -> dict[str, str]:
        """What the run is called in the tracker's columns, and how a report finds its place."""
        return {
            "method": self.method,
            "noise": self.noise,
            "clean_count": str(self.clean_count),
            "seed": str(self.seed),
        }


def load_sweep(path: Path, overrides: list[str] | None = None) -> tuple[SweepConfig, list[Child]]:
    """The study of `path` and its children, in the order in which they run; `overrides` act on every child.

    Seeds come first and methods last, so that a study that is cut off has whole comparisons. A method that looks at no
    noisy mask runs once for all noise levels, and one without a clean stream once for all clean counts: its noisy
    stream lacks the images of the smallest K. Raises UserError, one line, for what is wrong.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        sweep = SweepConfig.model_validate(values)
    except FileNotFoundError:
        raise UserError(f"sweep {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sweep {path}: cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"sweep {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UserError(f"sweep {path}: {first_problem(error, SweepConfig)}") from None

    configs = {label: _config_of(path, sweep, overrides or [], label) for label in sweep.methods}
    children: dict[str, Child] = {}
    for seed in sweep.seeds:
        for noise in sweep.noise:
            for clean_count in sweep.clean_counts:
                for label, config in configs.items():
                    child = _child(label, config, noise, clean_count, min(sweep.clean_counts), seed)
                    children.setdefault(child.name, child)
    return sweep, list(children.values())


def _config_of(path: Path, sweep: SweepConfig, overrides: list[str], label: str) -> Config:
    """What the children of one method share."""
    settings = [*sweep.settings, *sweep.methods[label], *overrides]
    if not any(item.startswith("method.name=") for item in settings):
        settings.append(f"method.name={label}")
    try:
        return load_config(path.parent / sweep.base, [*settings, "name=child"])
    except UserError as error:
        raise UserError(f"sweep {path}: methods.{label}: {error}") from None


def _child(label: str, config: Config, noise: NoiseConfig, clean_count: int, fewest: int, seed: int) -> Child:
    method: MethodConfig = config.method
    level = noise if method.needs_noisy else NoNoise()
    count = clean_count if method.needs_clean else fewest
    data = config.data.model_copy(
        update={"noise": level.model_copy(update={"seed": seed if method.needs_noisy else 0}), "clean_count": count}
    )
    config = config.model_copy(update={"data": data, "seed": seed})
    noise_name = level.level if method.needs_noisy else ANY
    count_name = count if method.needs_clean else ANY
    readable = f"{label}-{noise_name}-k{count_name}-s{seed}"
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in readable.replace(", ", "_").replace(")", ""))
    config = config.model_copy(update={"name": f"{safe}-{config_hash(config)}"})
    return Child(label, noise_name, count_name, seed, Config.model_validate(config.model_dump()))
