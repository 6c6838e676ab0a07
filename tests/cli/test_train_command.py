from pathlib import Path
from types import ModuleType

import pytest

from distseg.cli import train
from distseg.errors import BadFileError, UserError


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    config = tmp_path / "c.yaml"
    config.write_text("name: x\ndata: {root: /data}\ntrain: {steps: 1}\n")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    return train


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [("0", UserError, True), ("1", UserError, False), ("0", BadFileError, True), ("1", BadFileError, True)],
)
def test_who_tells_what_a_user_can_mend(
    entry_point: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    variable: str,
    rank: str,
    error: type[UserError],
    told: bool,
) -> None:
    def fail(*_) -> int:
        raise error("the thing and its mend")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, rank)
    monkeypatch.setattr(entry_point, "run", fail)
    assert entry_point.main() == 2
    assert capsys.readouterr().err == ("error: the thing and its mend\n" if told else "")
