"""One process at a time in a run folder, and what it says to a second one."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distseg.errors import StorageError, UserError
from distseg.run_lock import run_lock

HOLD = """
import sys
from pathlib import Path
from distseg.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_start_is_refused_with_host_and_process_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "name"
    holder = hold(folder)
    part = folder / ".config.yaml.1.part"
    part.touch()  # of the run that goes on
    for _ in range(2):  # the refused one changes nothing
        with pytest.raises(UserError) as raised, run_lock(folder):
            pass
        said = str(raised.value)
        assert said.startswith(f"{folder}: process {holder.pid} on {socket.gethostname()!r} (since ")
        assert "choose another name=" in said and "\n" not in said
    assert part.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(folder):
        assert not part.exists()
        assert f'"process": {os.getpid()}' in (folder / "run.lock").read_text()
    with run_lock(folder):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": "x"}', "[" * 100_000])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path, content: str) -> None:
    holder = hold(tmp_path)
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(UserError, match="another process trains this run now"), run_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass
    assert "has no locks (No locks available); make sure that another process does not" in caplog.messages[0]
    assert f"make sure that process {os.getpid()} on " in caplog.messages[1]


def test_a_start_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "runs" / "name"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "runs" / "name"):
        (tmp_path / "runs" / "name" / "config.yaml").touch()
        1 / 0  # noqa: B018
    assert sorted(path.name for path in (tmp_path / "runs" / "name").iterdir()) == ["config.yaml", "run.lock"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(StorageError, match="is a file and not a folder"), run_lock(tmp_path / "runs" / "name"):
        pass
    with pytest.raises(StorageError, match="choose a shorter name"), run_lock(tmp_path / ("n" * 300)):
        pass


def test_a_full_disk_is_a_failure_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"run\.lock.*No space left on device"), run_lock(tmp_path / "run"):
        pass
