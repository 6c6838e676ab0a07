"""Batches from JPEGs and PNGs: DALI with the GPU's decoder, images kept on the GPU, and the loader on the CPU."""

import tempfile
import time
from pathlib import Path

import torch

from distseg.data.config import DataConfig
from distseg.data.streams import Stream
from distseg.data.survey import read_samples
from distseg.data.synthetic import write_dataset
from distseg.distributed.ranks import ShardSpec
from gpu_stages.findings import Findings, Setting

LOADERS = {
    "torch": {"pipeline": "torch"},
    "DALI, decoded each time": {"pipeline": "dali", "device_memory": 0.0},
    "DALI, images kept on the device": {"pipeline": "dali"},
}


def measure(setting: Setting, findings: Findings) -> None:
    """Nothing is kept in the host's memory, so that every image is decoded, but for those kept on the device."""
    device = torch.device(setting.device)
    side, count, size = (48, 8, 16) if setting.tiny else (512, 48, 96)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, "data"), {"train": count, "val": 1, "test": 1}, size=side, seed=0)
        config = DataConfig(root=Path(folder, "data"), image_size=size, memory=0)
        samples = [sample for sample in read_samples(config) if sample.split == "train"]
        for name, keys in LOADERS.items():
            own = config.model_copy(update=keys)
            stream = Stream(samples, "true", "train", own, 0, ShardSpec(), 6, 1, device)
            speed = images_per_second(stream, 6, 4 if setting.tiny else 80)
            stream.close()
            findings.add(f"{side}² to {size}², batches of 6", {"loader": name, "images/s": speed})


def images_per_second(stream: Stream, batch: int, steps: int) -> float:
    """After an epoch to warm up: what was made ahead before the clock started is little beside what is timed."""
    warm_up = 8
    for step in range(warm_up + steps):
        if step == warm_up:
            started = time.perf_counter()
        images = stream.batch(step, 0).images
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return steps * batch / (time.perf_counter() - started)
