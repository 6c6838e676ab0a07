import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from distseg.config.load import dump_config, flatten_config
from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.testing.forked import start_script
from distseg.tracking.jsonl import JsonlLog
from distseg.tracking.mlflow import MlflowTracker, Study


def make_config(uri, tracking=None, **values):
    return Config.model_validate(
        {
            "name": "triangles-k50",
            "seed": 7,
            "data": {"root": "sample", "clean_count": 50, "noise": {"kind": "polygon", "vertices": 3}},
            "train": {"steps": 10},
            "tracking": {
                "uri": uri,
                "experiment": "noise levels",
                "system_metrics": False,
                "patience": 120,
                **(tracking or {}),
            },
            **values,
        }
    )


@pytest.fixture
def unmade_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # artifacts of a sqlite store go to ./mlruns
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def store(unmade_store, empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return unmade_store


def told(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("distseg")]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_run_and_its_resumption(store, tmp_path, caplog):
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    folder.mkdir()
    config = make_config(store)
    artifact = folder / "result.json"
    artifact.write_text("{}")

    tracker = MlflowTracker(config, folder)
    tracker.log_metrics({"train/loss": 0.75, "train/norm": float("inf")}, step=1)
    tracker.log_image(np.zeros((6, 8, 3), dtype=np.uint8), "panel", step=1)
    tracker.log_artifact(artifact)
    tracker.finish("KILLED")

    client = MlflowClient(store)
    run_id = (folder / "mlflow_run_id").read_text().strip()
    run = client.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.info.run_name == "triangles-k50"
    assert client.get_experiment(run.info.experiment_id).name == "noise levels"
    flat = flatten_config(config)
    assert run.data.params == {
        name: str(value) for name, value in flat.items() if value is not None and not name.startswith("tracking.")
    }
    assert run.data.tags["mlflow.note.content"].startswith("**pixel_reweight** on noise *polygon(3)*, K = 50, seed 7.")
    first, second, *metrics = run.data.metrics.items()
    assert metrics == [("train/loss", 0.75)]
    assert (first[0], second[0]) == ("dice/test", "dice/val"), "the comparison opens on another metric"
    assert math.isnan(first[1]) and math.isnan(second[1])
    tags = run.data.tags
    assert (tags["method"], tags["noise"], tags["clean_count"], tags["seed"]) == (
        "pixel_reweight",
        "polygon(3)",
        "50",
        "7",
    )
    assert tags["version.torch"]
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.yaml", "result.json", "images"} <= files
    assert any(file.path.endswith(".png") for file in client.list_artifacts(run_id, "images"))
    assert Path(client.download_artifacts(run_id, "config.yaml")).read_text() == dump_config(config)

    # Resumed with a longer budget: the same run goes on, its parameters stay, its config is the new one.
    longer = make_config(store, train={"steps": 20})
    tracker = MlflowTracker(longer, folder)
    wait_until(lambda: client.get_run(run_id).info.status == "RUNNING", "the run goes on")
    tracker.log_metrics({"train/loss": 0.5}, step=2)
    tracker.finish()

    assert (folder / "mlflow_run_id").read_text().strip() == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "10"
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train/loss")] == [
        (1, 0.75),
        (2, 0.5),
    ]
    assert "steps: 20" in Path(client.download_artifacts(run_id, "config.yaml")).read_text()

    # An id that this store does not know is no reason to lose the run.
    (folder / "mlflow_run_id").write_text("0" * 32)
    MlflowTracker(config, folder).finish("FAILED")
    fresh = (folder / "mlflow_run_id").read_text().strip()
    assert fresh not in (run_id, "0" * 32)
    assert client.get_run(fresh).info.status == "FAILED"
    assert not told(caplog)


