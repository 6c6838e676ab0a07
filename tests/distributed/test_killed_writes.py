"""A process that is killed at any write, flush, rename or removal leaves the checkpoint before or the one after.

Every boundary of every case is tried: a child is forked, meets SIGKILL at its n-th one, and what it leaves is read.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distseg.config.schema import Config
from distseg.files import remove_parts
from distseg.testing.ranks import run_ranks
from distseg.testing.steps import GivenSteps
from distseg.tracking import jsonl
from distseg.training.checkpoint import find_checkpoint, save_checkpoint

BOUNDARIES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
"""Audit events before an operation; fsync and the middle of a write have none and are counted as well."""


def killed_at(boundary: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a child that is killed at its `boundary`-th boundary; False where it ended before that."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"boundary {boundary}: {status}"
        return os.WIFSIGNALED(status)
    left = boundary

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in BOUNDARIES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            step()

    flush, write = os.fsync, Path.write_bytes

    def fsync(descriptor: int) -> None:
        step()
        flush(descriptor)

    def write_bytes(path: Path, content: bytes) -> int:
        write(path, content[: len(content) // 2])
        step()
        return write(path, content)

    os.fsync, Path.write_bytes = fsync, write_bytes
    sys.addaudithook(audit)
    try:
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def make_engine(step: int) -> Any:
    """Of a network whose parameters say which step they are of."""
    model = nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(step))
    return SimpleNamespace(module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def step_on_disk(folder: Path) -> int:
    """The step of the checkpoint that a start would go on from, 0 for none; its tensors must be of that step."""
    found = find_checkpoint(folder)
    if found is None:
        return 0
    step = int(found.name.removeprefix("step_"))
    assert all((tensor == step).all() for tensor in load_file(found / "model.safetensors").values())
    return step


CASES = [
    ([1, 2], 2, None, 3),
    ([], 1, None, 1),
    ([1], 1, None, 2),
    ([1, 2, 3], 1, None, 4),
    ([1, 2, 3], 3, 2, 3),
    ([1, 2], 1, None, 3),
    ([1, 2, 3], 2, None, 4),
    ([1, 2, 3], 1, 2, 3),
]
"""Steps that lie there, the one that is the best, where `last` is set back to, and the step that is written."""


def kill_checkpoints(runtime: Any, folder: str, cases: int) -> dict[str, torch.Tensor]:
    config = Config.model_validate(
        {"name": "test", "data": {"root": "."}, "train": {"steps": 9, "keep_checkpoints": 2}}
    )
    runs, kills = Path(folder), 0

    def save(target: Path, step: int, best: bool = False) -> None:
        assert save_checkpoint(
            target, make_engine(step), GivenSteps([], [], list), {"step": step}, config, runtime, best
        )

    for before, best, last, step in CASES[:cases]:
        start = runs / "start"
        start.mkdir()
        for earlier in before:
            save(start, earlier, earlier == best)
        if last:
            (start / "last").write_text(f"step_{last:08d}")
        goes_on_from = step_on_disk(start)
        boundary = 0
        while True:
            boundary += 1
            target = runs / "run"
            shutil.copytree(start, target)
            if not killed_at(boundary, lambda target=target, step=step, best=best: save(target, step, step == best)):
                break
            kills += 1
            assert step_on_disk(target) in (goes_on_from, step), f"{before} + {step}, boundary {boundary}"
            remove_parts(target)
            assert not list(target.rglob("*.part"))
            save(target, step, step == best)
            assert step_on_disk(target) == step
            assert (target / "best").read_text() == f"step_{best:08d}"
            shutil.rmtree(target)
        assert step_on_disk(target) == step
        shutil.rmtree(target)
        shutil.rmtree(start)
    return {"kills": torch.tensor(kills)}


@pytest.mark.parametrize(("cases", "least"), [(1, 30), pytest.param(len(CASES), 300, marks=pytest.mark.faults)])
def test_a_checkpoint_that_is_killed_anywhere_leaves_the_one_before_or_the_one_after(
    tmp_path: Path, counted, cases: int, least: int
) -> None:
    kills = int(run_ranks(kill_checkpoints, 1, str(tmp_path), cases)[0]["kills"])
    assert kills >= least
    if cases > 1:
        counted("kills at write boundaries of checkpoints", kills)


def kill_logs(_runtime: Any, folder: str) -> dict[str, torch.Tensor]:
    path, kills = Path(folder) / "metrics.jsonl", 0

    def write() -> None:
        log = jsonl.JsonlLog(path, from_step=5)
        for step in range(5, 9):
            log.log_metrics({"new": step}, step)
        log.close()

    boundary = 0
    while True:
        boundary += 1
        log = jsonl.JsonlLog(path)
        for step in range(8):
            log.log_metrics({"old": step}, step)
        log.close()
        if not killed_at(boundary, write):
            break
        kills += 1
        records = jsonl.read(path)
        assert [record["step"] for record in records] in ([*range(5)], [*range(8)]), f"boundary {boundary}"
    assert [record["step"] for record in jsonl.read(path)] == [*range(9)]
    assert all("new" in record for record in jsonl.read(path)[5:])
    return {"kills": torch.tensor(kills)}


def test_a_log_that_is_killed_anywhere_stays_whole(tmp_path: Path, counted) -> None:
    kills = int(run_ranks(kill_logs, 1, str(tmp_path))[0]["kills"])
    assert kills >= 5
    counted("kills at write boundaries of the log of metrics", kills)
