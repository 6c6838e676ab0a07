"""DALI's mixed path and the images kept on the GPU: all pixel work there, held to what the CPU's loader gives."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from distseg.data.augment import Transform, draw_transform, identity_transform
from distseg.data.batch import Batch, Request
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.device_images import DeviceImages
from distseg.data.geometry import Frame
from distseg.data.reader import PixelReader
from distseg.data.sample import Annotation, Sample
from distseg.data.streams import Stream
from distseg.distributed.ranks import ShardSpec
from distseg.errors import BadFileError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
GEOMETRY = AugmentConfig(flip=True, right_angles=True, rotate=180, scale=(0.7, 1.5), shear=20, translate=0.3)
EVERYTHING = GEOMETRY.model_copy(
    update={
        "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 40.0,
        "elastic": 0.05, "hairs": 12, "blur": 1.5, "grain": 0.05,
    }
)  # fmt: skip
AS_STORED = np.eye(3, 4, dtype=np.float32)


def load(
    requests: list[list[Request]], frame: Frame, device: torch.device, on_device: DeviceImages | None = None
) -> Iterator[Batch]:
    dali = pytest.importorskip("distseg.data.dali")
    reader = PixelReader(frame, on_device=on_device)
    return dali.load_batches(iter(requests), reader, max(map(len, requests)), device, 2)


def write_sample(folder: Path, id: str, image: np.ndarray, mask: np.ndarray) -> Sample:
    paths = folder / f"{id}.jpg", folder / f"{id}_mask.png"
    assert cv2.imwrite(str(paths[0]), image, [cv2.IMWRITE_JPEG_QUALITY, 98])
    assert cv2.imwrite(str(paths[1]), mask * 255)
    noisy = folder / f"{id}_noisy.png"
    assert cv2.imwrite(str(noisy), (1 - mask) * 255)
    return Sample(id, "train", *paths, (Annotation("", noisy),))


@pytest.fixture
def boards(tmp_path: Path) -> list[Sample]:
    """Random cells of 16 pixels, the same in image and mask."""
    samples = []
    for number in range(10):
        cells = np.random.default_rng(number).integers(0, 2, (4, 4), np.uint8)
        mask = np.kron(cells, np.ones((16, 16), np.uint8))
        samples.append(write_sample(tmp_path, f"b{number}", np.repeat(mask[..., None] * 255, 3, axis=2), mask))
    return samples


@pytest.fixture
def pictures(tmp_path: Path) -> list[Sample]:
    """Large and smooth, so that two resampling filters agree."""
    samples = []
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (400, 500, 3), np.uint8)
        picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 15), None, 0, 255, cv2.NORM_MINMAX)
        mask = cv2.ellipse(np.zeros((400, 500), np.uint8), (240, 180), (150, 60 + 10 * number), 30, 0, 360, 1, -1)
        samples.append(write_sample(tmp_path, f"p{number}", picture, mask))
    return samples


def test_batches_are_on_the_gpu_in_order_and_of_the_contract(pictures: list[Sample]) -> None:
    cuts = [pictures[:3], pictures[3:4], pictures[4:]]
    batches = list(
        load([[Request.of(s, "noisy", identity_transform(32)) for s in cut] for cut in cuts], Frame(32), GPU)
    )
    assert [batch.ids for batch in batches] == [tuple(sample.id for sample in cut) for cut in cuts]
    for batch in batches:
        assert all(tensor.device.type == GPU.type for tensor in (batch.images, batch.masks, batch.true_masks))
        assert (batch.images.dtype, batch.masks.dtype) == (torch.float32, torch.uint8)
        assert batch.images.is_contiguous() and batch.masks.is_contiguous()
        assert torch.equal(batch.masks, 1 - batch.true_masks)


def test_pairs_stay_aligned_binary_and_finite(boards: list[Sample]) -> None:
    def transform(position: int) -> Transform:
        return Transform(draw_transform(GEOMETRY, 64, 0, "s", position).matrix, AS_STORED)

    requests = [
        [Request.of(boards[n % 10], "true", transform(n)) for n in range(first, first + 100)]
        for first in range(0, 10_000, 100)
    ]
    pairs, wrong_pixels, edge = 0, 0, 0
    for batch in load(requests, Frame(64), GPU):
        assert torch.isfinite(batch.images).all()
        assert batch.masks.max() == 1
        masks = batch.masks.float()[:, None]
        in_band = max_pool2d(masks, 5, 1, 2) != -max_pool2d(-masks, 5, 1, 2)
        wrong = (batch.images[:, :1] > 127) != (masks > 0)
        assert not (wrong & ~in_band).any()
        pairs, wrong_pixels, edge = pairs + len(masks), wrong_pixels + wrong.sum(), edge + in_band.sum()
    assert pairs == 10_000
    assert wrong_pixels < 0.01 * edge


@pytest.mark.parametrize("config", [AugmentConfig(), GEOMETRY, EVERYTHING], ids=["plain", "geometry", "everything"])
def test_the_gpu_gives_what_the_cpu_gives(pictures: list[Sample], config: AugmentConfig) -> None:
    """Decoders and resampling filters differ by a few of 255 grey levels, of which one is 0.025 in the input."""
    requests = [[Request.of(pictures[n % 8], "noisy", draw_transform(config, 64, 0, "s", n)) for n in range(64)]]
    [actual], [expected] = load(requests, Frame(64), GPU), load(requests, Frame(64), CPU)
    difference = (actual.images.cpu() - expected.images).abs()
    assert difference.mean() < 0.05
    assert difference.quantile(0.999) < 0.3
    for name in ("masks", "true_masks"):
        assert (getattr(actual, name).cpu() != getattr(expected, name)).float().mean() < 2e-3


@pytest.mark.parametrize("config", [AugmentConfig(), GEOMETRY, EVERYTHING], ids=["plain", "geometry", "everything"])
def test_images_kept_on_the_gpu_give_what_the_cpu_gives(pictures: list[Sample], config: AugmentConfig) -> None:
    """The decoder is the same; a warp may round to the next grey level, and a mask's edge to the next pixel."""
    requests = [
        [Request.of(pictures[n % 8], "noisy", draw_transform(config, 64, 0, "s", n)) for n in range(first, first + 16)]
        for first in range(0, 64, 16)
    ]
    images = DeviceImages(PixelReader(Frame(64)).image, GPU)
    for actual, expected in zip(load(requests, Frame(64), GPU, images), load(requests, Frame(64), CPU), strict=True):
        assert actual.ids == expected.ids
        assert actual.images.device.type == actual.masks.device.type == "cuda"
        difference = (actual.images.cpu() - expected.images).abs()
        assert difference.mean() < 0.02
        assert difference.quantile(0.999) < 0.3
        for name in ("masks", "true_masks"):
            assert (getattr(actual, name).cpu() != getattr(expected, name)).float().mean() < 2e-3
    for sample in pictures:
        kept = images.image(sample.image)
        assert kept.device.type == "cuda"
        assert np.array_equal(kept.cpu().numpy(), PixelReader(Frame(64)).image(sample.image))


