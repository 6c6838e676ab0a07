"""Letterboxes and crops through loaders, cache and streams: image and mask together, padding ignored."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from distseg.data.augment import draw_transform, identity_transform
from distseg.data.batch import Batch, Request
from distseg.data.cache import open_cache, write_cache
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.device_images import DeviceImages, fit_on_device
from distseg.data.geometry import PADDING, Frame
from distseg.data.reader import PixelReader
from distseg.data.sample import Annotation, Sample
from distseg.data.streams import Stream, evaluation_batches
from distseg.distributed.ranks import ShardSpec
from distseg.errors import UserError

CPU = torch.device("cpu")
ONE_RANK = ShardSpec()
AS_STORED = np.eye(3, 4, dtype=np.float32)
GEOMETRY = AugmentConfig(flip=True, right_angles=True, rotate=180, scale=(0.5, 2), shear=20, translate=0.3)
EVERYTHING = GEOMETRY.model_copy(
    update={"brightness": 0.3, "hue": 40.0, "elastic": 0.05, "hairs": 12, "blur": 1.5, "grain": 0.05}
)
FRAMES = [Frame(48, "letterbox"), Frame(48, "crop", 0.6), Frame(48, "crop")]
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")


@pytest.fixture(params=["torch_loader", pytest.param("dali", marks=needs_dali)])
def load_batches(request):
    return importlib.import_module(f"distseg.data.{request.param}").load_batches


def centroid(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    places = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    return (places * weights).sum(axis=(1, 2)) / weights.sum()


def ellipses(height: int, width: int, count: int = 6) -> list[np.ndarray]:
    """Anywhere in the frame, each upside down too: what is no shift is the opposite for the other."""
    row, column = np.mgrid[:height, :width] + 0.5
    masks = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        centre, axes = rng.uniform(0.35, 0.65, 2) * (height, width), rng.uniform(0.15, 0.3, 2) * (height, width)
        mask = (((row - centre[0]) / axes[0]) ** 2 + ((column - centre[1]) / axes[1]) ** 2 < 1).astype(np.uint8)
        masks += [mask, np.ascontiguousarray(mask[::-1, ::-1])]
    return masks


def write(folder: Path, masks: list[np.ndarray], split: str = "train") -> list[Sample]:
    """Samples whose images are white where the mask is 1 and black elsewhere; noisy masks are the true ones."""
    samples = []
    for number, mask in enumerate(masks):
        paths = [folder / f"{split}{number:02d}_{kind}.png" for kind in ("image", "mask", "noisy")]
        Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)).save(paths[0])
        for path in paths[1:]:
            Image.fromarray(mask * 255).save(path)
        samples.append(Sample(f"{split}{number:02d}", split, paths[0], paths[1], (Annotation("", paths[2]),)))
    return samples


def load(load_batches, samples: list[Sample], frame: Frame, transforms: list, windows: list | None = None) -> Batch:
    windows = windows or [None] * len(samples)
    requests = [
        Request.of(sample, "noisy", replace(transform, colour=AS_STORED), window=window)
        for sample, transform, window in zip(samples, transforms, windows, strict=True)
    ]
    (batch,) = load_batches(iter([requests]), PixelReader(frame), len(samples), CPU, 1)
    return batch


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_image_and_mask_lie_about_the_same_centre(load_batches, tmp_path, frame, seed):
    height, width = (int(side) for side in np.random.default_rng(seed).integers(60, 200, 2))
    samples = write(tmp_path, ellipses(height, width))
    batch = load(load_batches, samples, frame, [identity_transform(frame.size)] * len(samples))
    place = frame.place(height, width)
    scale = np.array([place.height / height, place.width / width])
    moved = []
    for image, mask, truth, whole in zip(
        batch.images[:, 0].numpy(), batch.masks.numpy(), batch.true_masks.numpy(), ellipses(height, width), strict=True
    ):
        assert image.shape == place.canvas
        np.testing.assert_array_equal(mask, truth)
        expected = centroid(whole) * scale + (place.top, place.left)
        moved.append([centroid(image * (mask != 255)) - expected, centroid(mask == 1) - expected])
    assert np.abs(np.mean(moved, axis=0)).max() < 0.02


@pytest.mark.parametrize(
    "augment", [AugmentConfig(), AugmentConfig(flip=True, right_angles=True)], ids=["as is", "turned"]
)
def test_a_window_is_the_same_in_image_and_mask_to_the_pixel(load_batches, tmp_path, augment):
    rng, frame = np.random.default_rng(0), Frame(48, "crop")
    masks = [rng.integers(0, 2, (int(h), int(w)), np.uint8) for h, w in rng.integers(20, 120, (12, 2))]
    windows = [tuple(pair) for pair in rng.random((12, 2)).tolist()]
    transforms = [draw_transform(augment, 48, 0, "s", n) for n in range(12)]
    batch = load(load_batches, write(tmp_path, masks), frame, transforms, windows)
    assert batch.images.shape == (12, 3, 48, 48)
    padding = torch.tensor(PADDING)[:, None]
    seen = 0
    for image, mask in zip(batch.images, batch.masks, strict=True):
        assert torch.equal(image[:, mask != 255], 255.0 * mask[mask != 255].expand(3, -1))
        assert torch.all(image[:, mask == 255] == padding)
        seen += int((mask == 255).any())
    assert 0 < seen < 12  # some are padded, some are not


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_padding_and_what_comes_in_from_outside_are_ignored_wherever_they_go(load_batches, tmp_path, frame):
    """Black files: after any geometry, what is not black has padding in it, and what is ignored is padding."""
    samples = write(tmp_path, [np.ones((50, 130), np.uint8)] * 24)
    for sample in samples:
        Image.fromarray(np.zeros((50, 130, 3), np.uint8)).save(sample.image)
    for augment in (GEOMETRY, GEOMETRY.model_copy(update={"elastic": 0.1})):
        transforms = [draw_transform(augment, 48, 0, "s", n) for n in range(24)]
        batch = load(load_batches, samples, frame, transforms, [(0.5, 0.5)] * 24)
        assert set(batch.masks.unique().tolist()) == {1, 255}
        image, ignored = batch.images[:, 0], batch.masks == 255
        assert (image[ignored] >= PADDING[0] / 4).float().mean() > 0.98  # a border lies between two pixels
        assert (image[~ignored] <= PADDING[0] * 3 / 4).float().mean() > 0.98
        assert 0.1 < ignored.float().mean() < 0.9


@needs_dali
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_both_loaders_give_the_same(tmp_path, frame):
    """Of 255 grey levels: one, from rounding; masks but for coordinates on the border of two pixels."""
    from distseg.data import dali, torch_loader

    rng, samples = np.random.default_rng(0), write(tmp_path, ellipses(90, 131))
    for sample in samples:
        Image.fromarray(rng.integers(0, 256, (90, 131, 3), np.uint8)).save(sample.image)
    windows = [tuple(pair) for pair in rng.random((len(samples), 2)).tolist()]
    for augment, most in ((GEOMETRY, 1.0), (EVERYTHING, 2.6)):
        transforms = [draw_transform(augment, 48, 0, "s", n) for n in range(len(samples))]
        ours, theirs = (
            load(loader.load_batches, samples, frame, transforms, windows) for loader in (torch_loader, dali)
        )
        assert (ours.images - theirs.images).abs().max() <= most
        assert (ours.masks != theirs.masks).float().mean() < 1e-3


def test_images_on_the_device_are_letterboxed_too(tmp_path):
    """Elastic deformation is DALI's for the GPU alone: tests/gpu."""
    dali = pytest.importorskip("distseg.data.dali")
    frame, samples = Frame(48, "letterbox"), write(tmp_path, ellipses(90, 131))
    augment = EVERYTHING.model_copy(update={"elastic": 0.0})
    transforms = [draw_transform(augment, 48, 0, "s", n) for n in range(len(samples))]
    requests = [Request.of(s, "noisy", replace(t, colour=AS_STORED)) for s, t in zip(samples, transforms, strict=True)]
    readers = PixelReader(frame), PixelReader(frame, on_device=DeviceImages(PixelReader(frame).image, CPU))
    one, other = (next(dali.load_batches(iter([requests]), reader, 12, CPU, 1)) for reader in readers)
    assert torch.equal(one.masks, other.masks) and 255 in one.masks
    assert torch.equal(one.images, other.images)