def test_a_dead_server_is_told_once_and_stops_nothing(tmp_path):
    """In a process of its own: patience and silence are set for a whole process."""
    code = """
import json, logging, os, socket, sys, time
from pathlib import Path
import numpy as np
import mlflow
from distseg.config.schema import Config
from distseg.tracking.mlflow import MlflowTracker

logging.basicConfig()  # a program that shows the warnings of its libraries
with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    port = closed.getsockname()[1]
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
tracking = {"uri": f"http://user:secret@127.0.0.1:{port}", "patience": 5}
config = Config.model_validate({"name": "dead", "data": {"root": "d"}, "train": {"steps": 1}, "tracking": tracking})
tracker = MlflowTracker(config, Path(sys.argv[1]))
for step in range(100):
    tracker.log_metrics({"train/loss": 0.5}, step)
    tracker.log_image(np.zeros((4, 4, 3), np.uint8), "panel", step)
tracker.log_artifact(Path("none"))
tracker.finish("FAILED")
print(json.dumps({"port": port}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    (line,) = done.stderr.splitlines()
    assert f"http://127.0.0.1:{answer['port']}" in line
    assert str(tmp_path / "metrics.jsonl") in line
    assert "secret" not in line


def test_a_name_that_mlflow_refuses_is_told_once_and_loses_no_other_metric(store, tmp_path, caplog):
    from mlflow import MlflowClient

    log = JsonlLog(tmp_path / "metrics.jsonl")
    tracker = MlflowTracker(make_config(store), tmp_path)
    for step in range(3):
        metrics = {"train/loss": 1.0, "a name = mlflow rejects": 1.0}
        log.log_metrics(metrics, step)
        tracker.log_metrics(metrics, step)
    tracker.finish()

    [said] = told(caplog)
    assert "mlflow: no tracking of 'a name = mlflow rejects': " in said
    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    assert steps_of(MlflowClient(store), run_id, "train/loss") == [0, 1, 2]


def steps_of(client, run_id: str, name: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, name))


class Hostile(BaseHTTPRequestHandler):
    """Answers as `server.way` says, and where that is to hang, until `server.released`."""

    def do_GET(self) -> None:
        self.server.asked.set()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.way in ("429", "503"):
            self.send_response(int(self.server.way))
            self.send_header("Retry-After", "600")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.server.way == "silence":
            self.server.released.wait()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if self.server.way == "drip":
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while not self.server.released.wait(0.2):
                self.wfile.write(b" " if self.server.way == "drip" else b" " * 4096)
                self.wfile.flush()
        except OSError:
            return

    do_POST = do_GET

    def log_message(self, *_) -> None:
        pass


@contextmanager
def hostile_server(way: str) -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        server.way, server.asked, server.released = way, threading.Event(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()


@pytest.mark.parametrize("way", ["429", "503", "silence", "drip", "endless"])
def test_a_hostile_server_holds_up_no_step_and_the_end_not_for_long(way, tmp_path, monkeypatch, caplog, counted):
    """The server keeps each connection until the run is over: had the run waited for it, this would never end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with hostile_server(way) as server:
        uri = f"http://127.0.0.1:{server.server_port}"
        log = JsonlLog(tmp_path / "metrics.jsonl")
        tracker = MlflowTracker(make_config(uri, {"patience": 2}), tmp_path)
        for step in range(1000):
            log.log_metrics({"train/loss": 0.5}, step)
            tracker.log_metrics({"train/loss": 0.5}, step)
            tracker.log_image(np.zeros((4, 4, 3), np.uint8), "panel", step)
        tracker.log_artifact(tmp_path / "metrics.jsonl")
        assert server.asked.wait(60)
        tracker.finish("FAILED")
        assert not server.released.is_set()

    [said] = [message for message in told(caplog) if "no tracking of this run" in message]
    assert uri in said and str(tmp_path / "metrics.jsonl") in said and "\n" not in said
    counted("tracking servers that refuse, drip or never answer", 1)


