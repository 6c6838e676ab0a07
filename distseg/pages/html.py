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
    """Or a JPEG, where a page says so."""

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


@dataclass(frozen=True)
class Fact:
    value: str
    name: str


@dataclass(frozen=True)
class SplitCount:
    name: str
    """train, val or test, which the page has colours for."""
    count: int


@dataclass(frozen=True)
class FoundLine:
    look: str
    """refuse, warn, note or good."""
    badge: str
    text: str
    key: str = ""
    """The setting that goes on all the same."""


@dataclass(frozen=True)
class NamedSample:
    id: str
    split: str


@dataclass(frozen=True)
class Card:
    """One or two samples with their pictures, JPEG."""

    names: Sequence[NamedSample]
    jpegs: Sequence[bytes]
    reasons: Sequence[str]

    @property
    def pictures(self) -> list[str]:
        return [base64.b64encode(jpeg).decode("ascii") for jpeg in self.jpegs]


@dataclass(frozen=True)
class LegendEntry:
    name: str
    colour: str


@dataclass(frozen=True)
class Shaded:
    text: str
    shade: float | None = None
    """0 to 1, or None for a plain cell."""


@dataclass(frozen=True)
class ShadedTable:
    header: Sequence[str]
    rows: Sequence[Sequence[Shaded]]


@dataclass(frozen=True)
class NamedProblem:
    id: str
    text: str


@dataclass(frozen=True)
class DataPage:
    """What the report of a data set shows, from top to bottom; plain text throughout, empty parts are left out."""

    title: str
    subtitle: str
    facts: Sequence[Fact]
    splits: Sequence[SplitCount]
    findings: Sequence[FoundLine]
    legend: Sequence[LegendEntry]
    suspects_text: str
    suspects: Sequence[Card]
    pairs_text: str
    pairs: Sequence[Card]
    agreement_text: str
    agreement: ShadedTable | None
    disagreements: Sequence[Card]
    charts: Sequence[Picture]
    walls_text: str
    walls: Sequence[Picture]
    """JPEG, unlike other pictures."""
    problems_text: str
    problems: Sequence[NamedProblem]


@dataclass(frozen=True)
class AuditCard:
    """A mask that is in doubt: image with outlines and suspicion map, JPEG."""

    id: str
    facts: Sequence[str]
    jpegs: Sequence[bytes]

    @property
    def pictures(self) -> list[str]:
        return [base64.b64encode(jpeg).decode("ascii") for jpeg in self.jpegs]


@dataclass(frozen=True)
class AuditPage:
    """What the report of an audit shows, from top to bottom; plain text throughout, empty parts are left out."""

    title: str
    paragraphs: Sequence[str]
    facts: Sequence[Fact]
    annotators_text: str
    annotators: Table
    legend: Sequence[LegendEntry]
    cards_text: str
    cards: Sequence[AuditCard]
    charts: Sequence[Picture]
    masks: Table
    problems: Sequence[NamedProblem]


def study_page(page: StudyPage) -> str:
    """One HTML document, for a browser and a tracker's artifact viewer. It loads nothing and runs no script."""
    return _rendered("study.html", page)


def data_page(page: DataPage) -> str:
    """One HTML document, as `study_page`."""
    return _rendered("data.html", page)


def audit_page(page: AuditPage) -> str:
    """One HTML document, as `study_page`."""
    return _rendered("audit.html", page)


def _rendered(template: str, page: StudyPage | DataPage | AuditPage) -> str:
    # Late: only a report needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distseg.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(page=page)
