"""YAML plus `section.key=value` overrides, into one checked Config."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.section import kinds_of
from distseg.text import for_terminal

CHANGEABLE = (
    "data.memory",
    "data.threads",
    "deepspeed.config_file",
    "deepspeed.zero_stage",
    "train.accumulation",
    "train.batch_size",
    "train.checkpoint_every",
    "train.clean_batch_size",
    "train.figure_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_bad_steps",
)
"""Keys that change no result, if a step sees as many images as before; a run may be resumed with other values."""


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `section.key=value` overrides in order, and check the whole.

    Raises UserError, one line that names the key and the mend, for an unreadable file or a wrong key, type or value.
    """
    try:
        written = OmegaConf.load(path)
        if not isinstance(written, DictConfig):
            raise UserError(f"config {path}: must be a mapping of sections")
        merged = OmegaConf.merge(written, _parse_overrides(overrides or []))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file") from None
    except MissingMandatoryValue as error:
        raise UserError(f"config {path}: {error.full_key}: required; add {error.full_key}=VALUE") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"config {path}: {first_problem(error)}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten_config(config: Config) -> dict[str, Any]:
    """`{"data.image_size": 96, …}`: the leaves under dotted names, as experiment trackers want them."""

    def leaves(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in node.items():
            flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    return leaves(config.model_dump(mode="json"), "")


def changed_keys(before: Config, after: Config) -> list[str]:
    """`section.key was …, is …` for every leaf that differs and may change the result."""
    old, new = flatten_config(before), flatten_config(after)
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in CHANGEABLE and not key.startswith("tracking.")
    ]


def _parse_overrides(overrides: list[str]) -> Any:
    for item in overrides:
        key, separator, _ = item.partition("=")
        if not separator or not key or key.startswith("-"):
            raise UserError(f"override {item!r}: write section.key=value, for instance data.clean_count=50")
    return OmegaConf.from_dotlist(overrides)


def config_hash(config: Config) -> str:
    """Eight hexadecimal digits of everything that can change a result: all but the name and `tracking`."""
    values = config.model_dump(mode="json", exclude={"name", "tracking"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def first_problem(error: ValidationError, root: type[BaseModel] = Config) -> str:
    """The first of a validation's problems in one line that names the key and the mend; the others are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path, section = _place(first["loc"], root)
    key = for_terminal(".".join(path))  # a key may be anybody's text
    if first["type"] == "extra_forbidden":
        text = f"{key}: unknown key{_suggestion(path[-1], section)}"
    elif first["type"] == "missing":
        text = f"{key}: required; add {key}=VALUE"
    else:
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        given = first["input"]
        shown = f", got {repr(given)[:80]}" if isinstance(given, str | int | float | bool | None) else ""
        text = f"{key}: {message}{shown}" if key else message
    return text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _suggestion(key: str, section: type[BaseModel]) -> str:
    close = difflib.get_close_matches(key, section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(section.model_fields)}"


def _place(location: tuple[str | int, ...], root: type[BaseModel]) -> tuple[list[str], type[BaseModel]]:
    """The dotted path of a problem and the section that its last key is in, from where pydantic says that it is.

    pydantic names the chosen member of a union in between, which is no key; numbers count the items of a list.
    """
    path: list[str] = []
    section, inside = root, cast(Any, root)
    for part in location:
        if isinstance(part, int):
            path.append(str(part))
        elif (chosen := kinds_of(inside).get(part)) is not None:
            inside = section = chosen
        else:
            path.append(part)
            section = _section_in(inside) or section
            field = section.model_fields.get(part)  # none where the part is a key of a mapping
            inside = field.annotation if field else inside
    return path, section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The first section that a field holds, alone, in a list or in a mapping; None for a plain value or a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if kinds_of(annotation):
        return None
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
