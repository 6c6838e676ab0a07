"""The real images, where there are any: the folder that holds isic2017_128/ and isic_original/."""

import os
from pathlib import Path

import pytest
import torch

from distseg.data.checks import inspect_files
from distseg.data.config import AugmentConfig, DataConfig
from distseg.data.decode import PLAIN
from distseg.data.noise.polygon import PolygonNoise
from distseg.data.noise.write import write_noisy_masks
from distseg.data.splits import split_clean
from distseg.data.streams import Stream, evaluation_batches
from distseg.data.survey import read_samples
from distseg.distributed.ranks import ShardSpec

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("DISTSEG_DATA" not in os.environ, reason="DISTSEG_DATA does not name the ISIC sample's folder"),
]
CPU = torch.device("cpu")


def data_config(folder: str, **keys) -> DataConfig:
    return DataConfig(root=Path(os.environ["DISTSEG_DATA"]) / folder, image_size=64, **keys)


def test_isic2017_is_sound_and_triangles_get_a_ninth_of_its_pixels_wrong(tmp_path):
    samples = read_samples(data_config("isic2017_128"))
    assert [sum(s.split == split for s in samples) for split in ("train", "val", "test")] == [1800, 121, 529]
    assert inspect_files(samples, PLAIN, threads=2).problems == []
    clean, noisy = split_clean(samples, 50, seed=0)
    noisy, rate = write_noisy_masks(noisy, PolygonNoise(vertices=3), tmp_path)
    assert (len(clean), len(noisy)) == (50, 1750)
    assert 0.10 < rate < 0.125


def test_images_are_about_standardised():
    config = data_config("isic2017_128")
    # The constants are of the training images; ids are grouped by source, so that a prefix has a cast of its own.
    samples = [s for s in read_samples(config) if s.split == "train"][::6]
    images = torch.cat([batch.images for batch in evaluation_batches(samples, config, ShardSpec(), 50, CPU)])
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.3
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 0.3


def test_original_resolution_gets_a_split_and_streams():
    config = data_config("isic_original", augment=AugmentConfig(rotate=180, scale=(0.8, 1.2)))
    samples = read_samples(config)
    assert [sum(s.split == split for s in samples) for split in ("train", "val", "test")] == [30, 5, 12]
    assert inspect_files(samples, PLAIN, threads=2).problems == []
    _, noisy = split_clean(samples, 3, seed=0)
    stream = Stream(noisy, "noisy", "noisy", config, 0, ShardSpec(), 4, 1, CPU)
    batch = stream.batch(0, 0)
    stream.close()
    assert batch.images.shape == (4, 3, 64, 64)
    assert 0.01 < batch.masks.float().mean() < 0.8
