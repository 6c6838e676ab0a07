"""HTML pages, each one document with its pictures inside. The only importer of jinja2, which escapes every text."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    cells: Sequence[str]
    best: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Picture:
    name: str
    """Its file name, for readers that see no pictures."""
    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class StudyPage:
    """What the report of a study shows, from top to bottom; plain text throughout."""

    title: str
    paragraphs: Sequence[str]
    warning: str
    """Empty where there is nothing to warn of."""
    tables: Sequence[Table]
    pictures: Sequence[Picture]


def study_page(page: StudyPage) -> str:
    """One HTML document, for a browser and a tracker's artifact viewer. It loads nothing and runs no script."""
    # Late: only a report needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distseg.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("study.html").render(page=page)
