"""The table of all keys as Markdown, from the schema: what a key takes, its default, and its docstring.

    python -m distseg.config.reference docs/keys.md

`make docs` calls this; a test holds that the committed page is current and lists every key.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from distseg.config.schema import Config

_HEADER = """# Keys of a config

Every key that a config may set, `section.key=value` on the command line. An unknown key, and a key that does not apply,
is an error that names the mend. This page is generated from the schema: `make docs`.
"""

_COLUMNS = "| key | takes | default | meaning |\n|---|---|---|---|\n"

_NAMES: dict[Any, str] = {
    bool: "`true` `false`",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    Any: "any value",
    NoneType: "`null`",
}


@dataclass(frozen=True)
class Key:
    """One line of the table."""

    name: str
    """Dotted, as on the command line."""
    takes: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Group:
    """The keys of one section, or of one variant of it."""

    title: str
    """The section's dotted name; for a variant the setting that chooses it, `section.name=value`."""
    meaning: str
    keys: tuple[Key, ...]


def groups(section: type[BaseModel] = Config, title: str = "", path: str = "") -> Iterator[Group]:
    """The groups of `section` and of the sections in it, outer ones first.

    `path` is the dotted prefix of its keys. A field that holds one of several sections gives a group a variant.
    """
    own: list[Key] = []
    inner: list[Group] = []
    for name, field in section.model_fields.items():
        dotted = f"{path}{name}"
        variants = [_section(part) for part in _alternatives(field.annotation)]
        sections = [variant for variant in variants if variant is not None]
        if not sections:
            own.append(Key(dotted, _takes(field.annotation, field.metadata), _default(field), _text(field.description)))
        elif len(sections) == 1:
            inner += groups(sections[0], dotted, f"{dotted}.")
        else:
            for variant in sections:
                first, *others = groups(variant, _choice(dotted, field, variant), f"{dotted}.")
                if not field.is_required() and type(field.get_default(call_default_factory=True)) is variant:
                    first = replace(first, meaning=f"{first.meaning} The default.".strip())
                inner += [first, *others]
    yield Group(title or "experiment", _text(section.__doc__), tuple(own))
    yield from inner


def markdown() -> str:
    """The page: a table for each group, under a heading."""
    parts = [_HEADER]
    for group in groups():
        meaning = f"{group.meaning}\n\n" if group.meaning else ""
        rows = [f"| `{key.name}` | {key.takes} | {key.default} | {key.meaning} |\n" for key in group.keys]
        table = _COLUMNS + "".join(rows) if rows else "No further keys.\n"
        parts.append(f"## {group.title}\n\n{meaning}{table}")
    return "\n".join(parts)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, nested ones and annotated ones included; else the annotation alone."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(inner for part in get_args(annotation) for inner in _alternatives(part))
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, UnionType):
        return _alternatives(get_args(annotation)[0])
    return (annotation,)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    bare = _bare(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _choice(dotted: str, field: FieldInfo, variant: type[BaseModel]) -> str:
    """The setting that chooses a variant: by the field that tells variants apart, or by its tag."""
    if isinstance(field.discriminator, str):
        values = get_args(variant.model_fields[field.discriminator].annotation)
        return f"{dotted}.{field.discriminator}={' or '.join(values)}"
    for part in _alternatives(field.annotation):
        tags = [item.tag for item in getattr(part, "__metadata__", ()) if isinstance(item, Tag)]
        if _bare(part) is variant and tags:
            return f"{dotted}.name={tags[0]}"
    raise TypeError(f"{dotted}: {variant.__name__} has neither a discriminator nor a tag")


def _takes(annotation: Any, metadata: list[Any]) -> str:
    """What a key takes, in words; `metadata` are the bounds of the field itself."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(arguments[0], [*metadata, *_bounds(arguments[1:])])
    if origin in (Union, UnionType):
        return " or ".join(_takes(part, metadata if part is not NoneType else []) for part in arguments)
    if origin is Literal:
        return " ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list, each {_takes(arguments[0], [])}"
    if origin is tuple:
        return f"[{', '.join(_takes(part, []) for part in arguments)}]"
    if origin is dict:
        return f"mapping to {_takes(arguments[1], [])}"
    section = _section(annotation)
    name = f"a mapping like `{section.__name__}`" if section else _NAMES[annotation]
    return f"{name} {', '.join(_bounds(metadata))}".strip()


def _bounds(metadata: Any) -> list[str]:
    """`≥ 0`, `< 1`: the bounds among the metadata of a field."""
    found = []
    for item in metadata:
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, FieldInfo):
            found += _bounds(item.metadata)
        elif isinstance(item, Ge):
            found.append(f"≥ {item.ge}")
        elif isinstance(item, Gt):
            found.append(f"> {item.gt}")
        elif isinstance(item, Le):
            found.append(f"≤ {item.le}")
        elif isinstance(item, Lt):
            found.append(f"< {item.lt}")
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{_plain(field.get_default(call_default_factory=True))}`"


def _plain(value: Any) -> str:
    """A default as YAML would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _text(docstring: str | None) -> str:
    """A docstring as one line of a table's cell."""
    return " ".join((docstring or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
