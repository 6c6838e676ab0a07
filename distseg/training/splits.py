"""The samples of a run: the clean and the noisy ones of its training split, and those that it is scored on."""

import math
from dataclasses import dataclass, replace
from typing import Any

from distseg.data.annotators import fuse_annotations
from distseg.data.checks import checked_samples
from distseg.data.config import DataConfig
from distseg.data.noise.write import read_noisy_masks, write_noisy_masks
from distseg.data.roster import keep_roster
from distseg.data.sample import Sample
from distseg.data.splits import split_clean, without_fold
from distseg.run_folder import RunFolder


@dataclass(frozen=True)
class Splits:
    clean: list[Sample]
    noisy: list[Sample]
    val: list[Sample]
    test: list[Sample]
    noise_rate: float
    """Mean share of wrong pixels in the noisy masks that are no references, NaN where their truth is not known."""

    @property
    def figures(self) -> dict[str, Any]:
        """What result.json says of them."""
        rate = None if math.isnan(self.noise_rate) else self.noise_rate
        return {"noise_rate": rate, "clean_count": len(self.clean)}


def prepare_splits(config: DataConfig, seed: int, folder: RunFolder, check: bool, needs_clean: bool = False) -> Splits:
    """Read and split the data, with its noisy masks in `folder`; UserError for what is wrong with it.

    check: whether to look into every file and to write what the run keeps, which one rank does for all, before the
    others. needs_clean: whether the method learns from clean images.
    """
    samples, digests = checked_samples(config, folder.path, check)
    by_split = {split: [s for s in samples if s.split == split] for split in ("train", "val", "test")}
    clean, noisy = split_clean(by_split["train"], config.clean_count, seed, needs_clean)
    if digests:
        keep_roster(samples, {sample.id for sample in clean}, digests, folder.data, folder.config.exists())
    if config.fold is not None:
        clean, noisy = without_fold(clean, noisy, config.fold, config.split_seed)
    if config.annotators in ("majority", "staple"):
        clean, noisy = (
            fuse_annotations(samples, config.annotators, folder.noisy_masks, config.decoding, check)
            for samples in (clean, noisy)
        )
    if config.noise.kind != "none":  # then their annotators are not those of the noisy images
        clean = [replace(sample, annotations=()) for sample in clean]
    noisy_masks = write_noisy_masks if check else read_noisy_masks
    picked = [sample for sample in noisy if sample.picked]
    rest = [sample for sample in noisy if not sample.picked]
    drawn, noise_rate = noisy_masks(rest, config.noise, folder.noisy_masks, config.decoding)
    noisy = sorted([*drawn, *picked], key=lambda sample: sample.id)
    return Splits(clean, noisy, by_split["val"], by_split["test"], noise_rate)