def test_what_a_store_does_not_take_waits_and_is_sent_once(store, tmp_path, caplog):
    """A real store that another process keeps locked: for some steps of a run, then until the end of a start."""
    from mlflow import MlflowClient

    path = tmp_path / "metrics.jsonl"
    log = JsonlLog(path)
    tracker = MlflowTracker(make_config(store), tmp_path)

    def report(step: int) -> None:
        log.log_metrics({"train/loss": step / 10, "val/dice": 0.5}, step)
        tracker.log_metrics({"train/loss": step / 10, "val/dice": 0.5}, step)

    for step in range(3):
        report(step)
    wait_until((tmp_path / "mlflow_run_id").exists, "the run is there")
    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    client = MlflowClient(store)
    wait_until(lambda: client.get_run(run_id).data.metrics.keys() >= {"train/loss"}, "metrics are there")
    with locked(tmp_path / "mlflow.db"):
        for step in range(3, 400):  # more than may wait
            report(step)
        wait_until(lambda: "no tracking of this run" in caplog.text, "the first failure is told")
    report(400)
    tracker.finish("KILLED")
    for name in ("train/loss", "val/dice", "dice/val"):
        assert [step for step in steps_of(client, run_id, name) if step >= 0] == [*range(401)], name
    [line] = [line for line in told(caplog) if "no tracking of this run" in line]
    assert "wait there until it answers" in line

    log.close()
    code = """
import json, sys
from pathlib import Path
from distseg.config.schema import Config
from distseg.distributed.ending import leave
from distseg.tracking.jsonl import JsonlLog
from distseg.tracking.mlflow import MlflowTracker
folder = Path(sys.argv[1])
log = JsonlLog(folder / "metrics.jsonl", from_step=401)
tracker = MlflowTracker(Config.model_validate(json.loads(sys.argv[2])), folder)
for step in range(401, 410):
    log.log_metrics({"train/loss": step / 10}, step)
    tracker.log_metrics({"train/loss": step / 10}, step)
tracker.finish("KILLED")
leave(0)
"""
    impatient = make_config(store, {"patience": 0.5}).model_dump_json()
    with locked(tmp_path / "mlflow.db"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), impatient], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("no tracking of this run") == 1, done.stderr
    assert steps_of(client, run_id, "train/loss") == [*range(401)]

    log = JsonlLog(path, from_step=405)  # the checkpoint that it goes on from is of step 404
    tracker = MlflowTracker(make_config(store), tmp_path)
    for step in range(405, 412):
        report(step)
    tracker.finish()
    assert steps_of(client, run_id, "train/loss") == [*range(412)]


@contextmanager
def locked(database: Path) -> Iterator[None]:
    connection = sqlite3.connect(database, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def test_processes_that_make_a_store_at_once_lose_no_run(unmade_store, tmp_path):
    from mlflow import MlflowClient

    script = tmp_path / "make.py"
    script.write_text("""
import json, sys, time
from pathlib import Path
from distseg.config.schema import Config
from distseg.tracking.jsonl import JsonlLog
from distseg.tracking.mlflow import MlflowTracker
import mlflow
folder = Path(sys.argv[1])
folder.mkdir()
while not (folder.parent / "go").exists():
    time.sleep(0.001)
log = JsonlLog(folder / "metrics.jsonl")
tracker = MlflowTracker(Config.model_validate(json.loads(sys.argv[2])), folder)
for step in range(20):
    log.log_metrics({"train/loss": step}, step)
    tracker.log_metrics({"train/loss": step}, step)
tracker.finish()
""")
    config = make_config(unmade_store).model_dump_json()
    runs = [tmp_path / f"run-{index}" for index in range(4)]
    processes = [
        start_script(
            [str(script), str(run), config], tmp_path, os.environ, run.with_suffix(".out"), run.with_suffix(".err")
        )
        for run in runs
    ]
    wait_until(lambda: all(run.exists() for run in runs), "all are ready")
    (tmp_path / "go").touch()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0] * 4
    client = MlflowClient(unmade_store)
    ids = [(run / "mlflow_run_id").read_text().strip() for run in runs]
    assert len(set(ids)) == 4
    for run_id in ids:
        assert client.get_run(run_id).info.status == "FINISHED"
        assert steps_of(client, run_id, "train/loss") == [*range(20)]
    [experiment] = [found for found in client.search_experiments() if found.name == "noise levels"]
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_store_that_cannot_be_made_is_told_at_once_with_the_mend(tmp_path, caplog):
    (tmp_path / "file").touch()
    for uri, said in (
        (f"sqlite:///{tmp_path}", f"sqlite:///{tmp_path} names a folder; name a file in it"),
        (f"sqlite:///{tmp_path}/file/mlflow.db", "set tracking.uri, or start in a folder that can be written to"),
        ("sqlite:////proc/nowhere/mlflow.db", "set tracking.uri, or start in a folder that can be written to"),
    ):
        caplog.clear()
        tracker = MlflowTracker(make_config(uri, {"patience": 60}), tmp_path)
        tracker.log_metrics({"train/loss": 0.5}, 0)
        tracker.finish()
        [line] = told(caplog)
        assert said in line and "are not sent" in line
        with pytest.raises(UserError, match=said.replace("/", "[/]")):
            Study.open(uri, "experiment", "study", "description", tmp_path)