def test_crops_are_never_kept_on_a_device(tmp_path):
    samples = write(tmp_path, ellipses(60, 60, 1))
    config = DataConfig(root=tmp_path, image_size=48, shape="crop")
    assert not fit_on_device(samples, config, torch.device("cuda"))
    assert fit_on_device(samples, config.model_copy(update={"shape": "letterbox"}), torch.device("cuda"))


# --- streams ----------------------------------------------------------------------------------------------------------


def open_stream(samples: list[Sample], root: Path, shard: ShardSpec = ONE_RANK, seed: int = 0, **keys) -> Stream:
    config = DataConfig(root=root, image_size=48, pipeline="torch", **{"augment": GEOMETRY} | keys)
    return Stream(samples, "noisy", "noisy", config, seed, shard, 6 // shard.world_size, 1, CPU)


@pytest.mark.parametrize("shape", ["letterbox", "crop"])
def test_a_step_is_the_same_resumed_on_other_ranks_and_from_memory(tmp_path, shape):
    samples = write(tmp_path, ellipses(90, 131))
    stream = open_stream(samples, tmp_path, shape=shape)
    run = [stream.batch(step, 0) for step in range(4)]
    stream.close()
    resumed = open_stream(samples, tmp_path, shape=shape, memory=0.0)
    ranks = [open_stream(samples, tmp_path, ShardSpec(rank, 2), shape=shape) for rank in range(2)]
    for name in ("images", "masks"):
        assert torch.equal(getattr(resumed.batch(3, 0), name), getattr(run[3], name))
        assert torch.equal(torch.cat([getattr(rank.batch(3, 0), name) for rank in ranks]), getattr(run[3], name))
    for opened in (resumed, *ranks):
        opened.close()


def test_windows_change_from_epoch_to_epoch_and_with_the_seed(tmp_path):
    samples = write(tmp_path, [np.random.default_rng(n).integers(0, 2, (200, 300), np.uint8) for n in range(2)])
    of_seed = []
    for seed in (0, 1):
        stream = open_stream(samples, tmp_path, seed=seed, shape="crop", augment=AugmentConfig())
        batch = stream.batch(0, 0)
        stream.close()
        of_seed.append(batch.masks)
        assert len({mask.numpy().tobytes() for mask in batch.masks}) == 6  # two files, three epochs
    assert not torch.equal(*of_seed)


def test_evaluation_gives_whole_canvases_or_their_middles(tmp_path):
    samples = write(tmp_path, ellipses(90, 131, 1) + ellipses(30, 60, 1), "test")
    config = DataConfig(root=tmp_path, image_size=48, shape="crop")
    whole = list(evaluation_batches(samples, config, ShardSpec(), 1, CPU))
    assert [batch.images.shape[2:] for batch in whole] == 2 * [(90, 131)] + 2 * [(48, 60)]
    [middle] = evaluation_batches(samples, config, ShardSpec(), 4, CPU, windows=True)
    assert middle.images.shape == (4, 3, 48, 48)
    assert torch.equal(middle.masks[0], whole[0].masks[0, 21:69, 42:90])


# --- cache and keys ---------------------------------------------------------------------------------------------------


def test_the_cache_of_a_letterbox_is_the_originals_bit_for_bit_and_no_other_shapes(tmp_path):
    samples = write(tmp_path, ellipses(90, 131))
    config = DataConfig(root=tmp_path, image_size=48, shape="letterbox", cache=tmp_path / "cache")
    write_cache(samples, [], config, tmp_path / "cache", threads=1)
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["shape"] == "letterbox"
    plain, cached = (
        next(evaluation_batches(samples, each, ShardSpec(), 12, CPU))
        for each in (config.model_copy(update={"cache": None}), config)
    )
    assert torch.equal(plain.images, cached.images) and torch.equal(plain.masks, cached.masks)
    assert 255 in plain.masks
    with pytest.raises(UserError, match=r"made with data\.shape letterbox, not squash; make another with"):
        open_cache(config.model_copy(update={"shape": "squash"}))
    # What another shape has left is no shard of this one.
    squash = config.model_copy(update={"shape": "squash"})
    (tmp_path / "cache" / "index.json").unlink()
    assert write_cache(samples, [], squash, tmp_path / "cache", threads=1) == (1, 0)
    crop = config.model_copy(update={"shape": "crop", "cache": None})
    with pytest.raises(UserError, match="images of one size"):
        write_cache(samples, [], crop, tmp_path / "other", threads=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scale": 0.5}, "scale 0.5: applies to shape crop alone, not to squash"),
        ({"shape": "letterbox", "overlap": 0.5}, "overlap 0.5: applies to shape crop alone, not to letterbox"),
        ({"shape": "crop", "cache": "/somewhere"}, "cache /somewhere: holds images of one size"),
        ({"shape": "round"}, "squash"),
    ],
)
def test_a_key_that_does_not_apply_is_an_error(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(root=Path("/data"), **keys)
