import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "method,noise,clean_count,seed,noise_rate,test/dice\n"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("noise_levels")


def test_runs_of_several_studies_make_one_curve(module: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text(
        HEAD + "ours,box,50,0,0.2,0.80\nours,box,50,1,0.2,0.84\nours,box,10,0,0.2,0.1\noracle,any,any,0,0,0.9\n"
    )
    second.write_text(
        HEAD + "ours,box,50,0,0.2,0.99\nours,polygon(7),50,0,0.1,0.86\nours,polygon(7),50,1,0.1,0.88\n"
        "late,box,50,1,0.2,0.5\nours,box,50,7,0.2,0.3\n"
    )
    rows = module.read_rows([first, second])
    ours = module.curve(rows, "ours", "50", ["0", "1"])
    assert list(ours) == ["polygon(7)", "box"]  # from the least wrong
    assert ours["box"] == pytest.approx((0.2, 0.82, 0.04 / 2**0.5, 2))
    assert module.curve(rows, "oracle", "50", ["0", "1"])["polygon(7)"] == pytest.approx((0.1, 0.9, 0, 1))
    assert list(module.curve(rows, "late", "50", ["0", "1"])) == ["box"]
