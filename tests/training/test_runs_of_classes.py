"""Three classes through the trainer: every method that applies, every ZeRO stage, two ranks as one."""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from distseg.cli.compare import draw
from distseg.config.schema import Config
from distseg.data.decode import read_mask
from distseg.evaluation.metrics import read_counts_csv
from distseg.methods.presets import PRESETS
from distseg.testing.ranks import run_ranks
from distseg.training.checkpoint import load_network
from distseg.training.trainer import Trainer

CLASSES = {"background": 0, "rim": 255, "cell": 128}
"""The inner class last, so that boxes of the rim do not cover it."""
SMOOTH = "tests.training.smooth_network:SmoothNetwork"
METHODS = ("finetune", "pixel_reweight", "label_correction")


def with_a_rim(lesion: np.ndarray) -> np.ndarray:
    """(H, W) file values of CLASSES from {0, 1}: the outermost fifth of an object is its rim."""
    depth = max(1, round(0.1 * np.sqrt(lesion.sum())))
    inside = cv2.erode(lesion, np.ones((3, 3), np.uint8), iterations=depth)
    return np.where(inside > 0, 128, lesion * 255).astype(np.uint8)


def write_three_classes(source: Path, target: Path, counts: dict[str, int]) -> Path:
    """A data set's images with masks of three classes, the first ones of each split."""
    lines, left = ["id,split,image,mask"], dict(counts)
    header, *rows = (source / "manifest.csv").read_text().splitlines()
    for row in rows:
        id, split, image, mask = row.split(",")[:4]
        if left[split] > 0:
            left[split] -= 1
            for folder in ("images", "masks"):
                (target / folder).mkdir(parents=True, exist_ok=True)
            suffix = Path(image).suffix
            (target / f"images/{id}{suffix}").write_bytes((source / image).read_bytes())
            cv2.imwrite(str(target / f"masks/{id}.png"), with_a_rim(read_mask(source / mask)))
            lines.append(f"{id},{split},images/{id}{suffix},masks/{id}.png")
    assert header.startswith("id,split,image,mask") and not any(left.values())
    (target / "manifest.csv").write_text("\n".join(lines) + "\n")
    return target


