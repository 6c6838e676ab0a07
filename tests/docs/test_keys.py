"""The table of keys: current, complete, and fit for sections that are chosen by a value."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from distseg.config.reference import groups, markdown
from distseg.config.schema import Config
from distseg.section import Fraction, Section

ROOT = Path(__file__).parents[2]


class Plain(Section):
    kind: Literal["plain"] = "plain"


class Robust(Section):
    """Bounded."""

    kind: Literal["robust"]
    q: Fraction = 0.7
    """How bounded."""


class Toy(Section):
    loss: Annotated[Plain | Robust, Field(discriminator="kind")] = Plain()
    steps: int | None = None


def leaves(schema: dict[str, Any], node: dict[str, Any], path: str) -> Iterator[str]:
    """Every key of pydantic's JSON schema, whose walk is not ours. Sections in a list are no keys of their own."""
    if reference := node.get("$ref"):
        node = schema["$defs"][reference.rpartition("/")[2]]
    choices = [part for part in node.get("anyOf", node.get("oneOf", node.get("allOf", []))) if part.get("$ref")]
    if choices:
        for part in choices:
            yield from leaves(schema, part, path)
    elif "properties" in node:
        for name, inner in node["properties"].items():
            yield from leaves(schema, inner, f"{path}.{name}" if path else name)
    else:
        yield path


@pytest.mark.parametrize("section", [Config, Toy])
def test_the_table_holds_every_key(section: type[Section]) -> None:
    schema = section.model_json_schema()
    expected = Counter(leaves(schema, schema, ""))
    actual = Counter(key.name for group in groups(section) for key in group.keys)
    assert actual == expected
    assert len(actual) >= 3


def test_a_variant_has_a_table_under_the_setting_that_chooses_it() -> None:
    plain, robust = list(groups(Toy))[1:]
    assert (plain.title, plain.meaning) == ("loss.kind=plain", "The default.")
    assert (robust.title, robust.meaning) == ("loss.kind=robust", "Bounded.")
    q = robust.keys[1]
    assert (q.name, q.takes, q.default, q.meaning) == ("loss.q", "number ≥ 0, ≤ 1", "`0.7`", "How bounded.")


def test_docs_keys_is_current() -> None:
    current = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert current == markdown(), "docs/keys.md is older than the schema: run `make docs` and commit it"
