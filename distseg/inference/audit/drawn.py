"""The masks that are audited: those that a run has learned from as noisy ones, or all of another data set."""

from dataclasses import dataclass
from pathlib import Path

from distseg.config.schema import Config
from distseg.data.checks import usable_samples
from distseg.data.noise.write import read_noisy_masks
from distseg.data.sample import FileKey, Sample
from distseg.data.splits import split_clean
from distseg.data.survey import read_samples
from distseg.errors import UserError
from distseg.run_folder import RunFolder


@dataclass(frozen=True)
class Drawn:
    """An image with the masks that are in doubt."""

    sample: Sample
    masks: dict[str, Path]
    """By annotator; empty for one without a name."""
    key: FileKey
    """What they are in the data: annotation or reference."""

    @property
    def truth(self) -> Path | None:
        """The reference, where it is known and not itself in doubt."""
        return self.sample.reference if self.key == "annotation" else None

    @property
    def group(self) -> str:
        """One without a group is its own."""
        return self.sample.group or f"\0{self.sample.id}"


def drawn_in_training(config: Config, run: Path) -> tuple[list[Drawn], list[Sample]]:
    """Of the data that a run was trained on: the noisy stream's images with each annotator's mask as the run has seen
    it, but for those whose mask is a reference, and the validation images. Both are sorted by id; files are not opened.
    Raises UserError."""
    data = config.data
    samples = usable_samples(data, run, check=False)
    _, noisy = split_clean([sample for sample in samples if sample.split == "train"], data.clean_count, config.seed)
    noisy = [sample for sample in noisy if not sample.picked]
    if data.noise.kind != "none":
        noisy, _ = read_noisy_masks(noisy, data.noise, RunFolder(run).noisy_masks, data.decoding)
    return [_drawn(sample) for sample in noisy], [sample for sample in samples if sample.split == "val"]


def drawn_elsewhere(config: Config) -> list[Drawn]:
    """Of `config.data.root`, data that the network has not seen: every annotation, or where there is none at all every
    reference, of all splits. Raises UserError."""
    samples = read_samples(config.data)
    annotated = [sample for sample in samples if sample.annotations]
    drawn = [_drawn(sample) for sample in annotated or samples]
    if not drawn:
        raise UserError(f"{config.data.root}: holds no mask to be audited")
    return drawn


def _drawn(sample: Sample) -> Drawn:
    if not sample.annotations:
        return Drawn(sample, {"": sample.truth}, "reference")
    return Drawn(sample, {each.annotator: each.mask for each in sample.annotations}, "annotation")