@pytest.fixture(scope="module")
def drawn(drawn_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_three_classes(drawn_data, tmp_path_factory.mktemp("three"), {"train": 20, "val": 3, "test": 5})


def config_of(name: str, root: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "name": name,
        "data": {
            "root": str(root),
            "image_size": 16,
            "clean_count": 4,
            "pipeline": "torch",
            "noise": {"kind": "box"},
            "classes": CLASSES,
        },
        "model": {"width": 4, "depth": 1, "norm": "group"},
        "optim": {"name": "sgd", "lr": 0.05},
        "train": {"steps": 4, "batch_size": 4, "clean_batch_size": 4, "validate_every": 4},
        "tracking": {"mlflow": False},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    return Config.model_validate(values)


def outcome(config: Config, folder: Path, runtime: Any) -> dict[str, Tensor]:
    """Parameters, test counts and test Dice of a finished run."""
    result = Trainer(config, folder, runtime).run(resume=False)
    _, network = load_network(folder, allow_import=True)
    _, counts, _ = read_counts_csv((folder / "test_counts.csv").read_text())
    scores = torch.tensor([value for key, value in result.items() if key.startswith("test/dice")])
    return {
        "parameters": torch.cat([p.detach().flatten() for p in network.parameters()]),
        "counts": torch.from_numpy(counts),
        "scores": scores,
    }


def train_all(runtime: Any, root: str, folder: str, stages: list[int], methods: list[str], size: int) -> dict:
    """Each method under each stage, of batches that are the same in sum for any number of ranks.

    The network has no kinks, at which rounding would grow: of any other, pixels close to one go the other way.
    """
    share = 4 // runtime.shard.world_size
    found = {}
    for method in methods:
        for stage in stages:
            name = f"{method}-{stage}-{runtime.shard.world_size}"
            config = config_of(
                name,
                Path(root),
                data={"image_size": size},
                model={
                    "name": SMOOTH,
                    "options": {"outputs": len(CLASSES)},
                    "width": None,
                    "depth": None,
                    "norm": None,
                },
                method={"name": method},
                train={"batch_size": share, "clean_batch_size": share},
                deepspeed={"zero_stage": stage},
            )
            of_run = outcome(config, Path(folder) / name, runtime)
            found |= {f"{method}.{stage}.{key}": value for key, value in of_run.items()}
    return found


def compare_ranks(root: Path, folder: Path, stages: list[int], methods: list[str], size: int) -> None:
    [alone] = run_ranks(train_all, 1, str(root), str(folder), [0], methods, size)
    both = run_ranks(train_all, 2, str(root), str(folder), stages, methods, size)
    for actual in both:
        for method in methods:
            for stage in stages:
                of_run = {key: actual[f"{method}.{stage}.{key}"] for key in ("parameters", "counts", "scores")}
                expected = {key: alone[f"{method}.0.{key}"] for key in of_run}
                torch.testing.assert_close(of_run["parameters"], expected["parameters"], rtol=1e-4, atol=1e-6)
                assert of_run["counts"].shape == expected["counts"].shape and of_run["counts"].shape[1:] == (2, 4)
                assert (of_run["counts"] - expected["counts"]).abs().max() <= 1, (method, stage)
                torch.testing.assert_close(of_run["scores"], expected["scores"], rtol=0, atol=0.01)


@pytest.mark.slow
def test_two_ranks_train_three_classes_as_one_does(drawn: Path, tmp_path: Path) -> None:
    compare_ranks(drawn, tmp_path, [0], ["pixel_reweight"], 16)


@pytest.mark.slow
@pytest.mark.skipif("DISTSEG_DATA" not in os.environ, reason="DISTSEG_DATA does not name the folder of the data sets")
@pytest.mark.parametrize("method", METHODS)
def test_cells_with_a_rim_train_under_every_stage(method: str, tmp_path: Path) -> None:
    source = Path(os.environ["DISTSEG_DATA"], "bubil_crowd")
    root = write_three_classes(source, tmp_path / "data", {"train": 16, "val": 3, "test": 5})
    compare_ranks(root, tmp_path, [0, 1, 2, 3], [method], 32)


def train_here(runtime: Any, root: str, folder: str, names: list[str]) -> dict:
    found = {}
    for name in names:
        config = config_of(name, Path(root), method={"name": name})
        found |= {f"{name}.{key}": value for key, value in outcome(config, Path(folder) / name, runtime).items()}
    return found


@pytest.mark.slow
def test_every_method_trains_three_classes(drawn: Path, tmp_path: Path) -> None:
    names = sorted(PRESETS)
    [found] = run_ranks(train_here, 1, str(drawn), str(tmp_path), names)
    for name in names:
        assert found[f"{name}.parameters"].isfinite().all(), name
        assert found[f"{name}.counts"].shape == (5, 2, 4)
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["classes"] == list(CLASSES)
        by_class = [result["test/dice/rim"], result["test/dice/cell"]]
        assert result["test/dice"] == pytest.approx(np.mean(by_class)) and "test/dice/background" not in result
        assert (tmp_path / name / "figures").is_dir()
    assert len({tuple(found[f"{name}.parameters"].tolist()) for name in names}) == len(names)
    assert draw([tmp_path / name for name in names[:2]], allow_import=False).ndim == 3
    masks = sorted((tmp_path / "pixel_reweight" / "noisy_masks").glob("*.png"))
    assert {int(value) for path in masks for value in np.unique(cv2.imread(str(path), -1))} == {0, 128, 255}


def train_twice(runtime: Any, root: str, folder: str) -> dict:
    found = {}
    for name, classes in (("as_ever", None), ("named", {"background": 0, "lesion": [1, 255]})):
        config = config_of(name, Path(root), data={"classes": classes}, method={"name": "pixel_reweight"})
        found |= {f"{name}.{key}": value for key, value in outcome(config, Path(folder) / name, runtime).items()}
    return found


def test_two_classes_by_name_are_the_default_bit_for_bit(drawn_data: Path, tmp_path: Path) -> None:
    [found] = run_ranks(train_twice, 1, str(drawn_data), str(tmp_path))
    for key in ("parameters", "counts", "scores"):
        assert torch.equal(found[f"named.{key}"], found[f"as_ever.{key}"]), key
    tables = [(tmp_path / name / "test_counts.csv").read_bytes() for name in ("named", "as_ever")]
    assert tables[0] == tables[1] and tables[0].startswith(b"id,tp,fp,fn,tn\n")
