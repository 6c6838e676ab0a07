import gc
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distseg.data.batch import Batch
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.reader import PixelReader, read_ahead, taken_by_a_thread
from distseg.data.splits import split_clean
from distseg.data.streams import Stream, evaluation_batches
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec
from distseg.errors import BadFileError, UserError

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(
    flip=True, rotate=40, scale=(0.8, 1.2), brightness=0.2, elastic=0.05, hairs=4, blur=1.0, grain=0.05
)


@pytest.fixture
def config(make_dataset) -> DataConfig:
    root = make_dataset(train=13, val=3, test=5, noisy=True)
    return DataConfig(root=root, image_size=16, pipeline="torch", augment=AUGMENT)


@pytest.fixture
def open_stream(config):
    opened = []

    def open_(samples=None, shard=None, batch_size=4, accumulation=1, name="noisy", seed=0, config=config):
        samples = split_clean(read_samples(config), 3, 0)[1] if samples is None else samples
        shard = shard or ShardSpec()
        opened.append(Stream(samples, "noisy", name, config, seed, shard, batch_size, accumulation, CPU))
        return opened[-1]

    yield open_
    for stream in opened:
        stream.close()


def fingerprint(batch: Batch) -> str:
    digest = hashlib.sha256(repr(batch.ids).encode())
    for tensor in (batch.images, batch.masks, batch.true_masks):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def assert_same(actual: Batch, expected: Batch) -> None:
    assert fingerprint(actual) == fingerprint(expected)


def rows(batch: Batch) -> set[tuple]:
    """What each sample of the batch looks like, transform included, to compare batches as sets."""
    return {
        (id, image.numpy().tobytes(), mask.numpy().tobytes())
        for id, image, mask in zip(batch.ids, batch.images, batch.masks, strict=True)
    }


# --- order ------------------------------------------------------------------------------------------------------------