def test_a_deleted_experiment_is_told_with_its_mend(store, tmp_path, caplog):
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.create_experiment("noise levels")
    client.delete_experiment(experiment)
    tracker = MlflowTracker(make_config(store), tmp_path)
    tracker.finish()
    [line] = told(caplog)
    mend = f"set another name, or restore it with `mlflow experiments restore --experiment-id {experiment}`"
    assert "tracking.experiment 'noise levels' has been deleted" in line and mend in line
    client.restore_experiment(experiment)
    tracker = MlflowTracker(make_config(store), tmp_path)
    tracker.finish()
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
    assert client.get_run((tmp_path / "mlflow_run_id").read_text().strip()).info.status == "FINISHED"


def test_the_users_patience_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)

    MlflowTracker(make_config("no-such-store://", {"patience": 0.1}), tmp_path).finish()

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_the_module_imports_without_mlflow():
    code = "import sys, distseg.tracking.mlflow; sys.exit('mlflow' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_logged_model_comes_back_without_this_code(store, tmp_path, caplog):
    import torch
    from mlflow import MlflowClient
    from torch import nn

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)).eval()
    tracker = MlflowTracker(make_config(store), tmp_path)
    tracker.log_model(network, np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))

    class Undecided(nn.Module):
        def forward(self, images):
            return images[:, :1] if images.sum() > 0 else -images[:, :1]

    tracker.log_model(Undecided(), np.zeros((2, 3, 8, 8), np.float32))
    tracker.finish()
    assert "mlflow: the network is not logged, it cannot be exported" in caplog.text

    run_id = (tmp_path / "mlflow_run_id").read_text().strip()
    folder = MlflowClient(store).download_artifacts(run_id, "model")
    code = """
import sys, torch, mlflow.pytorch
from mlflow.models import get_model_info
model = mlflow.pytorch.load_model(sys.argv[1])
torch.save(model(torch.ones(5, 3, 8, 8)).detach(), sys.argv[2])
signature = get_model_info(sys.argv[1]).signature
assert signature.inputs.inputs[0].shape == (-1, 3, 8, 8) and signature.outputs.inputs[0].shape == (-1, 1, 8, 8)
assert not any(name.startswith("distseg") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, folder, str(tmp_path / "out.pt")], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), network(torch.ones(5, 3, 8, 8)).detach())
    files = {path.suffix for path in Path(folder).rglob("*") if path.is_file()}
    assert files.isdisjoint({".pkl", ".pickle", ".pth", ".pt"}) and ".pt2" in files
    assert MlflowClient(store).get_run(run_id).info.status == "FINISHED"


def test_an_mlflow_that_cannot_be_imported_is_told_and_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracker = MlflowTracker(make_config("sqlite:///mlflow.db"), tmp_path)
    tracker.log_metrics({"train/loss": 1.0}, 0)
    tracker.finish()
    [line] = told(caplog)
    assert "mlflow cannot be imported" in line and "are not sent" in line


def test_a_store_of_files_that_is_full_holds_up_no_metric(store, tmp_path, caplog):
    from mlflow import MlflowClient

    (tmp_path / "mlruns").touch()  # where an sqlite store puts files: no folder can be made there
    tracker = MlflowTracker(make_config(store), tmp_path)
    for step in range(3):
        tracker.log_image(np.zeros((6, 8, 3), dtype=np.uint8), "panel", step)
        tracker.log_metrics({"train/loss": 0.5}, step)
    tracker.finish()
    [line] = told(caplog)
    assert f"files do not reach the run; they are in {tmp_path} (" in line
    client, run_id = MlflowClient(store), (tmp_path / "mlflow_run_id").read_text().strip()
    assert steps_of(client, run_id, "train/loss") == [0, 1, 2]
    assert client.get_run(run_id).info.status == "FINISHED"
