"""Nothing selects on the test split: it is read once, when the last step is done, and nothing else depends on it."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import torch

from distseg.config.schema import Config
from distseg.testing.ranks import run_ranks


def train(runtime, roots: list[str], folder: str) -> dict[str, torch.Tensor]:
    """What a run on each of the data sets ends with, and when it scored which split."""
    from distseg.training import trainer

    scored: list[tuple[str, int]] = []
    out = {}
    for number, root in enumerate(roots):
        config = Config.model_validate({
            "name": "x",
            "data": {
                "root": root, "image_size": 16, "clean_count": 4, "pipeline": "torch", "noise": {"kind": "polygon"},
            },
            "model": {"width": 4, "depth": 1, "norm": "batch"},
            "optim": {"name": "adam", "lr": 1e-2},
            "train": {"steps": 6, "batch_size": 2, "clean_batch_size": 2, "validate_every": 2},
            "tracking": {"mlflow": False},
        })  # fmt: skip
        run = trainer.Trainer(config, Path(folder) / str(number), runtime)
        score = run.score

        def spy(samples, own, run=run, score=score):
            scored.append((samples[0].split, int(run.engine.global_steps)))
            return score(samples, own)

        run.score = spy
        result = run.run(resume=False)
        kept = {k: v for k, v in result.items() if isinstance(v, float | int) and "second" not in k}
        out |= {f"{number}.{name}": torch.tensor(float(value)) for name, value in kept.items()}
        out |= {f"{number}.{name}": p.detach().clone() for name, p in run.model.state_dict().items()}
        out[f"{number}.best"] = torch.tensor(int((run.folder.checkpoints / "best").read_text()[5:]))
    splits = {"val": 0, "test": 1}
    return out | {"scored": torch.tensor([(splits[split], step) for split, step in scored])}


def test_only_the_test_scores_depend_on_the_test_split(drawn_data: Path, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(drawn_data, other)
    replaced = 0
    for row in (other / "manifest.csv").read_text().splitlines()[1:]:
        _, split, image, mask = row.split(",")[:4]
        if split == "test":
            replaced += 1
            for path in (other / image, other / mask):
                black = np.zeros(cv2.imread(str(path)).shape[:2], np.uint8)
                black[:2] = 255 * (path.suffix == ".png")  # masks that mark nothing are refused
                cv2.imwrite(str(path), black)
    assert replaced == 6

    [out] = run_ranks(train, 1, [str(drawn_data), str(other)], str(tmp_path))
    assert out.pop("scored").tolist() == 2 * [[0, 2], [0, 4], [0, 6], [1, 6]]
    first = {key[2:]: value for key, value in out.items() if key.startswith("0.")}
    second = {key[2:]: value for key, value in out.items() if key.startswith("1.")}
    differing = {key for key in first if not torch.equal(first[key], second[key])}
    assert "test/dice" in differing
    assert all(key.startswith("test/") for key in differing), differing
    assert {"best_val_dice", "best_step", "best"} <= first.keys()
