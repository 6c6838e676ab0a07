"""Who is in which split, and who is clean.

Every random choice orders the samples by a hash of (seed, id), so that it depends neither on the order in which a file
system lists them nor on the presence of other samples.
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
    train = sorted(
        (sample for sample in samples if sample.split == "train"), key=lambda s: stable_hash(seed, "clean", s.id)
    )
    if clean_count >= len(train):
        raise UserError(
            f"data.clean_count {clean_count}: the training split has {len(train)} images and the noisy stream needs at "
            f"least one; set data.clean_count to at most {max(len(train) - 1, 0)}"
        )
    clean, noisy = train[:clean_count], train[clean_count:]
    return sorted(clean, key=lambda s: s.id), sorted(noisy, key=lambda s: s.id)


def draw_missing_splits(samples: list[Sample], present: frozenset[str], config: DataConfig, seed: int) -> list[Sample]:
    train = sorted((s for s in samples if s.split == "train"), key=lambda s: stable_hash(seed, "split", s.id))
    drawn: dict[str, str] = {}
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split not in present:
            first = len(drawn)
            drawn |= {sample.id: split for sample in train[first : first + round(fraction * len(train))]}
    return [replace(s, split=drawn[s.id]) if s.split == "train" and s.id in drawn else s for s in samples]
