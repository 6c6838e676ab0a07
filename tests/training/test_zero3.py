"""The trainer under ZeRO-3 beside the trainer that shards nothing: updates, figures, and ranks with unequal batches."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

pytestmark = pytest.mark.slow
METHODS = (
    {"name": "pixel_reweight", "virtual_lr": 0.1, "initial_weight": 1.0},
    {"name": "image_reweight", "estimator": "head"},
    {"name": "label_correction", "warm_up": 0.0},
)
SCORED = 9
"""Of 20: on two ranks 4 and 5, in batches of 4."""


def train(runtime, root: str, folder: str) -> dict[str, Tensor]:
    out = {}
    for method, stage in itertools.product(METHODS, (0, 3)):
        config = Config.model_validate(
            {
                "name": "t",
                "data": {
                    "root": root,
                    "image_size": 16,
                    "clean_count": 4,
                    "pipeline": "torch",
                    "noise": {"kind": "box"},
                },
                "model": {"width": 4, "depth": 1, "norm": "batch"},
                "method": method,
                "train": {"steps": 2, "batch_size": 2, "clean_batch_size": 2, "accumulation": 2},
                "optim": {"lr": 0.05},
                "deepspeed": {"zero_stage": stage},
            }
        )
        trainer = Trainer(config, Path(folder), runtime)
        for step in range(2):
            outcome = train_step(trainer.engine, trainer.method, step, 0.05, diagnose=True)
            key = f"{method['name']}.{stage}.{step}"
            out[f"{key}.loss"] = outcome.loss
            out |= {f"{key}.{name}": value for name, value in outcome.diagnostics.items()}
            out[f"{key}.figure"] = torch.from_numpy(trainer.draw(outcome.step.micro_batches[0], "caption"))
            out[f"{key}.counts"] = torch.from_numpy(trainer.score(trainer.splits.noisy[:SCORED], own=False).network)
        assert "parameters" in trainer.rehearse() and trainer.parameter_count > 1000
    return out


def test_sharded_training_is_training(drawn_data: Path, tmp_path: Path) -> None:
    ranks = run_ranks(train, 2, str(drawn_data), str(tmp_path))
    for actual in ranks:
        for key, value in actual.items():
            method, stage, rest = key.split(".", 2)
            if stage == "3":
                expected = actual[f"{method}.0.{rest}"]
                if rest.endswith("figure"):
                    assert (value != expected).float().mean() < 0.01, key
                elif rest.endswith("counts"):
                    assert value.shape == (SCORED, 4) and (value - expected).abs().max() <= 1, key
                else:
                    assert value.item() == pytest.approx(expected.item(), rel=1e-4), key
    for key, value in ranks[0].items():
        if key.endswith("counts"):
            assert torch.equal(value, ranks[1][key])
