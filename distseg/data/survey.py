"""Which images there are, which mask belongs to which, and what is wrong with them before any file is opened.

Image and mask are paired by id, never by the order in which a file system lists them (layouts/). No file outside the
root is read: a manifest's paths are relative and without '..', and a symbolic link may not lead out, unless
`data.follow_links` allows it; the root may itself be a link. What the files hold is for checks.py.
"""

from dataclasses import replace
from pathlib import Path

from distseg.data.config import DataConfig
from distseg.data.layouts import LAYOUTS
from distseg.data.sample import Problem, Sample, first_of
from distseg.data.splits import draw_missing_splits
from distseg.errors import UserError
from distseg.text import for_terminal

_SHOWN_NAMES = 6


def read_samples(config: DataConfig) -> list[Sample]:
    """`survey`'s samples; raises UserError for the first of its problems unless `config.on_bad` is `skip`."""
    samples, problems = survey(config)
    if problems and config.on_bad == "refuse":
        raise UserError(first_of(problems))
    return samples


def survey(config: DataConfig) -> tuple[list[Sample], list[Problem]]:
    """All sound samples under `config.root`, sorted by id, and what is wrong with the others.

    Problems are malformed rows of a manifest, an image without a mask, one to be scored on without a reference, an id
    that occurs twice, an id, a group or a file in two splits, and files outside the root; where several samples
    contradict each other, none of them is sound. The masks of the annotator `data.expert` are references. A val or test
    split that the data does not bring is drawn from its training images that have a reference (`data.val_fraction`,
    `data.test_fraction`, `data.split_seed`). Raises UserError where there is no data to be listed.
    """
    if not config.root.is_dir():
        is_there = "is no folder; name the one that holds the data" if config.root.exists() else "no such folder"
        raise UserError(f"data.root {config.root}: {is_there}")
    layouts = LAYOUTS if config.layout == "auto" else {config.layout: LAYOUTS[config.layout]}
    for read in layouts.values():
        found = read(config.root)
        if found is not None:
            break
    else:
        raise UserError(
            f"data.root {config.root}: no data in the layout {' | '.join(layouts)} (manifest.csv; the ISIC challenge's "
            "…Training… folders; PH2's IMD* folders; images/ beside masks/, or beside references/ and annotations/); "
            f"{_what_is_there(config.root)}"
        )
    samples, problems = found.samples, found.problems
    if not samples and not problems:
        empty = "its manifest.csv lists no images" if read is LAYOUTS["manifest"] else "holds no images"
        raise UserError(f"data.root {config.root}: {empty}")
    if config.expert:
        samples = _with_expert(samples, config.expert)
    samples = draw_missing_splits(samples, found.splits, config)
    problems = [*problems, *_contradictions(samples), *_unscorable(samples)]
    if not config.follow_links:
        problems += _outside(samples, config.root)
    unsound = {problem.id for problem in problems}
    sound = sorted((sample for sample in samples if sample.id not in unsound), key=lambda sample: sample.id)
    return sound, sorted(problems, key=lambda problem: (problem.id, problem.file))


def _what_is_there(root: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())
    shown = ", ".join(for_terminal(name) for name in names[:_SHOWN_NAMES])
    return f"it holds {shown}{', …' if len(names) > _SHOWN_NAMES else ''}" if names else "it is empty"


def _with_expert(samples: list[Sample], expert: str) -> list[Sample]:
    """With the masks of the annotator `expert` as references. Raises UserError where nobody has that name."""
    names = sorted({each.annotator for sample in samples for each in sample.annotations})
    if expert not in names:
        there = ", ".join(for_terminal(name) for name in names if name) or "none by name"
        raise UserError(f"data.expert {expert}: no annotator of this name; there are {there}")
    return [
        replace(
            sample,
            reference=next((each.mask for each in sample.annotations if each.annotator == expert), sample.reference),
            annotations=tuple(each for each in sample.annotations if each.annotator != expert),
        )
        for sample in samples
    ]


def _unscorable(samples: list[Sample]) -> list[Problem]:
    reason = "has no reference mask, and images of this split are scored on: give one, or make it a training image"
    return [
        Problem(sample.id, str(sample.image), f"of the {sample.split} split, {reason}")
        for sample in samples
        if sample.split != "train" and sample.reference is None
    ]


def _contradictions(samples: list[Sample]) -> list[Problem]:
    """Ids that occur twice, groups and files that are in two splits; each sample that takes part is named."""
    by_id: dict[str, list[Sample]] = {}
    by_group: dict[str, list[Sample]] = {}
    by_file: dict[Path, list[tuple[Sample, Path]]] = {}
    for sample in samples:
        by_id.setdefault(sample.id, []).append(sample)
        by_group.setdefault(sample.group, []).append(sample)
        for path in sample.files.values():
            by_file.setdefault(_resolved(path), []).append((sample, path))
    problems = []
    for id, same in by_id.items():
        if len(same) > 1:
            splits = {sample.split for sample in same}
            where = f"twice in {same[0].split}" if len(splits) == 1 else "in two splits"
            mend = "rows of several annotators name each, and agree in all else"
            reason = f"the id {id} is {where}; ids must be unique; {mend}"
            problems += [Problem(id, str(sample.image), reason) for sample in same]
    for group, same in by_group.items():
        splits = {sample.split for sample in same}
        if group and len(splits) > 1:
            reason = f"the group {for_terminal(group)} is in {' and '.join(sorted(splits))}; keep it in one split"
            problems += [Problem(sample.id, str(sample.image), reason) for sample in same]
    for (first, first_path), *others in by_file.values():
        for other, other_path in others:
            if other.split != first.split and other.id != first.id:
                reason = f"in the {first.split} split as {first.id} and in {other.split} as {other.id}; keep it in one"
                problems += [Problem(first.id, str(first_path), reason), Problem(other.id, str(other_path), reason)]
    return list(dict.fromkeys(problems))


def _outside(samples: list[Sample], root: Path) -> list[Problem]:
    inside = _resolved(root)
    return [
        Problem(
            sample.id,
            str(path),
            f"a symbolic link that leads out of data.root, to {target}; copy the file, or set data.follow_links=true",
        )
        for sample in samples
        for path in sample.files.values()
        if not (target := _resolved(path)).is_relative_to(inside)
    ]


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle, which reading the file will tell
        return path.absolute()
