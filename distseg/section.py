"""What every section of a config is: typed, frozen, and an unknown key is an error."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]


class Section(BaseModel):
    # The docstring below a field is its description in the table of keys (docs/keys.md).
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def kinds_of(annotation: Any) -> dict[str, type[Section]]:
    """The members of a union of sections, by the word that chooses one: `kind`, or a tag. Empty for anything else."""
    members: dict[str, type[Section]] = {}
    for member in get_args(annotation):
        tags = [item.tag for item in getattr(member, "__metadata__", ()) if isinstance(item, Tag)]
        section = get_args(member)[0] if tags else member
        if isinstance(section, type) and issubclass(section, Section):
            word = tags[0] if tags else section.model_fields["kind"].default if "kind" in section.model_fields else None
            if word is not None:
                members[word] = section
    return members


def of_kind(union: Any, default: str | None = None) -> BeforeValidator:
    """Beside `Field(discriminator="kind")` of a union of sections: what a part may be written as.

    A word alone is a kind; without one it is `default`. A key that is null is not given, so that null on a command line
    takes back what a file sets. Raises ValueError for a key that only another kind has; `.key` in its text is a key of
    this section.
    """
    members = kinds_of(union)
    known = {name for member in members.values() for name in member.model_fields}

    def check(values: Any) -> Any:
        if isinstance(values, str):
            values = {"kind": values}
        if not isinstance(values, dict):
            return values
        kind = values.get("kind") or default
        if not isinstance(kind, str):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in known}
        given["kind"] = kind
        for name in known & given.keys() if kind in members else ():
            owners = [other for other, member in members.items() if name in member.model_fields]
            if kind not in owners:
                raise ValueError(
                    f"{name} is no key of {kind}; remove it (.{name}=null takes it back), or set .kind={owners[0]}"
                )
        return given

    return BeforeValidator(check)
