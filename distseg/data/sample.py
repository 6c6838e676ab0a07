"""What a sample is, and what a problem with one is."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from distseg.text import for_terminal

FileKey = str
"""`image`, `reference`, `annotation` (of an annotator without a name) or `annotation:NAME`."""
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Annotation:
    """A cheap mask: what somebody drew who may be wrong."""

    annotator: str
    """Empty where only one is known, without a name."""
    mask: Path

    @property
    def key(self) -> FileKey:
        return f"annotation:{self.annotator}" if self.annotator else "annotation"


@dataclass(frozen=True)
class Sample:
    """An image and what is known of its mask: a reference that counts as the truth, annotations that may be wrong."""

    id: str
    split: str
    """train, val or test."""
    image: Path
    reference: Path | None = None
    """The expert's mask; None where nobody has drawn one."""
    annotations: tuple[Annotation, ...] = ()
    """By annotator, sorted."""
    group: str = ""
    """Patient, lesion or video, which never spans two splits; empty for a group of its own."""
    picked: bool = False
    """Whether the reference was drawn because of what the image or its mask looked like, and so says nothing of other
    images. Such an image stays in the noisy stream, with the reference as its mask."""

    @property
    def files(self) -> dict[FileKey, Path]:
        """The image first, then the masks."""
        files = {"image": self.image}
        if self.reference is not None:
            files["reference"] = self.reference
        return files | {each.key: each.mask for each in self.annotations}

    @property
    def represents(self) -> bool:
        """Whether there is a reference, and not because of its looks: for the clean stream, and to score on."""
        return self.reference is not None and not self.picked

    @property
    def truth(self) -> Path:
        """The reference, where there must be one. Raises ValueError where there is none."""
        if self.reference is None:
            raise ValueError(f"{self.id} has no reference mask")
        return self.reference


@dataclass(frozen=True)
class Problem:
    """Why a sample, or a row of the manifest, cannot be used."""

    id: str
    """Empty where a row has none."""
    file: str
    """The file, or the manifest's row."""
    reason: str

    def __str__(self) -> str:
        return for_terminal(f"{self.file}: {self.reason}")


def first_of(problems: list[Problem]) -> str:
    return str(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


_LONGEST_ID = 200
"""Bytes of UTF-8: file systems allow names of 255, and files are named by an id and an ending."""


def fault_of_id(id: str) -> str | None:
    """What is wrong with an id, or None. The one rule for the ids of every layout.

    An id names files that are written, is a cell of tables that spreadsheets open, and is printed on terminals.
    """
    shown = repr(id if len(id) <= _LONGEST_ID else id[:_LONGEST_ID] + "…")
    if not id or not id.isprintable() or any(unicodedata.category(letter) == "Cs" for letter in id):
        return f"id {shown} must be of printable letters"
    if len(id.encode()) > _LONGEST_ID:
        return f"id {shown} must have at most {_LONGEST_ID} bytes"
    if set(id) & set('/\\:*?"<>|'):
        return f'id {shown} must not hold any of / \\ : * ? " < > |, for files are named by it'
    if id[0] in "=+-@. " or id[-1] in ". ":
        return f"id {shown} must begin with none of = + - @ . and end with no '.', and have no blank at its ends"
    return None


def leaves_root(path: str) -> bool:
    """Whether a path of a table is absolute or climbs out of its folder, by the rules of any system."""
    return any(".." in kind(path).parts or kind(path).anchor for kind in (PurePosixPath, PureWindowsPath))
