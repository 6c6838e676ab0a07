"""data.annotators=all: a batch has every annotator's mask, under the geometry of its image, whoever loads it."""

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from distseg.config.schema import Config
from distseg.data.annotators import Annotators, majority, vote
from distseg.data.augment import draw_transform
from distseg.data.batch import Batch, Request
from distseg.data.cache import write_cache
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.geometry import Frame
from distseg.data.reader import PixelReader
from distseg.data.sample import Annotation, Sample
from distseg.data.splits import split_clean
from distseg.data.streams import Stream
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError

CPU = torch.device("cpu")
SIZE = 24
EVERYTHING = AugmentConfig(flip=True, right_angles=True, rotate=90, scale=(0.5, 2), translate=0.3, elastic=0.1)
WHO = {"s0": ("ann", "ben", "cy"), "s1": ("ben",), "s2": ("ann", "cy"), "s3": (), "s4": ("cy",), "val": (), "test": ()}
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")


@pytest.fixture(params=["torch_loader", pytest.param("dali", marks=needs_dali)])
def load_batches(request: pytest.FixtureRequest):
    return importlib.import_module(f"distseg.data.{request.param}").load_batches


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Random blocks for masks, no two alike."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "files").mkdir(parents=True)

    def write(name: str, pixels: np.ndarray) -> str:
        assert cv2.imwrite(str(folder / "files" / f"{name}.png"), pixels)
        return f"files/{name}.png"

    rows = ["id,split,image,reference,annotation:ann,annotation:ben,annotation:cy"]
    for id, annotators in WHO.items():
        mask = {
            who: np.kron(rng.integers(0, 2, (8, 8), np.uint8) * 255, np.ones((5, 5), np.uint8))
            for who in ("reference", *annotators)
        }
        files = {who: write(f"{id}_{who}", pixels) for who, pixels in mask.items()}
        image = write(id, rng.integers(0, 256, (40, 40, 3), np.uint8))
        cells = (files.get(who, "") for who in ("reference", "ann", "ben", "cy"))
        split = id if id in ("val", "test") else "train"
        rows.append(",".join([id, split, image, *cells]))
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def config_of(root: Path, **keys) -> DataConfig:
    return DataConfig(root=root, image_size=SIZE, annotators="all", clean_count=1, augment=EVERYTHING, **keys)


