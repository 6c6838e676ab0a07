"""Who is in which split, and who is clean.

Every random choice goes by a hash of (seed, id), so that it depends neither on the order in which a file system lists
the samples nor on the presence of others. The splits go by the data's own seed, the clean set by the run's.
"""

from dataclasses import replace

from distseg.data.config import DataConfig
from distseg.data.sample import Sample
from distseg.data.seeding import stable_hash
from distseg.errors import UserError


def split_clean(samples: list[Sample], clean_count: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the K clean training samples, the others), each sorted by id; a smaller K picks a subset of a larger one's.

    Raises UserError where K would leave the noisy stream without an image.
    """
    check_clean_count(samples, clean_count)
    train = sorted(
        (sample for sample in samples if sample.split == "train"), key=lambda s: stable_hash(seed, "clean", s.id)
    )
    clean, noisy = train[:clean_count], train[clean_count:]
    return sorted(clean, key=lambda s: s.id), sorted(noisy, key=lambda s: s.id)


def check_clean_count(samples: list[Sample], clean_count: int) -> None:
    """Raises UserError where K would leave the noisy stream without an image."""
    count = sum(sample.split == "train" for sample in samples)
    if clean_count >= count:
        raise UserError(
            f"data.clean_count {clean_count}: the training split has {count} images and the noisy stream needs at "
            f"least one; set data.clean_count to at most {max(count - 1, 0)}"
        )


def draw_missing_splits(samples: list[Sample], brought: frozenset[str], config: DataConfig) -> list[Sample]:
    """`samples` with a test and a val split drawn from the training images where the data brings none.

    A sample's split follows from a hash of (`data.split_seed`, id) and the fractions alone: no other sample and no bad
    file moves it, and all seeds of a study share their test images. So the sizes of the splits are the fractions only
    about, as of independent draws. One exception keeps small data usable: a split that would be empty takes an
    image of the largest one.
    """
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    wanted = {split: part for split, part in fractions.items() if split not in brought and part > 0}
    places = {s.id: stable_hash(config.split_seed, "split", s.id) / 2**128 for s in samples if s.split == "train"}
    members: dict[str, list[str]] = {"train": [], **{split: [] for split in wanted}}
    for id in sorted(places, key=lambda id: places[id]):
        split = _split_at(places[id], config)
        members[split if split in wanted else "train"].append(id)
    for split in members:
        donor = max(members.values(), key=len)
        if not members[split] and len(donor) > 1:
            members[split].append(donor.pop(-1 if split == "train" else 0))
    drawn = {id: split for split, ids in members.items() for id in ids}
    return [replace(s, split=drawn[s.id]) if s.split == "train" else s for s in samples]


def _split_at(place: float, config: DataConfig) -> str:
    """The split of a hash in [0, 1): test has the lowest, val the next and train the others."""
    if place < config.test_fraction:
        return "test"
    return "val" if place < config.test_fraction + config.val_fraction else "train"
