"""`distseg sweep` where its runs are made already; tests/integration/test_sweep.py makes them."""

import json
from pathlib import Path

import pytest
import yaml

from distseg.cli.sweep import main
from distseg.config.load import dump_config
from distseg.errors import UserError
from distseg.study.plan import load_study
from distseg.tracking import mlflow


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The file of a study whose runs lie finished in runs/."""
    (tmp_path / "base.yaml").write_text("name: x\ndata: {root: /data}\ntrain: {steps: 10, batch_size: 2}\n")
    values = {
        "name": "s", "base": "base.yaml", "methods": {"noisy_only": [], "oracle": []}, "noise": [{"kind": "box"}],
        "clean_counts": [4], "seeds": [0, 1],
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    for run in load_study(tmp_path / "s.yaml")[1]:
        folder = tmp_path / "runs" / "s" / run.name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(run.config))
        (folder / "result.json").write_text(json.dumps({"method": run.method, "test/dice": 0.5, "best_val_dice": 0.5}))
        (folder / "test_counts.csv").write_text("id,tp,fp,fn,tn\na,1,1,1,1\nb,2,1,1,0\n")
    return tmp_path / "s.yaml"


class GoneLater:
    """An MLflow that answers until the runs are made."""

    uri, run_id = "http://127.0.0.1:9", "abc"

    @classmethod
    def open(cls, *_) -> "GoneLater":
        return cls()

    def log_file(self, path: Path, folder: str | None = None) -> None:
        if folder == "report":
            raise UserError("mlflow at http://127.0.0.1:9: gone")

    def log_metrics(self, metrics: dict) -> None:
        raise UserError("mlflow at http://127.0.0.1:9: gone")


def test_a_server_that_goes_while_the_runs_are_made_costs_no_report(study, tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(mlflow, "Study", GoneLater)
    assert main([str(study), "--runs-dir", str(tmp_path / "runs")]) == 0
    assert (tmp_path / "runs" / "s" / "report" / "report.html").exists()
    assert "report.html" in capsys.readouterr().out
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["mlflow at http://127.0.0.1:9: gone"] * 2


def test_the_list_names_each_run_with_its_state(study, tmp_path, capsys):
    assert main([str(study), "--runs-dir", str(tmp_path / "runs"), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[str(index), "finished"] for index in range(4)]
    assert main([str(study), "--runs-dir", str(tmp_path / "elsewhere"), "--list"]) == 0
    assert capsys.readouterr().out.count("  new  ") == 4


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "test_counts.csv"])
def test_a_run_folder_that_is_damaged_is_named_in_one_line(study, tmp_path, name):
    victim = sorted((tmp_path / "runs" / "s").glob("oracle*"))[0]
    (victim / name).write_bytes(b"\xff{\n")
    arguments = [str(study), "--runs-dir", str(tmp_path / "runs"), "tracking.mlflow=false", "--report"]
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert victim.name in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
