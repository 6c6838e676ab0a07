import pytest
import torch

from distseg.data.batch import Batch
from distseg.distributed.ranks import ShardSpec
from distseg.evaluation.evaluator import evaluate

COUNT, SIDE = 11, 5
IMAGES = torch.randn(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
TRUTH = torch.randint(0, 2, (COUNT, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
TRUTH[2, 0] = 255


def first_channel(images):
    return images[:, :1]


def batches_of(rows):
    for positions in rows:
        images, truth = IMAGES[positions.start : positions.stop], TRUTH[positions.start : positions.stop]
        yield Batch(images, torch.zeros_like(truth), truth, tuple(map(str, positions)))


def evaluate_on(world_size: int, predict=first_channel, batch_size: int = 3):
    """Every rank's result; each rank is run once to learn its part of the sum, and once to be handed the sum."""
    parts = []

    def keep(table):
        parts.append(table)
        return table + 0

    def run(rank, sum_over_ranks):
        rows = ShardSpec(rank, world_size).evaluation_batches(COUNT, batch_size)
        return evaluate(predict, batches_of(rows), rows, COUNT, sum_over_ranks)

    for rank in range(world_size):
        try:
            run(rank, keep)
        except (ValueError, FloatingPointError):  # the part alone does not cover the split
            continue
    return [run(rank, lambda _: torch.stack(parts).sum(dim=0)) for rank in range(world_size)]


def by_hand(foreground):
    return [
        [
            sum(bool(p) == hit and bool(t) == truth and t != 255 for p, t in zip(f.flatten(), y.flatten(), strict=True))
            for hit, truth in ((True, True), (True, False), (False, True), (False, False))
        ]
        for f, y in zip(foreground, TRUTH, strict=True)
    ]


def test_counts_by_hand_for_one_channel():
    (actual,) = evaluate_on(world_size=1)

    assert actual.tolist() == by_hand(IMAGES[:, 0] > 0)


def test_counts_by_hand_for_classes():
    (actual,) = evaluate_on(world_size=1, predict=lambda images: images)

    assert actual.tolist() == by_hand((IMAGES[:, 0] < IMAGES[:, 1]) | (IMAGES[:, 0] < IMAGES[:, 2]))


@pytest.mark.parametrize("world_size", [2, 3, 4, 13])
def test_many_ranks_count_what_one_rank_counts(world_size):
    (expected,) = evaluate_on(world_size=1, batch_size=COUNT)

    for actual in evaluate_on(world_size):
        assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_raises_on_every_rank(value):
    def diverged(images):
        logits = images[:, :1].clone()
        logits[(images == IMAGES[7]).flatten(1).all(dim=1), 0, 1, 2] = value
        return logits

    rows = ShardSpec().evaluation_batches(COUNT, 3)
    tables = []
    with pytest.raises(FloatingPointError, match=r"not finite on 1 of 11 images, the first is number 7"):
        evaluate(diverged, batches_of(rows), rows, COUNT, lambda table: tables.append(table) or table)

    # A rank whose own images were fine learns it from the sum.
    rows = ShardSpec(0, 2).evaluation_batches(COUNT, 3)
    with pytest.raises(FloatingPointError):
        evaluate(first_channel, batches_of(rows), rows, COUNT, lambda _: tables[0])


def test_images_left_out_or_counted_twice_raise():
    rows = [range(0, 4), range(4, 8)]
    with pytest.raises(ValueError, match="3 of 11 images"):
        evaluate(first_channel, batches_of(rows), rows, COUNT, lambda table: table)
    rows = [range(0, 6), range(5, 11)]
    with pytest.raises(ValueError, match="1 of 11 images"):
        evaluate(first_channel, batches_of(rows), rows, COUNT, lambda table: table)


def test_a_batch_of_another_size_than_its_rows_raises():
    with pytest.raises(ValueError, match="batch of 1 images"):
        evaluate(first_channel, batches_of([range(0, 1)]), [range(0, 3)], COUNT, lambda table: table)


def test_predicts_without_autograd_and_leaves_what_the_loader_makes_usable_in_training():
    modes, made = [], []

    def predict(images):
        modes.append(torch.is_inference_mode_enabled())
        return images[:, :1]

    def batches():
        made.append(torch.ones(3))
        yield from batches_of([range(0, COUNT)])

    evaluate(predict, batches(), [range(0, COUNT)], COUNT, lambda table: table)

    assert modes == [True]
    assert not made[0].is_inference()