@pytest.mark.parametrize("config", [GEOMETRY, EVERYTHING], ids=["geometry", "everything"])
@pytest.mark.parametrize("kept", [False, True], ids=["from the reader", "kept"])
@pytest.mark.parametrize("frame", [Frame(64, "letterbox"), Frame(64, "crop", 0.6)], ids=str)
def test_letterboxes_and_windows_are_those_of_the_cpu(
    pictures: list[Sample], frame: Frame, kept: bool, config: AugmentConfig
) -> None:
    """Decoder and padding are the same; a warp may round to the next grey level, a mask's edge to the next pixel."""
    if kept and frame.shape == "crop":
        pytest.skip("crops are not kept on a device")
    window = (0.3, 0.8) if frame.shape == "crop" else None
    transforms = [draw_transform(config, 64, 0, "s", n) for n in range(32)]
    requests = [[Request.of(pictures[n % 8], "noisy", t, window=window) for n, t in enumerate(transforms)]]
    images = DeviceImages(PixelReader(frame).image, GPU) if kept else None
    [actual], [expected] = load(requests, frame, GPU, images), load(requests, frame, CPU)
    difference = (actual.images.cpu() - expected.images).abs()
    assert difference.mean() < 0.02
    assert difference.quantile(0.999) < 0.3
    assert 255 in actual.masks
    assert (actual.masks.cpu() != expected.masks).float().mean() < 2e-3


@pytest.mark.parametrize("device_memory", [1.0, 0.0], ids=["all fit", "none fits"])
def test_images_that_fit_the_budget_are_read_once(pictures: list[Sample], device_memory: float, tmp_path: Path) -> None:
    config = DataConfig(root=tmp_path, image_size=32, pipeline="dali", device_memory=device_memory)
    stream = Stream(pictures, "noisy", "noisy", config, 0, ShardSpec(), 4, 1, GPU)
    before = torch.cuda.memory_allocated()
    for step in range(2):
        stream.batch(step, 0)
    for sample in pictures:
        sample.image.unlink()
    if device_memory:
        assert torch.cuda.memory_allocated() - before >= 8 * 3 * 32**2
        assert all(len(stream.batch(step, 0).ids) == 4 for step in range(2, 8))
    else:
        with pytest.raises(BadFileError):
            for step in range(2, 8):
                stream.batch(step, 0)
    stream.close()


@pytest.mark.parametrize("device_memory", [1.0, 0.0], ids=["kept", "mixed"])
def test_the_same_bits_whenever_it_is_asked_for(pictures: list[Sample], device_memory: float, tmp_path: Path) -> None:
    config = DataConfig(root=tmp_path, image_size=32, pipeline="dali", augment=EVERYTHING, device_memory=device_memory)

    def batches(steps: list[int]) -> list[torch.Tensor]:
        stream = Stream(pictures, "noisy", "noisy", config, 0, ShardSpec(), 3, 1, GPU)
        images = [stream.batch(step, 0).images for step in steps]
        stream.close()
        return images

    whole = batches([0, 1, 2, 3])
    for first in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(batches(list(range(first, 4))), whole[first:], strict=True))


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>"], ids=["missing", "empty", "no image"])
def test_a_file_that_breaks_is_named(pictures: list[Sample], content: bytes | None) -> None:
    broken = pictures[5].image
    broken.unlink()
    if content is not None:
        broken.write_bytes(content)
    requests = [[Request.of(s, "true", identity_transform(32)) for s in pictures[i : i + 2]] for i in (0, 2, 4, 6)]
    with pytest.raises(BadFileError) as raised:
        list(load(requests, Frame(32), GPU))
    assert str(raised.value).startswith(str(broken))
