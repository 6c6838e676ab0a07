"""All that an audit has found; its files follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from distseg.data.sample import Problem
from distseg.inference.audit.model import Judge, LabelModel
from distseg.inference.audit.verdicts import Verdict


@dataclass(frozen=True)
class Audit:
    title: str
    how: str
    """What has judged the masks, in a sentence."""
    judges: Sequence[Judge]
    model: LabelModel
    verdicts: Sequence[Verdict]
    """Ranked."""
    problems: Sequence[Problem]
