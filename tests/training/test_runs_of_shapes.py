"""Letterboxed and cropped runs from end to end: resumed, on two ranks, and what they write."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distseg.config.schema import Config
from distseg.distributed.runtime import Runtime
from distseg.evaluation.metrics import read_counts_csv
from distseg.testing.ranks import run_ranks

SHAPES = {"letterbox": {"score_own": "always"}, "crop": {"scale": 0.5}}
TEST_IMAGES = 4


def write_data(root: Path) -> None:
    """20 ellipses in files of 20 sizes, from smaller than the network's input to three times as large."""
    rng, rows = np.random.default_rng(0), ["id,split,image,mask"]
    for number in range(20):
        height, width = (int(side) for side in rng.integers(25, 100, 2))
        row, column = np.mgrid[:height, :width]
        mask = ((row / height - 0.5) ** 2 + (column / width - rng.uniform(0.4, 0.6)) ** 2 < 0.1).astype(np.uint8)
        image = np.clip(rng.normal(200 - 100 * mask[..., None], 10, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / f"{number}.png")
        Image.fromarray(mask * 255).save(root / f"{number}_mask.png")
        split = "val" if number < 4 else "test" if number < 4 + TEST_IMAGES else "train"
        rows.append(f"s{number},{split},{number}.png,{number}_mask.png")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")


def train(runtime: Runtime, root: str, folder: str) -> dict[str, Tensor]:
    """What runs in each shape end with: uninterrupted, and on one rank also stopped after step 3 and resumed."""
    from distseg.training.trainer import Preempted, Trainer

    out = {}
    for shape, keys in SHAPES.items():
        for stopped in (False, True)[: 2 // runtime.shard.world_size]:
            config = Config.model_validate({
                "name": "x",
                "data": {
                    "root": root, "image_size": 32, "clean_count": 4, "pipeline": "torch", "shape": shape,
                    "noise": {"kind": "polygon"}, "augment": {"flip": True, "rotate": 90.0}, **keys,
                },
                "model": {"width": 4, "depth": 1, "norm": "batch"},
                "method": {"name": "pixel_reweight"},
                "optim": {"name": "sgd", "lr": 0.05},
                "train": {
                    "steps": 6, "batch_size": 4 // runtime.shard.world_size,
                    "clean_batch_size": 4 // runtime.shard.world_size, "validate_every": 3,
                },
                "tracking": {"mlflow": False},
            })  # fmt: skip
            own = Path(folder) / f"{shape}{stopped}"
            if stopped:
                steps = iter(range(100))
                with suppress(Preempted):
                    Trainer(config, own, runtime).run(resume=False, stop_agreed=lambda steps=steps: next(steps) == 2)
            trainer = Trainer(config, own, runtime)
            trainer.run(resume=stopped)
            out |= {f"{shape}.{stopped}.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    return out


@pytest.mark.slow
def test_runs_are_resumed_bit_for_bit_and_two_ranks_are_one(tmp_path):
    write_data(tmp_path)
    folders = [tmp_path / "one", tmp_path / "two"]
    [one] = run_ranks(train, 1, str(tmp_path), str(folders[0]))
    two, _ = run_ranks(train, 2, str(tmp_path), str(folders[1]))
    for key, value in two.items():
        # Padding is flat: rounding decides which of its equal pixels max-pooling takes. On one rank, noise of 1e-7 on
        # the images moves a letterbox's parameters as far.
        tolerance = 2e-3 if key.startswith("letterbox") else 1e-5
        torch.testing.assert_close(one[key], value, rtol=tolerance, atol=tolerance, msg=key)
        assert torch.equal(one[key], one[key.replace("False", "True")]), key

    for shape in SHAPES:
        run = folders[0] / f"{shape}False"
        result = json.loads((run / "result.json").read_text())
        assert {"test/dice", "test/own/dice", "test/own/dice_low"} <= result.keys()
        assert ("val/own/dice" in (run / "metrics.jsonl").read_text()) == (shape == "letterbox")
        for name in ("test_counts.csv", "test_counts_own.csv"):
            ids, counts = read_counts_csv((run / name).read_text())[:2]
            assert len(ids) == TEST_IMAGES
            again = (folders[0] / f"{shape}True" / name).read_text()
            assert again == (run / name).read_text()
        sizes = [Image.open(tmp_path / f"{id[1:]}.png").size for id in ids]
        assert counts.sum(axis=1).tolist() == [width * height for width, height in sizes]
