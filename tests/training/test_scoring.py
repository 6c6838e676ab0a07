"""Scores in every shape: what the network marks, of whole files, the same on one rank and on two."""

import resource
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from distseg.data.config import DataConfig
from distseg.data.sample import Sample
from distseg.distributed.runtime import Runtime
from distseg.testing.ranks import run_ranks
from distseg.training.scoring import score

SHAPES = {"squash": {}, "letterbox": {}, "crop": {"scale": 0.7, "overlap": 0.5}}


class Redness(nn.Module):
    """Pointwise: foreground where the red channel is above its mean. Counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.passes, self.largest = 0, 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        self.largest = max(self.largest, images.numel())
        return images[:, :1]


def write(folder: Path, sizes: list[tuple[int, int]]) -> list[Sample]:
    """Images that are red where the mask, a noise with an edge of 5 pixels, is 1 and black elsewhere."""
    samples = []
    for number, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(number)
        cells = rng.integers(0, 2, (-(-height // 5), -(-width // 5)), np.uint8)
        mask = np.kron(cells, np.ones((5, 5), np.uint8))[:height, :width]
        Image.fromarray(mask[..., None] * np.uint8((255, 0, 0))).save(folder / f"{number}_image.png")
        Image.fromarray(mask * 255).save(folder / f"{number}_mask.png")
        samples.append(Sample(f"{number}", "test", folder / f"{number}_image.png", folder / f"{number}_mask.png"))
    return samples


def test_a_large_image_is_scored_by_tiles_each_pixel_once_in_bounded_memory(tmp_path):
    [out] = run_ranks(score_large, 1, str(tmp_path))
    mask = np.asarray(Image.open(tmp_path / "0_mask.png")) > 0
    expected = [mask.sum(), 0, 0, (~mask).sum()]
    assert out["network"].tolist() == out["own"].tolist() == [expected]
    assert out["largest"] == 4 * 3 * 64**2
    # 6 million pixels: 72 MB of float32 input, read two ahead, and 48 MB of sums; not the tiles, which would be 130 MB.
    assert out["megabytes"] < 400


def score_large(runtime: Runtime, folder: str) -> dict[str, Tensor]:
    samples = write(Path(folder), [(2000, 3000)])
    model, config = Redness(), DataConfig(root=folder, image_size=64, shape="crop", pipeline="torch")
    warm = write(Path(folder) / "..", [(70, 70)])
    score(model, warm, config, runtime, 4, sharded=False, own=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = score(model, samples, config, runtime, 4, sharded=False, own=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "network": torch.from_numpy(counts.network),
        "own": torch.from_numpy(counts.own),
        "largest": torch.tensor(model.largest),
        "megabytes": torch.tensor(grown / 1024),
    }


SIZES = [(int(height), int(width)) for height, width in np.random.default_rng(0).integers(20, 150, (7, 2))]


def score_all(runtime: Runtime, folder: str) -> dict[str, Tensor]:
    """Every shape by a network with neighbours, sharded or not; and how many passes each took."""
    samples = write(Path(folder), SIZES) if runtime.is_main else []
    if runtime.shard.world_size > 1:
        torch.distributed.barrier()
    samples = samples or [
        Sample(f"{n}", "test", Path(folder) / f"{n}_image.png", Path(folder) / f"{n}_mask.png") for n in range(7)
    ]
    torch.manual_seed(0)
    counting, out = Redness(), {}
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 5, padding=2), counting)
    for shape, keys in SHAPES.items():
        config = DataConfig(root=folder, image_size=32, shape=shape, pipeline="torch", **keys)
        for sharded in (False, True):
            counting.passes = 0
            counts = score(model, samples, config, runtime, 3, sharded, own=True)
            out[f"{shape}.{sharded}.network"] = torch.from_numpy(counts.network)
            out[f"{shape}.{sharded}.own"] = torch.from_numpy(counts.own)
            out[f"passes.{shape}.{sharded}"] = torch.tensor(counting.passes)
    return out


def test_two_ranks_count_what_one_rank_counts(tmp_path):
    [one] = run_ranks(score_all, 1, str(tmp_path))
    two = run_ranks(score_all, 2, str(tmp_path))
    counts = {key: value.tolist() for key, value in one.items() if not key.startswith("passes")}
    for rank in two:
        assert {key: value.tolist() for key, value in rank.items() if not key.startswith("passes")} == counts
    for shape, keys in SHAPES.items():
        frame = DataConfig(root=tmp_path, image_size=32, shape=shape, **keys).frame
        places = [frame.place(*size) for size in SIZES]
        network = np.sum(counts[f"{shape}.False.network"], axis=1)  # every pixel that is not padding, once
        assert network.tolist() == [place.height * place.width for place in places]
        assert np.sum(counts[f"{shape}.False.own"], axis=1).tolist() == [height * width for height, width in SIZES]
        assert counts[f"{shape}.True.own"] == counts[f"{shape}.False.own"]
        # Where a forward pass gathers parameters, every rank takes part in every pass.
        assert two[0][f"passes.{shape}.True"] == two[1][f"passes.{shape}.True"]
    assert two[0]["passes.crop.False"] != two[1]["passes.crop.False"]
