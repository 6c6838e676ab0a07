"""The images to predict: files, folders, tables and lists, each with an id that names its outputs."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distseg.data.layouts.manifest import read_images
from distseg.data.layouts.pairing import image_files
from distseg.data.sample import Problem, fault_of_id
from distseg.errors import UserError
from distseg.text import for_terminal

PLAN = "predict.json"
"""Marks a folder of predictions, and says of which network and settings they are."""


@dataclass(frozen=True, order=True)
class Item:
    id: str
    """The file's name without its ending, or what a table says. Outputs are named by it."""
    path: Path


def find_items(inputs: Sequence[str], listed: Sequence[str], to: Path) -> tuple[list[Item], list[Problem]]:
    """The images of `inputs` and, one a line, of `listed`, sorted by id; and those that cannot be named.

    An input is a file, a folder with all images below it, or a table (.csv with the columns id and image, paths
    relative to it). What is below `to` is none, nor is what an earlier start has written below an input. A symbolic
    link in a folder that leads out of it is a problem. Raises UserError for an input that is not there, and for two of
    the same id.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    for given in inputs:
        path = Path(given)
        if not os.path.lexists(path):
            raise UserError(f"{given}: no such file or folder")
        if path.is_dir():
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(to)):
                raise UserError(f"{given}: is in the folder that --to names, where nothing is read; choose another")
            _add_files(_without_predictions(image_files(path), path), path, to, items, problems)
        elif path.suffix.lower() == ".csv":
            listing = read_images(path)
            items += [Item(sample.id, sample.image) for sample in listing.samples]
            problems += listing.problems
        else:
            _add_files([path], None, to, items, problems)
    _add_files([Path(line) for line in listed if line.strip()], None, to, items, problems)
    unique = sorted(set(items))
    _check_ids(unique)
    if not unique and not problems:
        raise UserError(f"{', '.join(map(for_terminal, inputs)) or 'the list'}: holds no images")
    return unique, problems


def _add_files(
    paths: Sequence[Path], folder: Path | None, to: Path, items: list[Item], problems: list[Problem]
) -> None:
    """`folder` is where they were found, None for files that were named."""
    inside = None if folder is None else Path(os.path.realpath(folder))
    outputs = Path(os.path.realpath(to))
    for path in paths:
        real = Path(os.path.realpath(path))
        if folder is not None and real.is_relative_to(outputs):
            continue
        id = unicodedata.normalize("NFC", path.stem)
        fault = fault_of_id(id)
        if inside is not None and not real.is_relative_to(inside):
            problems.append(Problem(id, str(path), "a link that leads out of its folder; name the file itself"))
        elif fault is not None:
            problems.append(Problem(id, str(path), f"{fault}; rename it, or give it an id in a table"))
        else:
            items.append(Item(id, path))


def _without_predictions(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Of the files below `folder` those that no earlier start of `predict` has written."""
    inside = {parent for path in paths for parent in path.relative_to(folder).parents} - {Path()}
    predicted = {each for each in inside if (folder / each / PLAN).is_file()}
    return [path for path in paths if not predicted.intersection(path.relative_to(folder).parents)]


def _check_ids(items: Sequence[Item]) -> None:
    """Raises UserError where outputs would have one name, on file systems that do not tell A from a either."""
    taken: dict[str, Item] = {}
    for item in items:
        other = taken.setdefault(item.id.casefold(), item)
        if other is not item:
            names = f"{for_terminal(str(other.path))} and {for_terminal(str(item.path))}"
            raise UserError(
                f"{names}: their outputs would have the same name, {for_terminal(item.id)}; predict one of them into "
                "another folder, or give them ids in a table"
            )
