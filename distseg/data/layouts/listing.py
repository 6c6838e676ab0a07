"""What a layout finds under a root."""

from dataclasses import dataclass

from distseg.data.sample import Problem, Sample


@dataclass(frozen=True)
class Listing:
    samples: list[Sample]
    problems: list[Problem]
    splits: frozenset[str]
    """The splits that the data brings, also where none of their samples can be used; the others are drawn."""
