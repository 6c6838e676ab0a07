"""The cache on disk: the same bits as the originals, or one line that refuses it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from distseg.data import cache as cache_module
from distseg.data.cache import open_cache, write_cache
from distseg.data.checks import usable_samples
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.decode import Decoding
from distseg.data.geometry import Frame
from distseg.data.sample import Problem
from distseg.data.streams import Stream, evaluation_batches
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec
from distseg.errors import BadFileError, UserError

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(flip=True, rotate=40, brightness=0.2, elastic=0.05)


@pytest.fixture(autouse=True)
def each_test_is_a_process_of_its_own(monkeypatch):
    cache_module._open.cache_clear()
    monkeypatch.setattr(cache_module, "SHARD_SIZE", 5)


@pytest.fixture
def cached(make_dataset, tmp_path) -> DataConfig:
    """A data set of 13 samples of which one has no noisy mask, and its cache of three shards."""
    root = make_dataset(size=50, noisy=True)
    lines = (root / "manifest.csv").read_text().splitlines()
    lines[3] = lines[3].rsplit(",", 1)[0] + ","
    (root / "manifest.csv").write_text("\n".join(lines))
    config = DataConfig(root=root, clean_count=1, image_size=24, cache=tmp_path / "cache", augment=AUGMENT)
    assert write(config) == (3, 0)
    return config


def write(config: DataConfig) -> tuple[int, int]:
    return write_cache(read_samples(config), [], config, config.cache, threads=2)


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_batches_are_those_of_the_originals_bit_for_bit(cached, pipeline, monkeypatch):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    cached = cached.model_copy(update={"pipeline": pipeline})
    plain = cached.model_copy(update={"cache": None})
    samples = read_samples(cached)

    def batches(config: DataConfig) -> list:
        stream = Stream(samples, "noisy", "noisy", config, 0, ShardSpec(), 4, 1, CPU)
        training = [stream.batch(step, 0) for step in range(5)]
        stream.close()
        return training + list(evaluation_batches(samples, config, ShardSpec(), 4, CPU))

    expected = batches(plain)
    monkeypatch.setattr("distseg.data.reader.read_resized_image", None)  # would be called for what the cache lacks
    monkeypatch.setattr("distseg.data.reader.read_resized_mask", None)
    for actual, original in zip(batches(cached), expected, strict=True):
        assert actual.ids == original.ids
        for name in ("images", "masks", "true_masks"):
            assert torch.equal(getattr(actual, name), getattr(original, name))


def test_a_file_that_is_not_in_the_cache_is_decoded(cached, tmp_path):
    sample = read_samples(cached)[0]
    assert open_cache(cached).find(tmp_path / "noisy_masks" / "S000.png") is None
    assert open_cache(cached).find(sample.image).shape == (24, 24, 3)


def test_a_stopped_run_is_taken_up_where_it_was(cached, monkeypatch):
    shutil.rmtree(cached.cache)
    read, calls = cache_module._READERS["images"], []

    def fail_at_the_eleventh(path: Path, frame: Frame, decoding: Decoding) -> np.ndarray:
        calls.append(path)
        if len(calls) > 10:
            raise BadFileError("stopped")
        return read(path, frame, decoding)

    monkeypatch.setitem(cache_module._READERS, "images", fail_at_the_eleventh)
    with pytest.raises(BadFileError, match="stopped"):
        write(cached)
    with pytest.raises(UserError, match="is no finished cache"):
        open_cache(cached)
    monkeypatch.setitem(cache_module._READERS, "images", read)
    (cached.cache / ".shard_00002_images.npy.1.part").write_bytes(b"half a fi")
    assert write(cached) == (1, 2)
    assert open_cache(cached)
    assert not list(cached.cache.glob(".*"))


def test_only_what_has_changed_is_written_anew(cached):
    assert write(cached) == (0, 3)
    damaged = cached.cache / "shard_00001_masks.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    os.utime(cached.root / "images" / "S012.png", ns=(1, 1))
    assert write(cached) == (2, 1)
    assert open_cache(cached)


def test_a_finished_cache_of_other_keys_is_kept(cached):
    smaller = cached.model_copy(update={"image_size": 16})
    with pytest.raises(UserError, match=r"was made at data.image_size 24, not 16; choose an empty folder$"):
        write(smaller)
    assert write(cached) == (0, 3)
    (cached.cache / "index.json").unlink()  # unfinished, it is of no use to any run
    assert write(smaller) == (3, 0)
    assert open_cache(smaller).find(read_samples(cached)[0].truth).shape == (16, 16)


def test_shards_that_are_no_longer_needed_go(cached):
    write_cache(read_samples(cached)[:4], [], cached, cached.cache, threads=1)
    assert {path.name.split(".")[0] for path in cached.cache.iterdir()} == {
        "index", "shard_00000", "shard_00000_images", "shard_00000_masks"
    }  # fmt: skip


def repaint(config: DataConfig) -> None:
    assert cv2.imwrite(str(config.root / "masks" / "S002.png"), np.zeros((50, 50), np.uint8))


def flip_a_bit(config: DataConfig) -> None:
    path = config.cache / "shard_00001_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_index(**changes):
    def change(config: DataConfig) -> None:
        path = config.cache / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def craft(change, kind: str = "images"):
    """Replace an array of the first shard by another, digest and all, as somebody who shares a cache could."""

    def spoil(config: DataConfig) -> None:
        path = config.cache / f"shard_00000_{kind}.npy"
        np.save(path, change(np.load(path)))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("index.json", "shard_00000.json"):
            record = json.loads((config.cache / name).read_text())
            (record["shards"][0] if name == "index.json" else record)["sha256"][kind] = digest
            (config.cache / name).write_text(json.dumps(record))

    return spoil


def edit_shard(edit):
    def spoil(config: DataConfig) -> None:
        path = config.cache / "index.json"
        index = json.loads(path.read_text())
        edit(index["shards"][0])
        path.write_text(json.dumps(index))

    return spoil


def climb(shard: dict) -> None:
    shard["sources"][0]["image"][0] = "../../outside.png"


CRAFTED = {
    "shape": (craft(lambda array: array[:, :-1]), "is damaged: shard_00000_images.npy"),
    "rows": (craft(lambda array: array[:-1]), "is damaged: shard_00000_images.npy"),
    "dtype": (craft(lambda array: array.astype(np.float64)), "is damaged: shard_00000_images.npy"),
    "scalar": (craft(lambda array: np.uint8(3)), "is damaged: shard_00000_images.npy"),
    "labels": (craft(lambda array: array * 7, "masks"), "is damaged: shard_00000_masks.npy"),
    "fewer masks": (craft(lambda array: array[1:], "masks"), "is damaged: shard_00000_masks.npy"),
    "climbs": (edit_shard(climb), "is damaged: shard_00000.json"),
    "other folder": (edit_shard(lambda shard: shard.update(name="../x/shard_00000.json")), "is no finished cache"),
    "foreign kind": (edit_shard(lambda shard: shard["sha256"].update(weights="0" * 64)), "is no finished cache"),
    "stamp of text": (
        edit_shard(lambda shard: shard["sources"][0]["image"].__setitem__(1, "x")),
        "is no finished cache",
    ),
    "deep": (lambda config: (config.cache / "index.json").write_text("[" * 100_000), "is no finished cache"),
    "deep list": (
        lambda config: (config.cache / "index.json").write_text('{"format": 3, "x": ' + "[" * 99_999),
        "is no finished cache",
    ),
    "huge number": (change_index(image_size=10**400), "is no finished cache"),
    "orientation": (change_index(orientation="ignore"), "made with data.orientation ignore, not apply"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_cache_is_refused_by_one_line(cached, name, counted):
    spoil, said = CRAFTED[name]
    spoil(cached)
    with pytest.raises(UserError, match=said) as raised:
        open_cache(cached)
    assert str(raised.value).startswith(f"data.cache {cached.cache}: ") and "\n" not in str(raised.value)
    counted("crafted caches", 1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda config: shutil.rmtree(config.cache), "is no finished cache"),
        (lambda config: (config.cache / "index.json").write_text("[1]"), "is no finished cache"),
        (change_index(format=99), "written by another version"),
        (change_index(image_size=32), "made at data.image_size 32, not 24"),
        (change_index(shards=[{}]), "is no finished cache"),
        (flip_a_bit, "is damaged: shard_00001_images.npy"),
        (lambda config: (config.cache / "shard_00002_masks.npy").unlink(), "is damaged: shard_00002_masks.npy"),
        (repaint, r"not of this data: .*masks/S002\.png is missing or has changed"),
        (lambda config: (config.root / "noisy" / "S005.png").unlink(), r"noisy/S005\.png is missing or has changed"),
        (lambda config: config.root.rename(config.root.with_name("elsewhere")), "is missing or has changed"),
    ],
)
def test_a_stale_foreign_or_damaged_cache_is_refused_by_one_line(cached, spoil, said):
    spoil(cached)
    with pytest.raises(UserError, match=said) as raised:
        open_cache(cached)
    assert str(raised.value).startswith(f"data.cache {cached.cache}: ")
    assert "launch/prepare.py --cache" in str(raised.value) and "\n" not in str(raised.value)


def test_a_cache_that_lacks_a_sample_is_refused(cached, tmp_path):
    samples = read_samples(cached)
    write_cache(samples[:-2], [], cached, cached.cache, threads=1)
    with pytest.raises(UserError, match=r"does not hold .*S011\.png \(and 5 more\)"):
        usable_samples(cached, tmp_path / "run", check=True)


def test_what_was_bad_when_the_cache_was_made_is_refused_or_left_out(cached, tmp_path):
    samples = read_samples(cached)
    problem = Problem(samples[4].id, str(samples[4].image), "is empty")
    write_cache([*samples[:4], *samples[5:]], [problem], cached, cached.cache, threads=1)
    with pytest.raises(UserError, match="is empty"):
        usable_samples(cached, tmp_path / "run", check=True)
    skipping = cached.model_copy(update={"on_bad": "skip"})
    assert usable_samples(skipping, tmp_path / "run", check=True) == [*samples[:4], *samples[5:]]


def test_a_folder_of_other_things_is_not_written_to(cached, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        write_cache(read_samples(cached), [], cached, tmp_path / "home", threads=1)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]
