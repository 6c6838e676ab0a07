"""prepare's --import, --export and --merge: annotation tools' files into a data set with manifest.csv, and back."""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from distseg.cli.process import say
from distseg.data.decode import PLAIN, read_mask
from distseg.data.formats import FORMATS
from distseg.data.formats.contents import Item, Source
from distseg.data.formats.convert import Imported, check_role, export_annotations, import_annotations
from distseg.data.sample import SPLITS, Sample
from distseg.errors import UserError

if TYPE_CHECKING:
    from distseg.config.schema import Config

_NAMES = " | ".join(FORMATS)
_SPELLED = {"role": "as", "noisy_masks": "noisy-masks", "at_random": "at-random"}
_APART: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "--import": [
        (("role", "images"), "write it after the --import that it is of"),
        (("export", "report", "cache", "noisy_masks"), "is another command, of the data that --import makes"),
        (("at_random",), "is for --merge"),
    ],
    "--export": [
        (("images", "unmarked"), "is for --import"),
        (("at_random",), "is for --merge"),
        (("cache", "noisy_masks"), "--export does nothing else; run prepare again"),
    ],
    "--merge": [
        (("role",), "merged masks become references"),
        (
            ("export", "report", "cache", "noisy_masks", "to"),
            "is another command; --merge changes the data where it is",
        ),
    ],
    "": [
        (("to", "role", "images", "unmarked"), "is for --import and --export"),
        (("at_random",), "is for --merge"),
    ],
}
"""What is no option of a command, and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--import", dest="imports", action=_Import, metavar="FORMAT=PATH", help=f"FORMAT: {_NAMES}")
    parser.add_argument("--as", dest="role", action=_OfImport, metavar="ROLE", help="reference, annotation[:NAME]")
    parser.add_argument("--images", type=Path, action=_OfImport, metavar="FOLDER", help="where an import's images are")
    parser.add_argument("--unmarked", choices=("empty", "skip"), help="images for which an import has nothing")
    parser.add_argument("--merge", metavar="FORMAT=PATH", help="masks that were drawn again, as references of ROOT")
    parser.add_argument("--at-random", action="store_const", const="", help="merged images are a random draw")
    parser.add_argument("--export", metavar="FORMAT", help="an annotation tool's form of the data")
    parser.add_argument("--to", type=Path, metavar="PATH", help="the new folder, or file, of an import or export")


class _Import(argparse.Action):
    """One more file; the options after it are about it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        format, _, path = str(values).partition("=")
        if format not in FORMATS or not path:
            parser.error(f"--import {values}: must be FORMAT=PATH with FORMAT one of {_NAMES}")
        try:
            source = Source(Path(path).expanduser(), None, None, PLAIN)
        except RuntimeError:
            parser.error(f"--import {values}: no such user; write the folder out")
        namespace.imports = [*(namespace.imports or []), (format, source)]


