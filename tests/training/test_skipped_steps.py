"""A skipped step changes nothing, whatever the preset: parameters, buffers, optimiser, and what a method learns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distseg.config.schema import Config
from distseg.distributed.engine import optimizer_state
from distseg.methods.method import Method
from distseg.methods.presets import PRESETS
from distseg.methods.step import Step
from distseg.testing.ranks import run_ranks
from distseg.training.train_step import train_step
from distseg.training.trainer import Trainer

LEARNERS = {"label_correction": {"warm_up": 0.0, "clean_phase": 0.0}}
"""Keys with which the first steps are of the main phase."""
ONE_PASS = "one_pass"
"""pixel_reweight whose weights come from the step's own pass, and whose clean gradient is added to the update."""


class Poisoned:
    """Steps of a method whose last micro-batch on the last rank holds a NaN."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def begin(self, index: int, diagnose: bool) -> Step:
        step = self.method.begin(index, diagnose)
        if dist.get_rank() + 1 < dist.get_world_size():
            return step
        *first, last = step.micro_batches
        images = last.batch.images.clone()
        images[0, 0, 0, 0] = torch.nan
        step.micro_batches = [*first, replace(last, batch=replace(last.batch, images=images))]
        return step


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    module = {f"module {name}": value for name, value in trainer.engine.module.state_dict().items()}
    optimizer = {f"optimizer {name}": value for name, value in optimizer_state(trainer.engine, dist.get_rank()).items()}
    method = {f"method {name}": value for name, value in trainer.method.state_dict().items()}
    return {name: value.detach().clone() for name, value in (module | optimizer | method).items()}


def skip_a_step(runtime, root: str, folder: str, stage: int) -> dict[str, Tensor]:
    """How many tensors of its state each preset has, and moves in a step that is kept."""
    moved = {}
    for name in (*PRESETS, ONE_PASS):
        method = {"name": name, **LEARNERS.get(name, {})}
        if name == ONE_PASS:
            method = {"name": "pixel_reweight", "include_clean": True}
        accumulation = 1 if name == ONE_PASS else 2
        config = Config.model_validate(
            {
                "name": name,
                "data": {
                    "root": root,
                    "image_size": 16,
                    "clean_count": 4,
                    "pipeline": "torch",
                    "noise": {"kind": "polygon"},
                },
                "model": {"width": 4, "depth": 1, "norm": "batch"},
                "method": method,
                "optim": {"name": "adam", "lr": 0.01},
                "train": {"steps": 4, "batch_size": 2, "clean_batch_size": 2, "accumulation": accumulation},
                "deepspeed": {"zero_stage": stage},
            }
        )
        trainer = Trainer(config, Path(folder, name), runtime)
        train_step(trainer.engine, trainer.method, 0, 0.01)
        before = state_of(trainer)
        skipped = train_step(trainer.engine, Poisoned(trainer.method), 1, 0.01, diagnose=True)
        assert skipped.bad.any(), f"{name}: the step was not skipped"
        after = state_of(trainer)
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert before.keys() == after.keys() and not changed, f"{name}: {changed}"
        assert not train_step(trainer.engine, trainer.method, 2, 0.01).bad.any(), name
        kept = state_of(trainer)
        learned = [key for key in kept if not torch.equal(after[key], kept[key])]
        moved[name] = torch.tensor([len(kept), len(learned), any(key.startswith("method") for key in learned)])
        trainer.close()
    return moved


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_skipped_step_changes_nothing(drawn_data: Path, tmp_path: Path, ranks: int, stage: int) -> None:
    for moved in run_ranks(skip_a_step, ranks, str(drawn_data), str(tmp_path), stage):
        assert moved.keys() == {*PRESETS, ONE_PASS}
        for name, (whole, learned, method) in moved.items():
            assert learned > 0.8 * whole, f"{name}: a step that is kept moves too little for the test to mean anything"
            assert bool(method) == (name in ("label_correction", "meta_weight_net", "t_loss")), name
