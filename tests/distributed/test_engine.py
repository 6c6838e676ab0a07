import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import distseg.distributed.engine as engine_module
from distseg.distributed.config import DeepSpeedConfig
from distseg.distributed.engine import build_engine, deepspeed_config, gradients_put_away, module_state, shadow_of
from distseg.errors import UserError
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.testing.ranks import run_ranks

OVERLAYS = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))


def told_with(**section) -> dict:
    return deepspeed_config(DeepSpeedConfig(**section), batch_size=3, accumulation=2, precision="fp32")


def engine_of(model: nn.Module, stage: int, precision: str = "fp32", lr: float = 0.01):
    optimizer, _ = build_optimizer(model.parameters(), OptimConfig(name="sgd", momentum=0.0, weight_decay=0.0, lr=lr))
    section = DeepSpeedConfig(zero_stage=stage)
    return build_engine(model, optimizer, section, batch_size=2, accumulation=1, precision=precision)


def test_the_experiment_decides_what_deepspeed_is_told() -> None:
    told = told_with(zero_stage=2, gradient_clipping=1.5)
    assert told["zero_optimization"]["stage"] == 2
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (3, 2)
    assert told["gradient_clipping"] == 1.5


def test_there_are_overlays() -> None:
    assert OVERLAYS


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_adds_to_the_experiment(path: Path) -> None:
    told = told_with(zero_stage=1, config_file=path)
    assert told["zero_optimization"]["stage"] == 1
    assert json.loads(path.read_text()).items() <= {**told, "zero_optimization": _without_stage(told)}.items()


def _without_stage(told: dict) -> dict:
    return {key: value for key, value in told["zero_optimization"].items() if key != "stage"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train_batch_size": 3}', "train_batch_size follows from the experiment's config; remove it"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage follows"),
        ("{", "cannot be read as JSON"),
        ("[1]", "must be JSON objects"),
        ('{"zero_optimization": 3}', "must be JSON objects"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * 2**21, "has more than"),
    ],
)
def test_an_overlay_that_contradicts_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "overlay.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        told_with(config_file=path)


def test_an_overlay_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "gone", Path("/dev/zero")):
        with pytest.raises(UserError, match="cannot be read as JSON"):
            told_with(config_file=path)


def refuse_overlays(_runtime, folder: str) -> dict[str, torch.Tensor]:
    said = {}
    for number, text in enumerate(DEEPSPEED_REFUSES):
        path = Path(folder, f"{number}.json")
        path.write_text(text)
        optimizer, _ = build_optimizer(nn.Conv2d(3, 1, 1).parameters(), OptimConfig())
        section = DeepSpeedConfig(zero_stage=1, config_file=path)
        try:
            build_engine(nn.Conv2d(3, 1, 1), optimizer, section, batch_size=2, accumulation=1, precision="fp32")
        except UserError as error:
            said[text] = torch.tensor(str(error).startswith(f"deepspeed.config_file {path}") and "\n" not in str(error))
    return said


DEEPSPEED_REFUSES = [
    '{"zero_optimization": {"reduce_bucket_size": "many"}}',
    '{"zero_optimization": {"reduce_bucket_size": -1}}',
    '{"zero_optimization": {"no_such_key": 1}}',
    '{"zero_optimization": {"offload_optimizer": 3}}',
    '{"communication_data_type": "x"}',
]


def test_what_deepspeed_refuses_is_one_line_that_names_the_overlay(tmp_path: Path) -> None:
    [said] = run_ranks(refuse_overlays, 1, str(tmp_path))
    assert said.keys() == {*DEEPSPEED_REFUSES} and all(said.values())


def test_the_shadow_shares_tensors_and_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    shadow = shadow_of(model)
    assert all(a is b for a, b in zip(model.parameters(), shadow.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), shadow.buffers(), strict=True))

    def refuse(*_) -> None:
        raise AssertionError("a hook of the model ran on its shadow")

    model.register_forward_hook(refuse)
    model[0].register_forward_pre_hook(refuse)
    shadow(torch.randn(2, 3, 4, 4))


def what_zero3_holds(runtime) -> dict[str, torch.Tensor]:
    engine = engine_of(nn.Conv2d(3, 8, 3), stage=3)
    zero = engine.optimizer
    flats = zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
    shared = [shards.data_ptr() == masters.data_ptr() for shards, masters in flats]
    buffer = zero.grad_partitions_flat_buffer
    buffer.fill_(torch.nan)
    with gradients_put_away(engine):
        away = buffer.untyped_storage().nbytes()
    return {"shared": torch.tensor(shared), "bytes away": torch.tensor(away), "buffer": buffer.clone()}


def test_zero3_holds_its_shards_once_and_no_gradients_between_steps() -> None:
    for held in run_ranks(what_zero3_holds, 2):
        assert held["shared"].all() and len(held["shared"]) > 0
        assert held["bytes away"] == 0
        assert held["buffer"].eq(0).all() and len(held["buffer"]) >= 8 * 3 * 9 / 2


def gathered_in_float64(runtime) -> dict[str, torch.Tensor]:
    from deepspeed.accelerator import get_accelerator

    out = {}
    for fp16 in (False, True):
        get_accelerator().is_fp16_supported = lambda fp16=fp16: fp16  # this machine's processor says one of the two
        torch.manual_seed(0)
        model = nn.Conv2d(3, 8, 3).double()
        expected = model.weight.detach().clone()
        actual = module_state(engine_of(model, stage=3))
        out |= {f"error {fp16}": value - expected for name, value in actual.items() if name == "weight"}
    return out


def test_zero3_takes_float64_on_devices_with_and_without_half_precision_arithmetic() -> None:
    first, _ = run_ranks(gathered_in_float64, 2)
    for error in first.values():
        assert error.dtype == torch.float64 and error.shape == (8, 3, 3, 3) and error.eq(0).all()


def updated_under_autocast(runtime) -> dict[str, torch.Tensor]:
    """By stage: what one update of rate 1 subtracts, the gradient, from the network's parameters; on rank 0."""
    out = {}
    for stage in range(4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 1, 1))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        engine = engine_of(model, stage, "bf16", lr=1.0)
        torch.manual_seed(1 + runtime.shard.rank)
        engine.backward(engine(torch.randn(2, 3, 16, 16)).float().square().mean())
        engine.step()
        out |= {f"{stage} {name}": before[name] - value for name, value in module_state(engine).items()}
    return out


def test_under_autocast_every_stage_reduces_gradients_in_single_precision() -> None:
    gradients, _ = run_ranks(updated_under_autocast, 2)
    for key, actual in gradients.items():
        expected = gradients["0" + key[1:]]
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-5, f"{key}: {error:.1e}"
    assert expected.norm() > 1e-4


def test_an_import_is_kept_away_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with engine_module._without_import_of("colorsys"), pytest.raises(ImportError):
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").rgb_to_hsv
    with engine_module._without_import_of("colorsys"):
        assert importlib.import_module("colorsys").rgb_to_hsv
    assert "colorsys" in sys.modules
