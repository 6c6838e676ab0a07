import sys

import pytest
import torch

from distseg.errors import UserError
from distseg.optim.config import OptimConfig
from distseg.optim.optimizers import build_optimizer
from distseg.optim.schedules import learning_rate

STEPS = 300


def test_step_drops_at_the_milestones_and_not_one_step_early() -> None:
    config = OptimConfig(lr=1.0, schedule="step", milestones=(1 / 3, 2 / 3), gamma=0.1)
    rates = [learning_rate(config, step, STEPS) for step in (0, 99, 100, 199, 200, 299)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_constant_and_cosine() -> None:
    assert learning_rate(OptimConfig(lr=0.5), 123, STEPS) == 0.5
    cosine = OptimConfig(lr=2.0, schedule="cosine")
    assert [learning_rate(cosine, step, STEPS) for step in (0, 150, 300)] == pytest.approx([2, 1, 0])


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_one_cycle_is_torchs(steps: int) -> None:
    config = OptimConfig(lr=2e-3, schedule="one_cycle")
    actual = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 2e-3 for rate in actual)
    if steps >= 10:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        expected = []
        for _ in range(steps):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(expected) < steps:
                scheduler.step()
        assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "cls"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_torch_optimisers_take_over_where_apex_is_absent(name: str, cls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, kind = build_optimizer(
        [parameter], OptimConfig(name=name, lr=0.1, weight_decay=0.01, **({"momentum": 0.9} if name == "sgd" else {}))
    )
    assert (type(optimizer).__name__, kind) == (cls, "torch fused")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.1, 0.01, True)
    assert name != "sgd" or group["momentum"] == 0.9


def test_apex_by_name_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=r"optim.implementation apex: apex is not installed .* build apex from source"):
        build_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(implementation="apex"))


def test_the_apex_of_pypi_is_not_taken_for_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))  # the 2013 web toolkit: no apex.optimizers
    _, kind = build_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig())
    assert kind == "torch fused"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "adam", "momentum": 0.9}, "momentum does nothing with name adam; leave it out, or set .name=sgd"),
        ({"gamma": 0.5}, "gamma does nothing with schedule constant; leave it out, or set .schedule=step"),
        ({"schedule": "cosine", "milestones": [0.5]}, "milestones does nothing with schedule cosine"),
    ],
)
def test_a_key_that_does_nothing_is_refused(keys: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OptimConfig(**keys)
    written = OptimConfig(name="adam", schedule="cosine").model_dump()  # a run's own config has every key
    assert OptimConfig(**written) == OptimConfig(name="adam", schedule="cosine")
