"""What every section of a config is: typed, frozen, and an unknown key is an error."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]


class Section(BaseModel):
    # The docstring below a field is its description in the table of keys (docs/keys.md).
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def kinds_of(annotation: Any) -> dict[str, type[Section]]:
    """The members of a union of sections that differ by their `kind`, by that word; empty for another annotation."""
    members = [member for member in get_args(annotation) if isinstance(member, type) and issubclass(member, Section)]
    return {member.model_fields["kind"].default: member for member in members if "kind" in member.model_fields}
