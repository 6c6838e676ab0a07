"""The demo's last commands, which take a run; training is stood in for."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distseg.cli import demo


def test_the_demo_predicts_and_audits_and_says_where_the_pages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Sequence[str]] = []

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        called.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo, "IMAGES", {"train": 2, "val": 1, "test": 1})
    monkeypatch.chdir(Path(__file__).parents[2])
    assert demo.main(["--folder", str(tmp_path)]) == 0
    words = [next(word for word in command if word in ("distseg.cli.train", "compare", "predict", "audit"))
             for command in called]  # fmt: skip
    assert words == ["distseg.cli.train", "distseg.cli.train", "compare", "predict", "audit"]
    assert f"masks in doubt  {tmp_path / 'audit' / 'report.html'}" in capsys.readouterr().out
