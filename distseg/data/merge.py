"""Masks that were drawn again, as references of the data set that they are of. Nothing that was there is lost."""

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distseg.data.config import DataConfig
from distseg.data.decode import Decoding, read_size
from distseg.data.formats import FORMATS
from distseg.data.formats.contents import IGNORE, REFERENCE, Contents, Item, Mask, Source
from distseg.data.formats.convert import Progress, check_unmarked
from distseg.data.layouts import LAYOUTS
from distseg.data.layouts.listing import Listing
from distseg.data.layouts.manifest import with_references
from distseg.data.manifest_file import manifest_text
from distseg.data.sample import Annotation, Sample, first_of
from distseg.errors import BadFileError, UserError
from distseg.files import write_atomically
from distseg.text import for_terminal

FORMER = "former"
"""The annotator whose masks are the references that others have taken the place of."""


@dataclass(frozen=True)
class Merged:
    added: int
    """Images that had no reference."""
    replaced: int
    """Images whose reference is an annotation by FORMER now."""
    same: int
    """Images whose reference was this mask already."""
    unannotated: int
    """Images of the file that nobody has annotated."""
    kept: Path | None
    """The manifest as it was, where there was one and it has changed."""


def merge_references(
    data: DataConfig, format: str, source: Source, unmarked: str | None, progress: Progress, at_random: bool = False
) -> Merged:
    """Make the masks of an annotation tool's file the references of the images of `data.root` with the same ids.

    A mask is written to references/ID.png, or another name where that is taken, and then manifest.csv, which is kept
    as manifest.N.csv. Other files are not touched, and a stop at any moment leaves the data as they were or as they
    are to be. Images that had no reference are marked as picked unless they were drawn `at_random`. `source` has the
    role reference for a format that does not say whose masks it holds.

    Raises UserError or BadFileError, and changes nothing, for an id that is not there, a mask of another size, a class
    that `data` does not name, and several masks of an image none of which is the ground truth.
    """
    if data.expert:
        raise UserError("data.expert: names who the references are by, and merged masks are by others; leave it out")
    listing = _listing(data)
    samples = {sample.id: sample for sample in listing.samples}
    contents = FORMATS[format].read(source)
    check_unmarked(source, contents, unmarked)
    table = _class_table(contents, data.class_names, source.path)
    masks: dict[str, Mask] = {}
    for item in progress(contents.items, contents.count):
        if item.unmarked and unmarked == "skip":
            continue
        masks[item.id] = _checked(item, samples, table, data.decoding, source.path)
    if not masks:
        raise UserError(f"{source.path}: holds no mask that somebody has drawn")
    written = {id: _written(data.root, samples[id], mask, data.decoding) for id, mask in masks.items()}
    changed = {id: path for id, path in written.items() if path != samples[id].reference}
    former = {id: reference for id in changed if (reference := samples[id].reference) is not None}
    picked = set() if at_random else changed.keys() - former.keys()
    kept = _rewrite(data.root, listing, changed, former, picked) if changed else None
    added, replaced = len(changed) - len(former), len(former)
    return Merged(added, replaced, len(masks) - len(changed), contents.unannotated, kept)


def _listing(data: DataConfig) -> Listing:
    """The data set as it lies on the disk. Raises UserError where anything in it is wrong: it could not be kept."""
    if not data.root.is_dir():
        raise UserError(f"{data.root}: no such folder")
    layouts = LAYOUTS if data.layout == "auto" else {data.layout: LAYOUTS[data.layout]}
    for read in layouts.values():
        if (listing := read(data.root)) is not None:
            break
    else:
        raise UserError(f"{data.root}: no data in the layout {' | '.join(layouts)}")
    if listing.problems:
        raise UserError(first_of(listing.problems))
    return listing


def _class_table(contents: Contents, names: tuple[str, ...], where: Path) -> NDArray[np.uint8]:
    """(256,) from the ids of the file to those of the data, by name."""
    table = np.full(256, IGNORE, np.uint8)
    for id, name in enumerate(contents.classes):
        if id and name not in names:
            raise UserError(
                f"{where}: has the class {for_terminal(name)}, and the data {', '.join(names[1:])}; rename it in the "
                "tool, or name it in data.classes"
            )
        table[id] = names.index(name) if id else 0
    return table


def _checked(
    item: Item, samples: Mapping[str, Sample], table: NDArray[np.uint8], decoding: Decoding, where: Path
) -> Mask:
    """The item's one mask in the ids of the data."""
    if item.id not in samples:
        raise BadFileError(f"{where}: has the image {for_terminal(item.id)}, which is not in the data; take it out")
    if REFERENCE not in item.masks and len(item.masks) != 1:
        raise BadFileError(
            f"{where}: {for_terminal(item.id)} has {len(item.masks)} annotations; make one of them the ground truth"
        )
    mask = table[item.masks[REFERENCE] if REFERENCE in item.masks else next(iter(item.masks.values()))]
    size = read_size(samples[item.id].image, decoding)
    if mask.shape != size:
        raise BadFileError(
            f"{where}: the mask of {for_terminal(item.id)} is {mask.shape[1]}×{mask.shape[0]}, and its image "
            f"{size[1]}×{size[0]}; is it of another data set?"
        )
    if (mask == IGNORE).any() and not decoding.classes.ignored:
        raise UserError(
            f"{where}: {for_terminal(item.id)} has pixels to be ignored, for which the data has no value; name one in "
            "data.ignore"
        )
    return mask


def _written(root: Path, sample: Sample, mask: Mask, decoding: Decoding) -> Path:
    """Where the mask is below the root: a file that has its bytes, or else a new one."""
    content = decoding.classes.encode(mask)
    if sample.reference is not None and _holds(sample.reference, content):
        return sample.reference
    folder = root / "references"
    folder.mkdir(exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{sample.id}.png" if number == 1 else f"{sample.id}.{number}.png")
        if not path.exists():
            write_atomically(path, content)
            return path
        if _holds(path, content):
            return path
        number += 1


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _rewrite(
    root: Path, listing: Listing, new: Mapping[str, Path], former: Mapping[str, Path], picked: Collection[str]
) -> Path | None:
    """Write manifest.csv with the new references; where the one before is kept, if there was one."""
    manifest = root / "manifest.csv"
    if not manifest.exists():
        samples = [_with(sample, new, former, picked) for sample in listing.samples]
        write_atomically(manifest, manifest_text(root, samples))
        return None
    text = with_references(root, _below(root, new), _below(root, former), FORMER, picked)
    number = 1
    while (kept := root / f"manifest.{number}.csv").exists():
        number += 1
    shutil.copyfile(manifest, kept)
    write_atomically(manifest, text)
    return kept


def _with(sample: Sample, new: Mapping[str, Path], former: Mapping[str, Path], picked: Collection[str]) -> Sample:
    chosen = sample.picked or sample.id in picked
    sample = replace(sample, reference=new.get(sample.id, sample.reference), picked=chosen)
    if sample.id not in former:
        return sample
    annotation = Annotation(_free(FORMER, [each.annotator for each in sample.annotations]), former[sample.id])
    return replace(sample, annotations=(*sample.annotations, annotation))


def _free(name: str, taken: Iterable[str]) -> str:
    names, number = set(taken), 1
    while (chosen := name if number == 1 else f"{name}-{number}") in names:
        number += 1
    return chosen


def _below(root: Path, paths: Mapping[str, Path]) -> dict[str, str]:
    return {id: path.relative_to(root).as_posix() for id, path in paths.items()}
