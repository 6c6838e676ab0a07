"""Folds: whole groups, the same whatever else is there, and nothing of a fold is learned from."""

from pathlib import Path

import pytest

from distseg.data.config import DataConfig, FoldConfig
from distseg.data.sample import Sample
from distseg.data.splits import fold_of, without_fold
from distseg.errors import UserError


def sample(name: str, group: str = "") -> Sample:
    return Sample(name, "train", Path(f"{name}.png"), group=group)


NOISY = [sample(f"n{number}", f"g{number // 3}") for number in range(60)] + [sample(f"s{n}") for n in range(40)]


def test_every_image_is_in_one_fold_and_groups_in_one_too() -> None:
    left_out = []
    for index in range(4):
        _, rest = without_fold([], NOISY, FoldConfig(count=4, index=index), 0)
        out = [each for each in NOISY if each not in rest]
        left_out += out
        assert not {each.group for each in out if each.group} & {each.group for each in rest if each.group}
        assert 10 < len(out) < 45
    assert sorted(each.id for each in left_out) == sorted(each.id for each in NOISY)


def test_a_fold_depends_on_seed_and_group_alone() -> None:
    assert fold_of(sample("a", "g"), 5, 1) == fold_of(sample("b", "g"), 5, 1)
    assert len({fold_of(sample("a", "g"), 1000, seed) for seed in range(20)}) > 10
    assert fold_of(sample("g"), 1000, 0) != fold_of(sample("a", "g"), 1000, 0)  # an id is no group


def test_a_clean_image_of_a_judged_group_is_left_out_too() -> None:
    index = fold_of(sample("n0", "g0"), 4, 0)
    clean = [sample("c0", "g0"), sample("c1", "elsewhere"), sample("c2")]
    kept, _ = without_fold(clean, NOISY, FoldConfig(count=4, index=index), 0)
    assert [each.id for each in kept] == ["c1", "c2"]


def test_what_cannot_be_a_fold_is_named() -> None:
    one_group = [sample(f"n{number}", "g") for number in range(5)]
    with pytest.raises(UserError, match="no noisy image is left"):
        without_fold([], one_group, FoldConfig(count=3, index=fold_of(one_group[0], 3, 0)), 0)
    with pytest.raises(ValueError, match="there are the folds 0 to 2"):
        DataConfig(root=Path("x"), fold={"count": 3, "index": 3})
