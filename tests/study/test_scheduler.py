"""The scheduler with runs that are scripts of a few lines; tests/integration/test_sweep.py has real ones."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distseg.config.load import dump_config, load_config
from distseg.errors import UserError
from distseg.study import scheduler
from distseg.study.folder import StudyFolder
from distseg.study.plan import StudyRun, load_study
from distseg.study.scheduler import Parent, Place, lock_file, run_all, share_machine, state_of

PLACE = Place(cores=(min(os.sched_getaffinity(0)),), gpus=())

# What training does as far as a scheduler can see, by the run's method: succeeds, fails, is pre-empted, or waits for
# SIGTERM and ends with some exit code.
RUN = """
import signal, sys, time
from pathlib import Path
_, _, config, _, runs, *resume = sys.argv
folder = Path(runs) / Path(config).stem
folder.mkdir(exist_ok=True)
(folder / "config.yaml").write_text(Path(config).read_text())
print(sys.argv, flush=True)
if "clean_only" in folder.name:
    sys.exit("error: the data are gone")
if "union" in folder.name and not resume:
    sys.exit(75)
for method, code in {"finetune": 75, "t_loss": 0, "image_reweight": 2, "label_correction": 1}.items():
    if method in folder.name:
        def end(*_):
            if code == 0:
                (folder / "result.json").write_text("{}")
            sys.exit(code)
        signal.signal(signal.SIGTERM, end)
        (folder / "waits").touch()
        time.sleep(60)
(folder / "result.json").write_text("{}")
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> Callable[..., tuple[list[StudyRun], StudyFolder]]:
    (tmp_path / "base.yaml").write_text("name: x\ndata: {root: /data}\ntrain: {steps: 10, batch_size: 2}\n")
    monkeypatch.setattr(scheduler, "train_command", lambda ranks, *words: [sys.executable, "-c", RUN, *words])
    caplog.set_level(logging.INFO, logger="distseg")

    def make(*methods: str) -> tuple[list[StudyRun], StudyFolder]:
        values = {
            "name": "s", "base": "base.yaml", "methods": {method: [] for method in methods}, "noise": [{"kind": "box"}],
            "clean_counts": [4], "seeds": [0],
        }  # fmt: skip
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        folder = StudyFolder(tmp_path / "runs" / "s")
        folder.make()
        return load_study(tmp_path / "s.yaml")[1], folder

    return make


