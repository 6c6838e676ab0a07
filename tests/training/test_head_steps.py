"""Steps by the estimator `head`, whose weights come from the step's own pass, are steps by passes of their own.

On one rank without sharding and on two at each ZeRO stage, with the clean images for the weights alone and in the loss.
"""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distseg.config.schema import Config
from distseg.distributed.engine import module_state
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

pytestmark = pytest.mark.slow
STEPS = 3


def train(runtime, root: str, folder: str, stages: list[int], one_pass: bool) -> dict[str, Tensor]:
    out = {}
    for stage, include_clean in itertools.product(stages, (False, True)):
        size = 4 // runtime.shard.world_size
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
                "model": {"width": 4, "depth": 1, "norm": "group"},
                "method": {"estimator": "head", "one_pass": one_pass, "include_clean": include_clean},
                "train": {"steps": STEPS, "batch_size": size, "clean_batch_size": size},
                "optim": {"lr": 0.05},
                "deepspeed": {"zero_stage": stage, "gradient_clipping": 0.5},
            }
        )
        trainer = Trainer(config, Path(folder), runtime)
        for step in range(STEPS):
            outcome = train_step(trainer.engine, trainer.method, step, 0.05, diagnose=True)
            out |= {f"{stage}.{include_clean}.{step}.{k}": v for k, v in outcome.diagnostics.items()}
        out |= {f"{stage}.{include_clean}.end.{k}": v for k, v in module_state(trainer.engine).items()}
        trainer.close()
    return {name: value.double() for name, value in out.items()}


def test_one_pass_on_ranks_and_shards_is_passes_of_their_own(drawn_data: Path, tmp_path: Path) -> None:
    [expected] = run_ranks(train, 1, str(drawn_data), str(tmp_path), [0], False)
    [alone] = run_ranks(train, 1, str(drawn_data), str(tmp_path), [0], True)
    ranks, _ = run_ranks(train, 2, str(drawn_data), str(tmp_path), [0, 1, 2, 3], True)
    assert any(key.startswith("0.True.end.head") for key in expected)
    for key, actual in (alone | ranks).items():
        right = expected["0." + key.split(".", 1)[1]]
        # A bias before a normalisation of its channel has no gradient but rounding.
        scale = max(right.abs().max().item(), 1e-2)
        torch.testing.assert_close(actual, right, rtol=0, atol=1e-5 * scale, msg=key)
