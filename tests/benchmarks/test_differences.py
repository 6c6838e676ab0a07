import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("differences")


def row(method: str, noise: str, clean_count: str, seed: int, dice: float) -> dict[str, str]:
    return {"method": method, "noise": noise, "clean_count": clean_count, "seed": str(seed), "test/dice": str(dice)}


def test_differences_are_of_the_same_seeds(module: ModuleType) -> None:
    rows = [
        row("ours", "box", "10", 0, 0.80),
        row("ours", "box", "10", 1, 0.84),
        row("ours", "box", "10", 2, 0.99),  # which the rival has not run yet
        row("rival", "box", "10", 1, 0.80),
        row("rival", "box", "10", 0, 0.78),
        row("rival", "polygon(3)", "10", 2, 0.10),
        row("noisy_only", "box", "any", 0, 0.70),
        row("clean_only", "any", "10", 0, 0.60),
        row("clean_only", "any", "50", 0, 0.70),
    ]
    rival, noisy, clean = module.differences(rows, "ours", "test/dice")
    assert (rival.rival, rival.seeds) == ("rival", 2)
    assert rival.champion_mean == pytest.approx(0.82) and rival.rival_mean == pytest.approx(0.79)
    assert rival.mean == pytest.approx(0.03) and rival.error == pytest.approx(0.01)
    assert (noisy.rival, noisy.mean) == ("noisy_only", pytest.approx(0.1)) and math.isnan(noisy.error)
    assert (clean.rival, clean.seeds, clean.mean) == ("clean_only", 1, pytest.approx(0.2))