def test_a_run_that_fails_is_recorded_and_the_others_go_on(study, caplog) -> None:
    runs, folder = study("clean_only", "noisy_only")
    assert run_all(runs, folder, None, 1, [PLACE]) == 1
    assert [state_of(run, folder) for run in runs] == ["failed", "finished"]
    assert "exit 1: error: the data are gone" in caplog.text
    status = json.loads(folder.status(runs[0].name).read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    caplog.clear()
    assert run_all(runs[1:], folder, None, 1, [PLACE]) == 0
    assert caplog.messages == ["1 of 1 runs have finished before"]


def test_a_preempted_run_stops_the_study_and_goes_on_the_next_time(study, caplog) -> None:
    runs, folder = study("union", "noisy_only")
    assert run_all(runs, folder, None, 1, [PLACE]) == 75
    assert [state_of(run, folder) for run in runs] == ["stopped", "new"]
    assert run_all(runs, folder, None, 1, [PLACE]) == 0
    assert any("goes on" in message and "union" in message for message in caplog.messages)
    assert "--resume" in folder.log(runs[0].name).read_text()


def test_a_signal_ends_the_runs_after_their_checkpoint(study, caplog) -> None:
    runs, folder = study("finetune", "noisy_only")
    waits = folder.run(runs[0].name).path / "waits"

    def interrupt() -> None:
        while not waits.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    code = run_all(runs, folder, None, 1, [PLACE])
    thread.join()
    assert code == 75
    assert [state_of(run, folder) for run in runs] == ["stopped", "new"]
    assert caplog.messages[-1] == "stopped; the same command goes on from here"
    assert signal.getsignal(signal.SIGINT) is before


def places(count: int) -> list[Place]:
    return [Place(PLACE.cores, (str(index),)) for index in range(count)]


@pytest.mark.parametrize(("ranks", "crashed"), [(1, "failed"), (2, "stopped")])
def test_a_run_that_ends_within_the_grace_is_recorded_as_what_it_was(study, ranks: int, crashed: str) -> None:
    runs, folder = study("finetune", "t_loss", "image_reweight", "label_correction", "noisy_only")

    def interrupt() -> None:
        while not all((folder.run(run.name).path / "waits").exists() for run in runs[:4]):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_all(runs, folder, None, ranks, places(4)) == 75
    thread.join()
    # A launcher of several ranks has exit code 1 for SIGTERM.
    assert [state_of(run, folder) for run in runs] == ["stopped", "finished", "failed", crashed, "new"]
    recorded = [json.loads(folder.status(run.name).read_text()) for run in runs[:4]]
    assert [status["exit_code"] for status in recorded] == [75, 0, 2, 1]
    assert [status["state"] for status in recorded] == ["stopped", "finished", "failed", crashed]


def test_an_exception_ends_the_runs_that_are_going_on(study, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, folder = study("finetune", "noisy_only")

    def command(ranks: int, *words: str) -> list[str]:
        if "noisy_only" in words[1]:
            raise OSError("no more processes")
        return [sys.executable, "-c", RUN, *words]

    monkeypatch.setattr(scheduler, "train_command", command)
    with pytest.raises(OSError, match="no more processes"):
        run_all(runs, folder, None, 1, places(2))
    assert state_of(runs[0], folder) == "stopped"
    lock = lock_file(folder.run_lock(runs[0].name), wait=False)
    assert lock is not None  # its process has ended
    lock.close()


def test_each_run_gets_its_place_in_the_study_and_in_the_tracker(study) -> None:
    runs, folder = study("noisy_only")
    assert run_all(runs, folder, Parent("sqlite:///x.db", "abc"), 1, [PLACE]) == 0
    tracking = load_config(folder.config(runs[0].name)).tracking
    assert (tracking.uri, tracking.parent_run, tracking.tags) == ("sqlite:///x.db", "abc", runs[0].tags)


def test_a_run_that_another_scheduler_makes_is_left_to_it_until_its_lock_is_free(study, caplog) -> None:
    runs, folder = study("noisy_only", "oracle")
    held = lock_file(folder.run_lock(runs[0].name), wait=False)
    assert lock_file(folder.run_lock(runs[0].name), wait=False) is None

    def let_go() -> None:
        while not folder.run(runs[1].name).result.exists():
            threading.Event().wait(0.02)
        held.close()

    thread = threading.Thread(target=let_go)
    thread.start()
    assert run_all(runs, folder, None, 1, [PLACE]) == 0
    thread.join()
    started = [message.split()[-1] for message in caplog.messages if "starts" in message]
    assert started == [runs[1].name, runs[0].name]


def test_a_result_of_another_config_is_not_this_runs(study) -> None:
    runs, folder = study("noisy_only")
    files = folder.run(runs[0].name)
    files.path.mkdir()
    files.result.write_text("{}")
    assert state_of(runs[0], folder) == "new"
    files.config.write_text("not a config")
    assert state_of(runs[0], folder) == "stopped"
    other = runs[0].config.model_copy(update={"seed": 7})
    files.config.write_text(dump_config(other))
    assert state_of(runs[0], folder) == "stopped"
    files.config.write_text(dump_config(runs[0].config))
    assert state_of(runs[0], folder) == "finished"


@pytest.mark.parametrize("text", ["", "null", '{"state": "odd"}', "\x00"])
def test_a_status_that_is_none_counts_for_nothing(study, text: str) -> None:
    runs, folder = study("noisy_only")
    folder.status(runs[0].name).write_text(text)
    assert state_of(runs[0], folder) == "new"


def test_shares_of_the_machine_are_disjoint_and_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,8")
    places = share_machine(2, ranks=2)
    assert [(place.cores, place.gpus) for place in places] == [((0, 2, 4), ("3", "7")), ((1, 3), ("5", "8"))]
    assert places[0].environment["CUDA_VISIBLE_DEVICES"] == "3,7"
    with pytest.raises(UserError, match="--parallel 3: it takes a GPU a rank, 6; there are 4"):
        share_machine(3, ranks=2)
    with pytest.raises(UserError, match="--parallel 6: this process has 5 cores"):
        share_machine(6, ranks=1)
