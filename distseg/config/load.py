"""YAML plus `section.key=value` overrides, into one checked Config."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.methods.config import PARTS, MethodConfig, part_with, with_parts
from distseg.section import kinds_of
from distseg.text import for_terminal

WITHOUT_EFFECT = (
    "data.allow",
    "data.device_memory",
    "data.memory",
    "data.threads",
    "deepspeed.config_file",
    "deepspeed.zero_stage",
    "train.checkpoint_every",
    "train.figure_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_bad_steps",
)
"""Keys that change no result but for rounding and the decoder of an image; see `has_no_effect`."""
CHANGEABLE = (*WITHOUT_EFFECT, "data.root", "train.accumulation", "train.batch_size", "train.clean_batch_size")
"""Keys that a run may be resumed with other values of. The last four may change the result of another run, but not of
one that is resumed: it knows its samples by content, and its steps have to see as many images as before."""


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read `path`, apply `section.key=value` overrides in order, and check the whole.

    Raises UserError, one line that names the key and the mend, for an unreadable file or a wrong key, type or value.
    """
    try:
        written = OmegaConf.load(path)
        if not isinstance(written, DictConfig):
            raise UserError(f"config {path}: must be a mapping of sections")
        merged = OmegaConf.merge(*_spelled_out(written, overrides or []))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file") from None
    except MissingMandatoryValue as error:
        raise UserError(f"config {path}: {error.full_key}: required; add {error.full_key}=VALUE") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read: {error}") from None
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
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

    return leaves(_with_order_kept(config.model_dump(mode="json")), "")


def _with_order_kept(values: dict[str, Any]) -> dict[str, Any]:
    """With `data.classes` as a list: the place of a class is its id."""
    classes = values["data"]["classes"]
    ordered = None if classes is None else [{name: given} for name, given in classes.items()]
    return values | {"data": values["data"] | {"classes": ordered}}


def has_no_effect(key: str) -> bool:
    """Whether runs that differ in `key` alone have the same result, but for rounding and the decoder of an image."""
    return key in WITHOUT_EFFECT or key.startswith("tracking.")


def changed_keys(before: Config, after: Config) -> list[str]:
    """`section.key was …, is …` for every leaf that differs and may change the result."""
    old, new = flatten_config(before), flatten_config(after)
    return [
        f"{key} was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in CHANGEABLE and not has_no_effect(key)
    ]


def canonical_key(key: str) -> str:
    """`method.loss.q` for `method.q`, its short form; any other key as it is."""
    section, _, name = key.partition(".")
    part = part_with(name) if section == "method" else None
    return f"method.{part}.{name}" if part else key


def _spelled_out(written: DictConfig, overrides: list[str]) -> tuple[Any, Any]:
    """The file and what is set over it, with every key of a method in its part.

    Raises UserError for what is no override, and where a method is named over the parts of another one.
    """
    keys = [canonical_key(item.partition("=")[0]) for item in overrides]
    # A word in the place of a part would undo the keys that are set over it, or they it.
    opened = {part for part in PARTS if any(key.startswith(f"method.{part}.") for key in keys)}
    method = written.get("method")
    if isinstance(method, DictConfig):
        try:
            spelled = with_parts({str(key): value for key, value in method.items_ex(resolve=False)})
        except ValueError as error:
            raise UserError(f"method: {error}") from None
        spelled |= {part: {"kind": spelled[part]} for part in opened if isinstance(spelled.get(part), str)}
        others = {key: value for key, value in written.items_ex(resolve=False) if key != "method"}
        written = OmegaConf.create({**others, "method": spelled})
    items = []
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key or key.startswith("-"):
            raise UserError(f"override {item!r}: write section.key=value, for instance data.clean_count=50")
        key = canonical_key(key)
        if value.isidentifier() and key in {f"method.{part}" for part in opened}:
            key += ".kind"
        items.append(f"{key}={value}")
    over = OmegaConf.from_dotlist(items)
    _check_new_name(written.get("method"), over.get("method"))
    return written, over


def _check_new_name(file: Any, over: Any) -> None:
    """Refuse another method's name over parts that a file sets, unless they are set anew or taken back."""
    if not (isinstance(file, DictConfig) and isinstance(over, DictConfig) and "name" in over):
        return
    before = file.get("name", MethodConfig.model_fields["name"].default)
    kept = [part for part in PARTS if file.get(part) is not None and part not in over]
    if over["name"] != before and kept:
        mend = " ".join(f"method.{part}=null" for part in kept)
        raise UserError(
            f"method.name={over['name']}: the config sets method.{kept[0]} for {before}; take it back ({mend}), or set "
            "it anew"
        )


def config_hash(config: Config) -> str:
    """Eight hexadecimal digits of everything that can change a result: all but the name and `tracking`."""
    values = _with_order_kept(config.model_dump(mode="json", exclude={"name", "tracking"}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def first_problem(error: ValidationError, root: type[BaseModel] = Config) -> str:
    """The first of a validation's problems in one line that names the key and the mend; the others are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    path, section, others = _place(first["loc"], root)
    key = for_terminal(".".join(path))  # a key may be anybody's text
    if first["type"] == "extra_forbidden":
        text = f"{key}: unknown key{_suggestion(path[-1], section, others)}"
    elif first["type"] == "union_tag_invalid":
        text = f"{key}.kind: input should be {first['ctx']['expected_tags']}, got {first['ctx']['tag']!r}"
    elif first["type"] == "union_tag_not_found":
        text = f"{key}.kind: required; add {key}.kind=VALUE"
    elif first["type"] == "missing":
        text = f"{key}: required; add {key}=VALUE"
    else:
        # A mend names keys from its section on: `.kind=aligned` of method.weighting.
        message = re.sub(r"(?<![\w.])\.(?=[a-z_.]+=)", f"{key}.", first["msg"].removeprefix("Value error, "))
        message = message[0].lower() + message[1:]
        given = first["input"]
        shown = f", got {repr(given)[:80]}" if isinstance(given, str | int | float | bool | None) else ""
        text = f"{key}: {message}{shown}" if key else message
    return text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _suggestion(key: str, section: type[BaseModel], others: Iterable[type[BaseModel]]) -> str:
    """What may have been meant by an unknown key of `section`; `others` are the sections that could be in its place."""
    parts = [kinds_of(field.annotation).values() for field in section.model_fields.values()]
    names = {name for other in (section, *others, *chain(*parts)) for name in other.model_fields}
    close = difflib.get_close_matches(key, sorted(names), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(section.model_fields)}"


def _place(
    location: tuple[str | int, ...], root: type[BaseModel]
) -> tuple[list[str], type[BaseModel], Iterable[type[BaseModel]]]:
    """Where pydantic says that a problem is: the key's dotted path, its section, and what could be in its place.

    pydantic names the chosen member of a union in between, which is no key; numbers count the items of a list, and some
    words are keys of a mapping.
    """
    path: list[str] = []
    section, others = root, dict[str, type[BaseModel]]()
    inside = {"": root}
    for part in location:
        if isinstance(part, str) and part and part in inside:
            section, others, inside = inside[part], inside, {"": inside[part]}
            continue
        path.append(str(part))
        if (holder := inside.get("")) is not None and isinstance(part, str):
            section, others = holder, others if holder is section else {}
            if part in section.model_fields:
                inside = _sections_in(section.model_fields[part].annotation)
    return path, section, others.values()


def _sections_in(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections that a field holds, alone, in a list or in a mapping: one under "", a union's by their words."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    if members := kinds_of(annotation):
        return dict(members)
    return next((found for part in get_args(annotation) if (found := _sections_in(part))), {})
