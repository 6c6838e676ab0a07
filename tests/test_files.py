"""Files that are either as they were or complete, and what cannot be written is told in one line."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distseg.errors import StorageError, UserError
from distseg.files import (
    folder_written_atomically,
    open_regular,
    read_regular,
    remove_parts,
    write_atomically,
    written_atomically,
)
from distseg.pages.figures import save_png
from distseg.tracking.jsonl import JsonlLog, read


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), written_atomically(path) as aside:
        aside.write_text("half of the n")
        assert path.read_text() == "old"
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_that_share_host_name_and_process_id_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 4_194_304)
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    path = tmp_path / f"{'n' * 200}.png"  # the longest id
    with written_atomically(path) as first:
        first.write_text("first")
        with written_atomically(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file_and_is_told_in_one_line(small_disk: Path) -> None:
    import numpy as np

    path = small_disk / "result.json"
    write_atomically(path, "old")
    fill(small_disk)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for write in (lambda: write_atomically(path, "x" * 9000), lambda: save_png(noise, path)):
        with pytest.raises(StorageError) as raised:
            write()
        assert str(raised.value) == f"{path}: cannot be written (No space left on device); make room there"
        assert raised.value.errno == errno.ENOSPC
        assert path.read_text() == "old"
    assert sorted(file.name for file in small_disk.iterdir()) == ["ballast", "result.json"]


def test_what_cannot_be_written_is_named_with_a_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path, mend in (
        (tmp_path / "gone" / "a", "its folder is missing"),
        (tmp_path / "file" / "a", "is a file and not a folder"),
        (tmp_path / "folder", "a folder has its name"),
        (tmp_path / ("n" * 300), "choose a shorter name"),
    ):
        with pytest.raises(StorageError) as raised:
            write_atomically(path, "x")
        assert str(raised.value).startswith(f"{path}: cannot be written (") and mend in str(raised.value)
        assert "\n" not in str(raised.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder"]


def test_the_parts_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from distseg.files import written_atomically
with written_atomically(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    kept = folder / "figures" / "whole.png"
    subprocess.run([sys.executable, "-c", code, str(kept)])
    assert len(list(folder.rglob("*.part"))) == 1
    (folder / "checkpoints" / "step_00000003.part").mkdir(parents=True)
    kept.write_text("whole")
    remove_parts(folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == [kept]
    assert not list((folder / "checkpoints").iterdir())


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "."):
        with pytest.raises(OSError, match=r"is not a regular file|Is a directory"):
            open_regular(tmp_path / name)
    (tmp_path / "a").write_bytes(bytes(10))
    assert read_regular(tmp_path / "a", 10) == bytes(10)
    with pytest.raises(OSError, match="a has more than 9 bytes"):
        read_regular(tmp_path / "a", 9)


def test_a_log_on_a_full_disk_keeps_whole_lines_and_writes_the_others_later(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    log = JsonlLog(path)
    log.log_metrics({"text": "x" * 4000}, 0)
    ballast = fill(small_disk)
    for step in (1, 2):
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            log.log_metrics({"text": "x" * 4000}, step)
        assert [record["step"] for record in read(path)] == [0]
        assert path.read_bytes().endswith(b"}\n")
    ballast.unlink()
    log.log_metrics({"a": 1}, 3)
    log.close()
    assert [record["step"] for record in read(path)] == [0, 1, 2, 3]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with folder_written_atomically(tmp_path / "new") as folder:
        assert folder.name == "new"
        (folder / "in").mkdir()
        (folder / "in/file").write_text("x")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new/in/file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_folder_whose_writer_fails_is_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), folder_written_atomically(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with folder_written_atomically(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty/file").exists()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for taken in ("empty", "empty/file", "link"):
        with pytest.raises(UserError, match="is there already"), folder_written_atomically(tmp_path / taken):
            raise AssertionError("it began")
    with pytest.raises(UserError, match="is there already"), folder_written_atomically(Path()):
        raise AssertionError("it began")
    with pytest.raises(UserError, match="does not exist"), folder_written_atomically(tmp_path / "no/new"):
        raise AssertionError("it began")


def test_a_folder_on_a_full_disk_is_told_in_one_line(small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"new: cannot be written \(No space.*make room there"):  # noqa: SIM117
        with folder_written_atomically(small_disk / "new") as folder:
            (folder / "file").write_bytes(bytes(2**16))
    assert not list(small_disk.iterdir())