class _OfImport(argparse.Action):
    """Of the import before it; where there is none, of the export."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if not namespace.imports:
            setattr(namespace, self.dest, values)
            return
        *before, (format, source) = namespace.imports
        if getattr(source, self.dest) is not None:
            parser.error(
                f"{option} {values}: is said twice of {source.path}; write it after the --import that it is of"
            )
        namespace.imports = [*before, (format, replace(source, **{self.dest: values}))]


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    commands = {"--import": arguments.imports, "--merge": arguments.merge, "--export": arguments.export}
    given_commands = [name for name, given in commands.items() if given]
    if len(given_commands) > 1 and "--merge" in given_commands:
        parser.error(f"{' and '.join(given_commands)}: are two commands; give one after the other")
    command = given_commands[0] if given_commands else ""
    for names, what in _APART[command]:
        for name in names:
            if (given := getattr(arguments, name)) is not None:
                parser.error(f"{f'--{_SPELLED.get(name, name)} {given}'.rstrip()}: {what}")
    if command == "--merge":
        _check_merge(parser, arguments)
        return
    if command and not arguments.to:
        parser.error(f"{command} needs --to PATH")
    if command != "--import" and not arguments.config:
        parser.error("the following arguments are required: --config")
    if command == "--import" and arguments.overrides and not arguments.config:
        parser.error(f"{arguments.overrides[0]}: with --import, keys need --config")


def _check_merge(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    format, _, path = arguments.merge.partition("=")
    if format not in FORMATS or not path:
        parser.error(f"--merge {arguments.merge}: must be FORMAT=PATH with FORMAT one of {_NAMES}")
    roots = [given for given in arguments.overrides if "=" not in given]
    if len(roots) != 1:
        parser.error("--merge needs the one data set that it changes: prepare ROOT --merge FORMAT=PATH")
    if len(arguments.overrides) > 1 and not arguments.config:
        parser.error("with --merge, keys need --config")


def merge_files(arguments: argparse.Namespace) -> int:
    """prepare ROOT --merge: masks that were drawn again become references, and say how many there are."""
    # Late: help must not wait for what a config needs.
    from distseg.config.load import load_config
    from distseg.data.config import DataConfig
    from distseg.data.merge import merge_references

    format, _, path = arguments.merge.partition("=")
    [root] = [given for given in arguments.overrides if "=" not in given]
    data = DataConfig(root=Path(root))
    if arguments.config:
        keys = [given for given in arguments.overrides if "=" in given]
        data = load_config(arguments.config, [f"data.root={json.dumps(root)}", *keys]).data
    role = None if FORMATS[format].all_roles else "reference"
    source = Source(Path(path).expanduser(), arguments.images, role, data.decoding)
    done = merge_references(data, format, source, arguments.unmarked, _shown, arguments.at_random is not None)
    say(f"{root}: {done.added} images have a reference now, {done.replaced} another one, {done.same} had it already")
    if done.added and arguments.at_random is None:
        say("those are marked as picked: right masks in the noisy stream; --at-random would make them clean images")
    if done.unannotated:
        say(f"left out, as nobody has annotated them: {done.unannotated}")
    if done.kept:
        say(f"the manifest before: {done.kept}")
    return 0


def import_files(arguments: argparse.Namespace) -> int:
    """prepare --import: write a data set, and say what there is and how it is read."""
    decoding = PLAIN
    if arguments.config:
        # Late: help must not wait for what a config needs.
        from distseg.config.load import load_config

        decoding = load_config(arguments.config, arguments.overrides).data.decoding
    sources = [(format, replace(source, decoding=decoding)) for format, source in arguments.imports]
    for _, source in sources:
        if source.role is not None:
            check_role(source.role)
    written = import_annotations(sources, arguments.to, arguments.unmarked, _shown)
    say("\n".join(_summary(written, arguments.to)))
    return 0


def export_samples(config: "Config", samples: Sequence[Sample], arguments: argparse.Namespace) -> None:
    """prepare --export: the samples, which have been checked, as an annotation tool reads them."""
    if arguments.export not in FORMATS:
        raise UserError(f"--export {arguments.export}: must be {_NAMES}")
    if arguments.role is not None:
        check_role(arguments.role)
    data = config.data
    done = export_annotations(
        samples,
        data.class_names,
        arguments.export,
        arguments.role,
        arguments.to,
        data.decoding,
        partial(read_mask, decoding=data.decoding),
        _shown,
    )
    say(f"{arguments.to}: {done.count} images" + (f"; {done.without} without such a mask" if done.without else ""))
    for lost in done.lost:
        say(f"{arguments.export} has no place for {lost}, which are not written")


def _summary(written: Imported, to: Path) -> list[str]:
    samples = written.samples
    splits = Counter(sample.split for sample in samples)
    counts = [f"{splits[split]} {split or 'whose split is to be drawn'}" for split in (*SPLITS, "") if splits[split]]
    references = sum(sample.reference is not None for sample in samples)
    annotators = {each.annotator for sample in samples for each in sample.annotations}
    annotations = sum(len(sample.annotations) for sample in samples)
    by = f" by {len(annotators)} annotators" if len(annotators) > 1 else ""
    lines = [
        f"{to}: {len(samples)} images ({', '.join(counts)}), {references} references, {annotations} annotations{by}",
        f"classes: {', '.join(written.classes)}",
    ]
    if written.unannotated:
        lines.append(f"left out, as nobody has annotated them: {written.unannotated}")
    if written.overlapping:
        lines.append(f"{written.overlapping:,} pixels are of objects of several classes; the last in the file has them")
    keys = [f"data.root={to}"]
    keys += [f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in written.keys.items()]
    return [*lines, f"its keys, which {to / 'classes.yaml'} has too: {shlex.join(keys)}"]


def _shown(items: Iterable[Item], count: int) -> Iterable[Item]:
    return tqdm(items, total=count, unit="image", mininterval=0.5 if sys.stderr.isatty() else 15)
