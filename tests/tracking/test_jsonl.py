import json
import os

import pytest

from distseg.errors import UserError
from distseg.tracking.jsonl import JsonlLog, read


def write(path, steps, from_step=0):
    log = JsonlLog(path, from_step)
    for step in steps:
        log.log_metrics({"loss": step / 10}, step)
    log.close()


def steps_in(path):
    return [record["step"] for record in read(path)]


def test_each_line_can_be_read_while_the_log_is_open(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path)
    log.log_metrics({"loss": 0.5, "images": 12, "phase": "clean"}, step=3)

    assert read(path) == [{"step": 3, "loss": 0.5, "images": 12, "phase": "clean"}]
    log.close()


def test_values_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path)
    log.log_metrics({"a": float("nan"), "b": float("inf"), "c": -1.5}, step=0)
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"step": 0, "a": None, "b": None, "c": -1.5}


def test_resume_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(6))

    write(path, [4, 5, 6], from_step=4)

    assert steps_in(path) == [0, 1, 2, 3, 4, 5, 6]
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_the_file_afresh(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(6))
    write(path, [0])

    assert steps_in(path) == [0]


@pytest.mark.parametrize("kept", range(1, 20))
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:kept])

    assert steps_in(path) == [0, 1]
    write(path, [2, 3], from_step=2)
    assert steps_in(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("line", ['{"step": 1, "lo', '{"loss": 1}', "[1]", "\x00\x00"])
def test_a_broken_line_elsewhere_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')

    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        read(path)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"{name}: cannot be read .*; put a file in its place"):
            read(tmp_path / name)
