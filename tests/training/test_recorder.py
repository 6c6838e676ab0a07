"""The recorder watches: what it cannot write is told once, and the run goes on."""

import logging
from pathlib import Path

import numpy as np

from distseg.config.schema import Config
from distseg.run_folder import RunFolder
from distseg.training.recorder import RunRecorder


def test_figures_and_metrics_that_cannot_be_written_are_told_once_and_stop_nothing(tmp_path: Path, caplog) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.figure(1).parent.touch()  # a file in the place of the folder
    config = Config.model_validate(
        {"name": "run", "data": {"root": "x"}, "train": {"steps": 4}, "tracking": {"mlflow": False}}
    )
    recorder = RunRecorder(config, folder, steps=4, done=0, main=True)
    with caplog.at_level(logging.WARNING, logger="distseg"):
        for done in (1, 2):
            recorder.figure(done, np.zeros((4, 4, 3), np.uint8))
        recorder.metrics(2, {"train/loss": 0.5})
        recorder.close("FINISHED")
    [said] = caplog.messages
    assert str(folder.figure(1).parent) in said and "the run goes on without it" in said and "\n" not in said
    assert "0.5" in folder.metrics.read_text()


def test_a_folder_that_is_gone_is_told_once_for_each_kind_of_file(tmp_path: Path, caplog) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    config = Config.model_validate(
        {"name": "run", "data": {"root": "x"}, "train": {"steps": 4}, "tracking": {"mlflow": False}}
    )
    recorder = RunRecorder(config, folder, steps=4, done=0, main=True)
    recorder.metrics(1, {"train/loss": 0.5})
    for path in sorted(folder.path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.path.rmdir()
    (tmp_path / "run").touch()  # nothing can be made anew in its place
    with caplog.at_level(logging.WARNING, logger="distseg"):
        for done in (2, 3):
            recorder.metrics(done, {"train/loss": 0.5})
            recorder.figure(done, np.zeros((4, 4, 3), np.uint8))
        recorder.close("FAILED")
    assert 1 <= len(caplog.messages) <= 2
    assert all("the run goes on without it" in said and "\n" not in said for said in caplog.messages)
