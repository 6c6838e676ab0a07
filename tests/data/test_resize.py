"""Image, mask and noise lie about the same centres at every size: by centroids, and by exact areas."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from distseg.data.augment import Transform, identity_transform
from distseg.data.batch import Request
from distseg.data.cache import open_cache, write_cache
from distseg.data.config import DataConfig
from distseg.data.decode import read_resized_image, read_resized_mask
from distseg.data.geometry import Frame
from distseg.data.noise.markov import markov
from distseg.data.reader import PixelReader
from distseg.data.resize import resize_mask
from distseg.data.sample import Annotation, Sample
from distseg.data.seeding import generator
from distseg.data.streams import evaluation_batches
from distseg.distributed.ranks import ShardSpec

CPU = torch.device("cpu")
AS_STORED = np.eye(3, 4, dtype=np.float32)
SIZES = [(128, 128, 64), (1025, 1025, 64), (1025, 767, 96), (300, 211, 96), (65, 64, 64), (40, 50, 64), (1022, 767, 48)]


def centroid(weights: np.ndarray) -> np.ndarray:
    """(row, column) in pixels from the frame's corner; pixel i's centre is at i + ½."""
    weights = weights.astype(np.float64)
    places = np.mgrid[: weights.shape[0], : weights.shape[1]] + 0.5
    return (places * weights).sum(axis=(1, 2)) / weights.sum()


def draw_discs(height: int, width: int, count: int = 8) -> list[np.ndarray]:
    """`count` discs anywhere in the frame, each upside down too: what is no shift is the opposite for the other."""
    row, column = np.mgrid[:height, :width] + 0.5
    discs = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        y, x = rng.uniform(0.35, 0.65, 2) * (height, width)
        a, b = rng.uniform(0.15, 0.3, 2) * (height, width)
        disc = (((row - y) / a) ** 2 + ((column - x) / b) ** 2 < 1).astype(np.uint8)
        discs += [disc, np.ascontiguousarray(disc[::-1, ::-1])]
    return discs


def shifts(masks: list[np.ndarray], resized: list[np.ndarray]) -> np.ndarray:
    """Mean shift of the centroids in pixels of the output, rows and columns."""
    moved = []
    for mask, small in zip(masks, resized, strict=True):
        scale = np.array(small.shape) / np.array(mask.shape)
        moved.append(centroid(small) - centroid(mask) * scale)
    return np.mean(moved, axis=0)


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_a_resized_mask_stays_in_its_place(height, width, size):
    masks = draw_discs(height, width)
    assert np.abs(shifts(masks, [resize_mask(mask, size, size) for mask in masks])).max() < 1e-9


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_image_and_mask_of_a_file_stay_together(tmp_path, height, width, size, suffix):
    masks, images, labels = draw_discs(height, width), [], []
    for mask in masks:
        Image.fromarray(mask * 255).save(tmp_path / "mask.png")
        picture = np.repeat(mask[..., None] * 255, 3, axis=2)
        Image.fromarray(picture).save(tmp_path / f"image.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
        image = read_resized_image(tmp_path / f"image.{suffix}", Frame(size))[..., 1].astype(np.float64)
        images.append(np.where(image < 8, 0, image))  # without the ringing of JPEG
        labels.append(read_resized_mask(tmp_path / "mask.png", Frame(size)))
    assert np.abs(shifts(masks, images)).max() < 0.02
    assert np.abs(shifts(masks, labels)).max() < 1e-9


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
@pytest.mark.parametrize("cached", [False, True])
def test_loaders_cache_and_evaluation_keep_them_together(tmp_path, pipeline, cached):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    masks, samples = draw_discs(128, 128), []
    for number, mask in enumerate(masks):
        paths = {kind: tmp_path / f"{kind}{number}.png" for kind in ("image", "mask", "noisy_mask")}
        Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)).save(paths["image"])
        Image.fromarray(mask * 255).save(paths["mask"])
        Image.fromarray(mask * 255).save(paths["noisy_mask"])
        drawn = (Annotation("", paths["noisy_mask"]),)
        samples.append(Sample(f"s{number:02d}", "test", paths["image"], paths["mask"], drawn))
    config = DataConfig(root=tmp_path, image_size=64, pipeline=pipeline, cache=tmp_path / "cache" if cached else None)
    if cached:
        write_cache(samples, [], config, tmp_path / "cache", threads=1)

    module = pytest.importorskip(f"distseg.data.{'dali' if pipeline == 'dali' else 'torch_loader'}")
    requests = [
        [Request.of(sample, "noisy", Transform(identity_transform(64).matrix, AS_STORED)) for sample in samples]
    ]
    reader = PixelReader(Frame(64), cache=open_cache(config))
    [training] = module.load_batches(iter(requests), reader, len(samples), CPU, 1)
    [evaluation] = evaluation_batches(samples, config, ShardSpec(), len(samples), CPU)
    seen = {
        "image": training.images[:, 0].double(),
        "label": training.masks,
        "true": training.true_masks,
        "picture": evaluation.pictures[:, 0].double(),
        "evaluated": evaluation.true_masks,
    }
    for name, pixels in seen.items():
        assert np.abs(shifts(masks, list(pixels.numpy()))).max() < (
            1e-9 if name in ("label", "true", "evaluated") else 0.02
        ), name


@pytest.mark.parametrize("shape", [(300, 211), (512, 512), (767, 1022), (1025, 1025)])
def test_markov_noise_leaves_a_mask_in_its_place(shape):
    masks = draw_discs(*shape)
    walked = [markov(mask, 1, 0.5, 0.0, 0.0, generator(0)) for mask in masks]  # a walk that moves nothing
    assert np.abs(shifts(masks, walked)).max() < 1e-9
    areas = [walk.sum() / mask.sum() for mask, walk in zip(masks, walked, strict=True)]
    assert np.mean(areas) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("source", "output"),
    [((13, 17), (5, 6)), ((8, 8), (4, 4)), ((9, 8), (3, 2)), ((15, 8), (3, 2)), ((7, 9), (20, 21)), ((3, 2), (3, 2))],
)
def test_each_pixel_has_the_class_of_most_of_its_area(source, output):
    """By brute force in fractions, for two classes and for four with ignore."""

    def overlaps(count: int, cells: int) -> np.ndarray:
        """(cells, count): how much of each source pixel lies in each output pixel."""
        side = Fraction(count, cells)
        lengths = [[min(side * (j + 1), i + 1) - max(side * j, i) for i in range(count)] for j in range(cells)]
        return np.array([[max(Fraction(0), length) for length in row] for row in lengths], object)

    rows, columns = overlaps(source[0], output[0]), overlaps(source[1], output[1])
    for ids in ([0, 1], [0, 1, 2, 255]):
        mask = np.random.default_rng(0).choice(np.uint8(ids), source)
        areas = np.stack([rows @ (mask == id).astype(int).astype(object) @ columns.T for id in ids])
        expected = np.uint8(ids)[np.argmax(areas, axis=0)]  # the first of equals, the lowest id
        np.testing.assert_array_equal(resize_mask(mask, *output), expected)


def test_a_tie_is_background_and_a_class_before_ignore():
    assert resize_mask(np.uint8([[0, 1]]), 1, 1) == 0
    assert resize_mask(np.uint8([[2, 255]]), 1, 1) == 2
    assert resize_mask(np.uint8([[2, 255, 255]]), 1, 1) == 255
