import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distseg.config.load import dump_config, flatten_config
from distseg.config.schema import Config
from distseg.tracking.mlflow import MlflowTracker


def make_config(uri, **values):
    return Config.model_validate(
        {
            "name": "triangles-k50",
            "seed": 7,
            "data": {"root": "sample", "noise": {"kind": "polygon", "vertices": 3}},
            "train": {"steps": 10},
            "tracking": {"uri": uri, "experiment": "noise levels", "system_metrics": False},
            **values,
        }
    )


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # artifacts of a sqlite store go to ./mlruns
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_run_and_its_resumption(store, tmp_path, capfd):
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
    assert run.data.metrics == {"train/loss": 0.75}
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
    assert client.get_run(run_id).info.status == "RUNNING"
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
    assert "no more tracking" not in capfd.readouterr().err


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
tracking = {"uri": f"http://user:secret@127.0.0.1:{port}"}
config = Config.model_validate({"name": "dead", "data": {"root": "d"}, "train": {"steps": 1}, "tracking": tracking})
started = time.monotonic()
tracker = MlflowTracker(config, Path(sys.argv[1]))
for step in range(100):
    tracker.log_metrics({"train/loss": 0.5}, step)
    tracker.log_image(np.zeros((4, 4, 3), np.uint8), "panel", step)
tracker.log_artifact(Path("none"))
tracker.finish("FAILED")
print(json.dumps({"seconds": time.monotonic() - started, "port": port}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    (line,) = done.stderr.splitlines()
    assert f"http://127.0.0.1:{answer['port']}" in line
    assert str(tmp_path / "metrics.jsonl") in line
    assert "secret" not in line
    assert answer["seconds"] < 30  # mlflow's own patience is minutes


def test_a_store_that_fails_midway_ends_tracking_only(store, tmp_path, capfd):
    tracker = MlflowTracker(make_config(store), tmp_path)
    tracker.log_metrics({"a name = mlflow rejects": 1.0}, step=0)
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    tracker.finish()

    assert capfd.readouterr().err.count("no more tracking") == 1


def test_the_users_patience_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)

    MlflowTracker(make_config("no-such-store://"), tmp_path)

    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_the_module_imports_without_mlflow():
    code = "import sys, distseg.tracking.mlflow; sys.exit('mlflow' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_logged_model_comes_back_without_this_code(store, tmp_path, capfd):
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
    assert "mlflow: the network is not logged, it cannot be exported" in capfd.readouterr().err

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
