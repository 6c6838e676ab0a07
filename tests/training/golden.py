"""Losses of 50 steps of five presets on drawn data, one rank: a change of the code that changes numbers shows in them.

python tests/training/golden.py          # writes golden_losses.json anew, when numbers are meant to change
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.data.synthetic import write_dataset
from distseg.testing.ranks import run_ranks
from distseg.training.trainer import Trainer

FILE = Path(__file__).with_name("golden_losses.json")
PRESETS = ("finetune", "pixel_reweight", "label_correction", "meta_weight_net", "t_loss")


def losses(runtime, folder: str) -> dict[str, Tensor]:
    """(50,) float64 by preset."""
    data = Path(folder, "data")
    write_dataset(data, {"train": 40, "val": 4, "test": 4}, size=48, seed=0)
    found = {}
    for name in PRESETS:
        config = Config.model_validate(
            {
                "name": name,
                "data": {
                    "root": str(data),
                    "image_size": 32,
                    "clean_count": 8,
                    "pipeline": "torch",
                    "noise": {"kind": "polygon", "vertices": 3},
                    "augment": {"flip": True},
                },
                # No kinks: what one processor rounds otherwise than another stays as small as it is.
                "model": {"name": "tests.training.smooth_network:SmoothNetwork"},
                # Corrects from the first step on that may: whether it pays is not what is held here.
                "method": {"name": name} | ({"least_gain": -1} if name == "label_correction" else {}),
                "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.5, "schedule": "one_cycle"},
                "train": {
                    "steps": 50,
                    "batch_size": 4,
                    "clean_batch_size": 4,
                    "log_every": 1,
                    "validate_every": 50,
                    "figure_every": 99,
                },
                "tracking": {"mlflow": False},
            }
        )
        Trainer(config, Path(folder, name), runtime).run(resume=False)
        lines = (Path(folder, name) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[name] = torch.tensor([row["train/loss"] for row in rows if "train/loss" in row], dtype=torch.float64)
    return found


def computed() -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        [found] = run_ranks(losses, 1, folder)
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: values.tolist() for name, values in computed().items()}, indent=1) + "\n")
