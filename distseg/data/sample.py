"""What a sample is, and what a problem with one is."""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    id: str
    split: str
    """train, val or test."""
    image: Path
    mask: Path
    """The true mask."""
    noisy_mask: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """What there is of image, mask and noisy_mask."""
        files = {"image": self.image, "mask": self.mask, "noisy_mask": self.noisy_mask}
        return {kind: path for kind, path in files.items() if path}


@dataclass(frozen=True)
class Problem:
    """Why a sample, or a row of the manifest, cannot be used."""

    id: str
    """Empty where a row has none."""
    file: str
    """The file, or the manifest's row."""
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def first_of(problems: list[Problem]) -> str:
    return str(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
