"""Images that stay on the device: when they do, and that batches are the same; the device here is the CPU."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from distseg.data.augment import draw_transform
from distseg.data.batch import Request
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.device_images import DeviceImages, fit_on_device
from distseg.data.geometry import Frame
from distseg.data.reader import PixelReader
from distseg.data.sample import Annotation, Sample
from distseg.data.streams import Stream
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec
from distseg.errors import BadFileError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZE = 24
AUGMENT = AugmentConfig(flip=True, rotate=40, brightness=0.2, hairs=3, blur=1.0, grain=0.05)


@pytest.fixture
def samples(make_dataset) -> list[Sample]:
    return read_samples(DataConfig(root=make_dataset(size=50, noisy=True)))


def requests(samples: list[Sample], epochs: int = 3) -> list[list[Request]]:
    order = [sample for _ in range(epochs) for sample in samples]
    asked = [Request.of(s, "noisy", draw_transform(AUGMENT, SIZE, 0, "s", n)) for n, s in enumerate(order)]
    return [asked[first : first + 4] for first in range(0, len(asked), 4)]


def load(samples: list[Sample], on_device: DeviceImages | None):
    dali = pytest.importorskip("distseg.data.dali")
    return dali.load_batches(iter(requests(samples)), PixelReader(Frame(SIZE), on_device=on_device), 4, CPU, 2)


def test_all_of_a_streams_images_fit_or_none_is_kept():
    size = 64
    images = [
        Sample(f"{n}", "train", Path(f"{n}.jpg"), Path(f"{n}.png"), (Annotation("", Path(f"{n}_noisy.png")),))
        for n in range(100)
    ]
    needed = 100 * 3 * size**2 / 2**30

    def fit(samples: list[Sample], budget: float, device: torch.device = GPU) -> bool:
        return fit_on_device(samples, DataConfig(root=".", image_size=size, device_memory=budget), device)

    assert fit(images, needed)
    assert not fit(images, needed * 0.999)
    assert not fit(images, 0)
    assert fit([*images, *images], needed)  # a file counts once
    assert not fit(images, needed, CPU)


def test_a_stream_on_the_cpu_keeps_nothing_there(samples, monkeypatch):
    monkeypatch.setattr("distseg.data.streams.DeviceImages", None)  # would be called
    config = DataConfig(root=".", image_size=SIZE, pipeline="torch")
    stream = Stream(samples, "noisy", "noisy", config, 0, ShardSpec(), 4, 1, CPU)
    assert len(stream.batch(0, 0).ids) == 4
    stream.close()


def test_batches_are_the_same_and_each_image_is_read_once(samples):
    read = []

    def read_image(path: Path) -> np.ndarray:
        read.append(path)
        return PixelReader(Frame(SIZE)).image(path)

    actual, expected = list(load(samples, DeviceImages(read_image, CPU))), list(load(samples, None))
    assert len(actual) == len(expected) == len(requests(samples))
    for one, other in zip(actual, expected, strict=True):
        assert one.ids == other.ids
        for name in ("images", "masks", "true_masks"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert sorted(read) == sorted(sample.image for sample in samples)


def test_threads_that_ask_at_once_get_the_same_tensor(samples):
    both_read = threading.Barrier(2)

    def read_image(path: Path) -> np.ndarray:
        both_read.wait(timeout=60)
        return PixelReader(Frame(SIZE)).image(path)

    images = DeviceImages(read_image, CPU)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(images.image, [samples[0].image] * 2)
    assert one is other is images.image(samples[0].image)
    np.testing.assert_array_equal(one.numpy(), PixelReader(Frame(SIZE)).image(samples[0].image))


def test_a_file_that_breaks_is_named(samples):
    samples[6].image.write_bytes(b"")
    before = threading.active_count()
    with pytest.raises(BadFileError) as raised:
        list(load(samples, DeviceImages(PixelReader(Frame(SIZE)).image, CPU)))
    assert str(raised.value).startswith(str(samples[6].image))
    assert threading.active_count() <= before


def test_closing_early_stops_the_loader(samples):
    before = threading.active_count()
    batches = load(samples, DeviceImages(PixelReader(Frame(SIZE)).image, CPU))
    next(batches)
    batches.close()
    assert threading.active_count() <= before
