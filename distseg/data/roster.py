"""The samples that a run began with, by content: it goes on with these or not at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from distseg.data.sample import FileKey, Sample
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.section import Section
from distseg.text import for_terminal

Digests = dict[str, dict[FileKey, str]]
"""The SHA-256 of each sample's files, by id."""
FORMAT: Literal[1] = 1


class _Member(Section):
    """A sample as data.json has it."""

    split: str
    group: str
    clean: bool
    sha256: dict[FileKey, str]
    picked: bool = False


class _Roster(Section):
    format: Literal[1]
    samples: dict[str, _Member]


def keep_roster(samples: Sequence[Sample], clean: Collection[str], digests: Digests, record: Path, begun: bool) -> None:
    """Write the samples to `record`, or where the run has begun hold them against it. Paths do not count.

    `clean` are the ids of the clean stream. Raises UserError that names the first sample that is new, gone, in another
    split, group or stream or of another content.
    """
    now = {
        sample.id: _Member(
            split=sample.split,
            group=sample.group,
            clean=sample.id in clean,
            sha256=digests[sample.id],
            picked=sample.picked,
        )
        for sample in samples
    }
    if not (begun and record.exists()):
        record.parent.mkdir(parents=True, exist_ok=True)
        content = _Roster(format=FORMAT, samples=now).model_dump(exclude_defaults=True)
        write_atomically(record, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    changes = _changes(_read(record), now)
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise UserError(
            f"{record}: the data is not what this run began with: {for_terminal(changes[0])}{more}; put it back as it "
            "was, or start a new run with another name="
        )


@dataclass(frozen=True)
class Summary:
    sha256: str
    """Of every sample's split, group, stream and files, whatever their paths."""
    splits: dict[str, int]
    """Samples by split."""
    clean: int
    """Of the clean stream."""


def read_summary(record: Path) -> Summary | None:
    """Of the samples in a run's `record`; None where it has none. Raises UserError where it is damaged."""
    if not record.exists():
        return None
    samples = _read(record)
    content = {id: sample.model_dump(exclude_defaults=True) for id, sample in samples.items()}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    clean = sum(sample.clean for sample in samples.values())
    return Summary(digest, dict(Counter(sample.split for sample in samples.values())), clean)


def _read(record: Path) -> dict[str, _Member]:
    try:
        return TypeAdapter(_Roster).validate_json(record.read_bytes()).samples
    except (OSError, ValueError):
        raise UserError(f"{record}: is damaged; put it back, or start a new run with another name=") from None


def _changes(before: dict[str, _Member], now: dict[str, _Member]) -> list[str]:
    changes = [f"{id} is new" for id in sorted(now.keys() - before.keys())]
    changes += [f"{id} is gone" for id in sorted(before.keys() - now.keys())]
    for id in sorted(before.keys() & now.keys()):
        old, new = before[id], now[id]
        if old.split != new.split:
            changes.append(f"{id} was in {old.split} and is in {new.split}")
        elif old.group != new.group:
            changes.append(f"{id} was of the group {old.group!r} and is of {new.group!r}")
        elif old.clean != new.clean:
            changes.append(f"{id} was {'clean' if old.clean else 'noisy'} and is {'clean' if new.clean else 'noisy'}")
        elif old.picked != new.picked:
            changes.append(f"{id} was {'picked and is not' if old.picked else 'not picked and is'} now")
        else:
            keys = sorted(old.sha256.keys() | new.sha256.keys())
            changes += [f"the {key} of {id} has changed" for key in keys if old.sha256.get(key) != new.sha256.get(key)]
    return changes