def batches_of(
    samples: list[Sample], config: DataConfig, annotators: Annotators | None, shard: ShardSpec | None = None
) -> list[Batch]:
    shard = shard or ShardSpec()
    stream = Stream(samples, "noisy", "noisy", config, 3, shard, 4 // shard.world_size, 1, CPU, annotators)
    found = [stream.batch(step, 0) for step in range(6)]
    stream.close()
    return found


def test_every_annotation_is_warped_as_the_label_is(root: Path, load_batches) -> None:
    samples = [sample for sample in read_samples(config_of(root)) if sample.annotations]
    annotators = Annotators.of(samples, [])
    assert annotators == Annotators(("ann", "ben", "cy"), 3)
    reader = PixelReader(Frame(SIZE))
    transforms = [draw_transform(EVERYTHING, SIZE, 0, "s", position) for position in range(len(samples))]

    def load(requests: list[Request]) -> Batch:
        [batch] = load_batches(iter([requests]), reader, len(requests), CPU, 1)
        return batch

    batch = load(
        [
            Request.of(sample, "noisy", transform, annotators=annotators)
            for sample, transform in zip(samples, transforms, strict=True)
        ]
    )
    assert batch.annotators is not None and batch.annotations is not None
    assert batch.annotators.tolist() == [[0, 1, 2], [1, -1, -1], [0, 2, -1], [2, -1, -1]]
    assert batch.annotations.shape == (4, 3, SIZE, SIZE) and batch.annotations.dtype == torch.uint8
    assert batch.annotations.is_contiguous()
    assert (batch.annotations[batch.annotators < 0] == 255).all()
    for row, (sample, transform) in enumerate(zip(samples, transforms, strict=True)):
        for place in range(len(sample.annotations)):
            alone = load([Request.of(sample, "noisy", transform, place)])
            assert alone.annotations is None and alone.annotators is None
            assert torch.equal(batch.annotations[row, place], alone.masks[0]), (sample.id, place)
            assert 0 < batch.annotations[row, place].sum() < SIZE**2
        assert torch.equal(batch.masks[row], batch.annotations[row, 0])


@pytest.mark.parametrize("pipeline", ["torch", pytest.param("dali", marks=needs_dali)])
def test_a_streams_labels_are_the_vote_and_the_rest_is_as_it_is_without_the_others(
    root: Path, pipeline: str, tmp_path: Path
) -> None:
    config = config_of(root, pipeline=pipeline)
    clean, noisy = split_clean(read_samples(config), 1, 0)
    annotators = Annotators.of(noisy, clean)
    every, one = batches_of(noisy, config, annotators), batches_of(noisy, config, None)
    for batch, drawn in zip(every, one, strict=True):
        assert batch.ids == drawn.ids
        for name in ("images", "true_masks"):
            assert torch.equal(getattr(batch, name), getattr(drawn, name)), name
        assert (batch.annotations == drawn.masks[:, None]).all((2, 3)).any(1).all()
        for masks, annotations in zip(batch.masks, batch.annotations, strict=True):
            np.testing.assert_array_equal(masks, majority(annotations.numpy()))
    assert len({tuple(row.tolist()) for batch in every for row in batch.annotators}) >= 3

    halves = [batches_of(noisy, config, annotators, ShardSpec(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(every, *halves, strict=True):
        assert torch.equal(whole.annotations, torch.cat([part.annotations for part in parts]))
        assert torch.equal(whole.annotators, torch.cat([part.annotators for part in parts]))

    write_cache(read_samples(config), [], config, tmp_path / "cache", 1)
    cached = batches_of(noisy, config.model_copy(update={"cache": tmp_path / "cache"}), annotators)
    assert all(torch.equal(a.annotations, b.annotations) for a, b in zip(every, cached, strict=True))


def test_who_draws_is_counted_over_both_streams_and_a_mask_of_nobody_is_one(root: Path) -> None:
    by_id = {sample.id: sample for sample in read_samples(config_of(root))}
    assert Annotators.of([by_id["s1"]], [by_id["s0"]]) == Annotators(("ann", "ben", "cy"), 3)
    assert Annotators.of([by_id["s1"]], [by_id["s3"]]) == Annotators(("ben",), 1)
    unnamed = replace(by_id["s1"], annotations=(Annotation("", by_id["s1"].image),))
    both = Annotators.of([unnamed, by_id["s4"]], [])
    assert both == Annotators(("", "cy"), 1) and both.places(unnamed.annotations) == (0,)
    # A study leaves an image without an annotation the mask that it has.
    assert Annotators.of([by_id["s3"]], []) == Annotators(("",), 1)
    with pytest.raises(UserError, match=r"no training image has two annotations.*set data.annotators=drawn$"):
        both.check_several()
    Annotators(("a", "b"), 2).check_several()


def test_the_vote_of_classes_and_of_what_is_ignored() -> None:
    masks = np.array([[0, 1, 2, 255, 255, 1], [0, 1, 0, 255, 1, 2], [1, 2, 1, 255, 255, 255]], np.uint8)[:, None]
    found = vote(torch.as_tensor(masks)[None], 3)
    assert found.tolist() == [[[0, 1, 0, 255, 1, 1]]] and found.dtype == torch.uint8
    np.testing.assert_array_equal(found[0], majority(masks))


def test_labels_that_know_no_annotators_refuse_them(tmp_path: Path) -> None:
    def config(method: str) -> Config:
        data = {"root": tmp_path, "image_size": 16, "annotators": "all"}
        return Config.model_validate({"name": "x", "data": data, "method": {"name": method}, "train": {"steps": 1}})

    assert config("label_correction").data.annotators == "all"
    with pytest.raises(ValueError, match=r"data.annotators all: .* not drawn; set it to drawn, majority or staple"):
        config("pixel_reweight")