def test_every_sample_once_per_epoch_and_epochs_differ(open_stream):
    stream = open_stream()  # 10 noisy samples in batches of 4: epochs end inside batches
    ids = [id for step in range(15) for id in stream.batch(step, 0).ids]
    epochs = [ids[first : first + 10] for first in range(0, 60, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_may_be_larger_than_the_set(open_stream, config):
    clean, _ = split_clean(read_samples(config), 3, 0)
    batch = open_stream(clean, batch_size=8).batch(0, 0)
    assert sorted(Counter(batch.ids).values()) == [2, 3, 3]
    assert len(rows(batch)) == 8  # each occurrence under a transform of its own


@pytest.mark.parametrize("count", [10, 7, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_over_all_ranks(open_stream, config, world_size, count):
    samples = split_clean(read_samples(config), 3, 0)[1][:count]
    ranks = [open_stream(samples, ShardSpec(rank, world_size), batch_size=3) for rank in range(world_size)]
    steps = -(-2 * count // (3 * world_size)) + 1
    ids = [id for step in range(steps) for rank in ranks for id in rank.batch(step, 0).ids]
    epochs = [ids[first : first + count] for first in range(0, len(ids) - count + 1, count)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == [sample.id for sample in samples] for epoch in epochs)


def test_order_depends_on_seed_and_name(open_stream):
    expected = open_stream().batch(0, 0)
    assert open_stream(seed=1).batch(0, 0).ids != expected.ids
    assert open_stream(name="clean").batch(0, 0).ids != expected.ids


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (3, 1), (1, 2), (1, 3), (2, 3), (6, 1)])
def test_ranks_and_accumulation_cut_one_global_batch(open_stream, world_size, accumulation):
    whole = open_stream(batch_size=6)
    batch_size = 6 // (world_size * accumulation)
    parts = [
        open_stream(shard=ShardSpec(rank, world_size), batch_size=batch_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for step in (0, 1, 5):
        expected = rows(whole.batch(step, 0))
        actual = [rows(part.batch(step, micro)) for part in parts for micro in range(accumulation)]
        assert set().union(*actual) == expected
        assert sum(map(len, actual)) == len(expected) == 6


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_random_access_is_sequential_access_bit_for_bit(open_stream, config, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = config.model_copy(update={"pipeline": pipeline})
    sequential = open_stream(config=config, accumulation=2)
    batches = {(step, micro): sequential.batch(step, micro) for step in range(5) for micro in range(2)}
    jumping = open_stream(config=config, accumulation=2)
    for step, micro in [(3, 1), (4, 0), (0, 0), (0, 0), (2, 1)]:
        assert_same(jumping.batch(step, micro), batches[step, micro])
    jumping.close()
    assert_same(jumping.batch(3, 0), batches[3, 0])
    assert len({fingerprint(batch) for batch in batches.values()}) == 10


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_resuming_at_any_step_gives_the_remaining_batches(open_stream, config, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = config.model_copy(update={"pipeline": pipeline})
    whole = open_stream(config=config, batch_size=3)  # 10 samples: an epoch ends in the fourth batch
    expected = [fingerprint(whole.batch(step, 0)) for step in range(6)]
    for first in range(1, 5):
        resumed = open_stream(config=config, batch_size=3)
        assert [fingerprint(resumed.batch(step, 0)) for step in range(first, 6)] == expected[first:]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_resuming_on_other_ranks_gives_the_remaining_samples(open_stream, before, after):
    def remaining(world_size: int, first: int) -> list[set[tuple]]:
        ranks = [open_stream(shard=ShardSpec(r, world_size), batch_size=6 // world_size) for r in range(world_size)]
        return [set().union(*(rows(rank.batch(step, 0)) for rank in ranks)) for step in range(first, 4)]

    expected = remaining(before, 0)
    for first in range(4):
        assert remaining(after, first) == expected[first:]


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_two_streams_are_prefetched_side_by_side(open_stream, config, pipeline, monkeypatch):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = config.model_copy(update={"pipeline": pipeline})
    clean, noisy = split_clean(read_samples(config), 3, 0)
    named = {"noisy": noisy, "clean": clean}
    streams = [open_stream(samples, name=name, config=config, batch_size=2) for name, samples in named.items()]
    read, both_are_reading = {"noisy": 0, "clean": 0}, threading.Barrier(2)
    of_clean = {sample.image for sample in clean}

    def read_image(reader: PixelReader, path: Path):
        # Each stream's third and fourth image wait here for the other stream's: one after the other, they would wait
        # in vain.
        name = "clean" if path in of_clean else "noisy"
        read[name] += 1
        if read[name] in (3, 4):
            both_are_reading.wait(timeout=100)
        return own(reader, path)

    own = PixelReader.image
    monkeypatch.setattr(PixelReader, "image", read_image)
    with ThreadPoolExecutor(2) as pool:  # neither may hold up the other's start
        batches = list(pool.map(lambda stream: stream.batch(0, 0), streams))
    for stream, first in zip(streams, batches, strict=True):
        assert first.ids != stream.batch(1, 0).ids
    deadline = time.monotonic() + 100
    while min(read.values()) <= 4:
        assert time.monotonic() < deadline, "nothing is read ahead"
        time.sleep(0.01)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_closing_stops_every_thread(open_stream, config, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    before = threading.active_count()
    stream = open_stream(config=config.model_copy(update={"pipeline": pipeline}))
    expected = stream.batch(0, 0)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() <= before
    assert_same(stream.batch(0, 0), expected)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_loading_starts_no_teams_of_openmp_threads(open_stream, config, pipeline):
    """Teams wait for the next operator by spinning, which took an eighth of two cores from decoding."""
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = config.model_copy(update={"pipeline": pipeline, "image_size": 256, "memory": 0})

    def name(task: Path) -> str:
        try:
            return (task / "comm").read_text()
        except OSError:  # it ended meanwhile
            return ""

    def foreign_threads() -> int:
        names = [name(task) for task in Path("/proc/self/task").iterdir()]
        return sum(bool(name) and not name.startswith("[DALI]") for name in names) - threading.active_count()

    stream = open_stream(config=config, batch_size=8)
    before = foreign_threads()
    for step in range(3):
        stream.batch(step, 0)
    assert foreign_threads() <= before


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_work_comes_out_in_order_however_a_batch_is_divided(threads):
    batches = [range(7), range(0), range(7, 8), range(8, 12)]
    done = list(read_ahead(iter(batches), lambda number: -number, 7, threads))
    assert done == [(batch, [-number for number in batch]) for batch in batches]


def test_what_work_raises_comes_out_at_its_batch():
    ahead = read_ahead(iter([range(1, 5), range(4)]), lambda number: 12 // number, 4, 2)
    assert next(ahead)[1] == [12, 6, 4, 3]
    with pytest.raises(ZeroDivisionError):
        next(ahead)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_batches_that_nobody_closed_are_collected_by_their_own_thread_too():
    dropped, collected = threading.Event(), threading.Event()

    def numbers():
        yield 0
        dropped.wait(60)
        gc.collect()  # in the thread that takes these
        collected.set()
        yield 1

    before = threading.active_count()
    circle = {"batches": taken_by_a_thread(numbers())}
    circle["itself"] = circle
    assert next(circle["batches"]) == 0
    gc.disable()
    try:
        del circle
        dropped.set()
        assert collected.wait(60)
    finally:
        gc.enable()
    deadline = time.monotonic() + 60
    while threading.active_count() > before:
        assert time.monotonic() < deadline, "the thread goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_file_that_breaks_later_ends_the_stream_by_name(open_stream, config, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    stream = open_stream(config=config.model_copy(update={"pipeline": pipeline, "memory": 0}), batch_size=1)
    first = stream.batch(0, 0)
    samples = {sample.id: sample for sample in read_samples(config)}
    for id in samples.keys() - {first.ids[0]}:
        content = samples[id].image.read_bytes()
        aside = samples[id].image.with_suffix(".part")  # the loader reads meanwhile
        aside.write_bytes(content[: len(content) // 2])
        aside.replace(samples[id].image)
    with pytest.raises(BadFileError, match=r"images/S\d+\.png: cannot be decoded") as raised:
        for step in range(1, 12):
            stream.batch(step, 0)
    assert "\n" not in str(raised.value)


def test_streams_say_how_long_they_were_waited_for(open_stream, monkeypatch):
    stream = open_stream(batch_size=1)
    own = PixelReader.image
    monkeypatch.setattr(PixelReader, "image", lambda *arguments: time.sleep(0.1) or own(*arguments))
    stream.batch(0, 0)
    assert 0.1 <= stream.waited < 60


def test_sequential_access_opens_the_loader_once(open_stream, monkeypatch):
    stream, opened = open_stream(), []
    load_batches = stream._load_batches
    monkeypatch.setattr(stream, "_load_batches", lambda *arguments: opened.append(1) or load_batches(*arguments))
    for step in (0, 1, 2, 3, 7, 8):
        stream.batch(step, 0)
    assert len(opened) == 2


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_two_processes_see_the_same_bits(open_stream, config, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    config = config.model_copy(update={"pipeline": pipeline})
    expected = [fingerprint(open_stream(config=config).batch(step, 0)) for step in (0, 3)]
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_streams import *\n"
        "config = DataConfig.model_validate_json(sys.argv[1])\n"
        "noisy = split_clean(read_samples(config), 3, 0)[1]\n"
        "stream = Stream(noisy, 'noisy', 'noisy', config, 0, ShardSpec(), 4, 1, CPU)\n"
        "print(*[fingerprint(stream.batch(step, 0)) for step in (0, 3)])\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", program, config.model_dump_json(), str(here), str(here.parents[1])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == expected


# --- leaks ------------------------------------------------------------------------------------------------------------


def test_training_never_sees_an_evaluation_image(open_stream, config):
    samples = read_samples(config)
    clean, noisy = split_clean(samples, 3, 0)
    seen = {
        name: {id for step in range(12) for id in open_stream(part, name=name).batch(step, 0).ids}
        for name, part in (("clean", clean), ("noisy", noisy))
    }
    evaluated = {
        id
        for split in ("val", "test")
        for batch in evaluation_batches([s for s in samples if s.split == split], config, ShardSpec(), 4, CPU)
        for id in batch.ids
    }
    assert (len(seen["clean"]), len(seen["noisy"]), len(evaluated)) == (3, 10, 8)
    assert not (seen["clean"] & seen["noisy"] or (seen["clean"] | seen["noisy"]) & evaluated)


def test_noisy_stream_learns_from_noisy_masks_and_knows_the_true_ones(open_stream, config):
    plain = config.model_copy(update={"augment": AugmentConfig(), "image_size": 32})  # the files' own
    batch = open_stream(config=plain).batch(0, 0)
    assert torch.all(batch.masks == 1 - batch.true_masks)  # the data set's noisy masks are the complements


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_evaluation_covers_each_sample_once_in_order_without_augmentation(config, world_size):
    samples = read_samples(config)
    parts = [
        list(evaluation_batches(samples, config, ShardSpec(rank, world_size), 4, CPU)) for rank in range(world_size)
    ]
    batches = [batch for part in parts for batch in part]
    assert [id for batch in batches for id in batch.ids] == [sample.id for sample in samples]
    assert all(batch.masks is batch.true_masks for batch in batches)
    whole = torch.cat([batch.images for batch in evaluation_batches(samples, config, ShardSpec(), 7, CPU)])
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), whole, rtol=0, atol=0)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_empty_stream_is_refused(open_stream):
    with pytest.raises(UserError, match=r"the clean stream has no images: data\.clean_count"):
        open_stream([], name="clean")


@pytest.mark.parametrize(("pipeline", "fails"), [("dali", True), ("auto", False), ("torch", False)])
def test_without_dali(open_stream, config, monkeypatch, pipeline, fails):
    monkeypatch.setitem(sys.modules, "distseg.data.dali", None)  # makes the import fail
    monkeypatch.delattr("distseg.data.dali", raising=False)
    config = config.model_copy(update={"pipeline": pipeline})
    if fails:
        with pytest.raises(UserError, match="pip install 'nvidia-dali-cuda130"):
            open_stream(config=config)
    else:
        assert open_stream(config=config).batch(0, 0).ids
