"""Who is in which split, and who is clean.

Every random choice goes by a hash of (seed, id), so that it depends neither on the order in which a file system lists
the samples nor on the presence of others. The splits go by the data's own seed, the clean set by the run's.
"""

import logging
from dataclasses import replace

from distseg.data.config import DataConfig, FoldConfig
from distseg.data.sample import Sample
from distseg.data.seeding import stable_hash
from distseg.errors import UserError

_log = logging.getLogger(__name__)


def split_clean(
    samples: list[Sample], clean_count: int | None, seed: int, needs_clean: bool = False
) -> tuple[list[Sample], list[Sample]]:
    """(the clean training samples, the noisy ones), each sorted by id.

    Without `clean_count` the clean ones are those with a reference, as the data gives it, and the noisy ones those
    without. With it, a study: K of those with a reference are drawn, a smaller K a subset of a larger one's, and what
    is known of the others is kept from the training. Images that were picked by their looks are noisy ones either way,
    with the reference in place of their annotations: half of the loss of images of one kind would unbalance it. Raises
    UserError as `check_roles` does.
    """
    train = sorted((sample for sample in samples if sample.split == "train"), key=lambda s: s.id)
    check_roles(train, clean_count, needs_clean)
    known = [sample for sample in train if sample.represents]
    if clean_count is not None:
        known = sorted(known, key=lambda sample: stable_hash(seed, "clean", sample.id))[:clean_count]
    clean = {sample.id for sample in known}
    noisy = [replace(s, annotations=()) if s.picked else s for s in train if s.id not in clean]
    return [s for s in train if s.id in clean], noisy


def check_roles(samples: list[Sample], clean_count: int | None, needs_clean: bool) -> None:
    """Raises UserError where the noisy stream would have no image, not as many clean ones could be drawn, or there is
    none and the method needs some."""
    train = [sample for sample in samples if sample.split == "train"]
    known = sum(sample.represents for sample in train)
    if clean_count is None:
        if known == len(train):
            raise UserError(
                f"data: all {known} training images have a reference mask, and none has a cheap one alone. If experts "
                "drew these, set data.clean_count=K for a study in which K of them are known; if not, say so by "
                "folders, annotations/ beside references/, or by columns of manifest.csv, annotation beside reference"
            )
    elif clean_count > min(known, len(train) - 1):
        raise UserError(
            f"data.clean_count {clean_count}: {known} of the training split's {len(train)} images have a reference "
            "mask, and the noisy stream needs at least one image; set data.clean_count to at most "
            f"{max(min(known, len(train) - 1), 0)}"
        )
    if needs_clean and not known:
        picked = " that was drawn at random" if any(sample.picked for sample in train) else ""
        raise UserError(
            f"data: no training image has a reference mask{picked}, and the method learns from some; add experts' "
            "masks, name the annotator who is the expert (data.expert), or choose a method without "
            "(method.name=noisy_only)"
        )


def fold_of(sample: Sample, count: int, seed: int) -> int:
    """Which of `count` folds a sample is in, by a hash of (seed, group, or id without one) alone."""
    return stable_hash(seed, "fold", *_group(sample)) % count


def without_fold(
    clean: list[Sample], noisy: list[Sample], fold: FoldConfig, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """What a network learns from that is to judge the noisy images of a fold: nothing of them, nor of their groups.

    A clean image without a group, or of one with no noisy image, is in no fold. Raises UserError where no noisy image
    is left.
    """
    rest = [sample for sample in noisy if fold_of(sample, fold.count, seed) != fold.index]
    judged = {sample.group for sample in noisy if fold_of(sample, fold.count, seed) == fold.index} - {""}
    if not rest:
        raise UserError(
            f"data.fold: without fold {fold.index} of {fold.count} no noisy image is left; the images are of too few "
            "groups, take more folds or none"
        )
    return [sample for sample in clean if sample.group not in judged], rest


def draw_missing_splits(samples: list[Sample], brought: frozenset[str], config: DataConfig) -> list[Sample]:
    """`samples` with a test and a val split drawn from the training images with a reference, if the data brings none.
    Images that were picked by their looks are no sample of the others: they stay in training.

    A group's split follows from a hash of (`data.split_seed`, group, or id without one) and the fractions alone: no
    other sample and no bad file moves it, and all seeds of a study share their test images. So the sizes of the splits
    are the fractions only about, as of independent draws. One exception keeps small data usable: a split that would be
    empty takes a group of the largest one. What a group that is scored on has without a reference, or picked, is left
    out.
    """
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    wanted = {split: part for split, part in fractions.items() if split not in brought and part > 0}
    groups = {_group(sample) for sample in samples if sample.split == "train" and sample.represents}
    places = {group: stable_hash(config.split_seed, "split", group[1]) / 2**128 for group in groups}
    members: dict[str, list[tuple[str, str]]] = {"train": [], **{split: [] for split in wanted}}
    for group in sorted(places, key=lambda group: (places[group], group)):
        split = _split_at(places[group], config)
        members[split if split in wanted else "train"].append(group)
    for split in members:
        donor = max(members.values(), key=len)
        if not members[split] and len(donor) > 1:
            members[split].append(donor.pop(-1 if split == "train" else 0))
    drawn = {group: split for split, those in members.items() for group in those}
    placed = [replace(s, split=drawn.get(_group(s), "train")) if s.split == "train" else s for s in samples]
    unscorable = {
        new.id for old, new in zip(samples, placed, strict=True) if old.split != new.split and not new.represents
    }
    if unscorable:
        _log.warning(
            "data: left out %d images without a reference, or picked, of groups that are scored on", len(unscorable)
        )
    return [sample for sample in placed if sample.id not in unscorable]


def _group(sample: Sample) -> tuple[str, str]:
    return ("group", sample.group) if sample.group else ("id", sample.id)


def _split_at(place: float, config: DataConfig) -> str:
    """The split of a hash in [0, 1): test has the lowest, val the next and train the others."""
    if place < config.test_fraction:
        return "test"
    return "val" if place < config.test_fraction + config.val_fraction else "train"
