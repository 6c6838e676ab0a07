import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("learned_labels")


def row(step: int, drawn: float, learned: float) -> dict[str, float]:
    return {"step": step, "meta/noise_rate": drawn, "meta/corrected_noise_rate": learned}


def test_figures_are_of_the_steps_that_correct(module: ModuleType) -> None:
    rows = [{"step": 5}, row(10, 0.4, 0.4), row(20, 0.2, 0.1), row(30, 0.1, 0.11), row(40, 0.3, 0.303)]
    found = module.figures(rows)
    assert (found["corrects_from"], found["steps"], found["worst_at"], found["above"]) == (20, 3, 30, 1)
    assert found["drawn"] == pytest.approx(0.2) and found["learned"] == pytest.approx(0.171)
    assert found["worst"] == pytest.approx(1.1)
    assert module.figures([row(10, 0.4, 0.4)]) == {"corrects_from": None, "steps": 0}
    assert module.figures([{"step": 5}]) is None
