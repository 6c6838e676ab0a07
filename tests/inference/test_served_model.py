"""The model that MLflow serves: its folder, its registration, and a server that is posted a JPEG."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distseg.cli.export import main
from distseg.distributed.runtime import free_port
from distseg.errors import UserError
from distseg.inference.predictor import Predictor


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG that lies on its side, by its EXIF orientation."""
    path = tmp_path_factory.mktemp("picture") / "turned.jpg"
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    coarse.resize((140, 90), Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def served(make_run: Callable, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and what was exported of it; two classes by the values 3 and 700."""
    run = make_run("data.classes={background: [3], lesion: [700]}")
    to = tmp_path_factory.mktemp("exported") / "out"
    assert main([str(run), "--to", str(to), "--mlflow", "--check", str(picture)]) == 0
    return run, to


def check_mask(mask: np.ndarray, run: Path, picture: Path) -> None:
    """Against the run, but for pixels that a grey level decides: it reduces a picture before it turns it."""
    predictor = Predictor.of_run(run, torch.device("cpu"))
    logits = torch.cat([*next(predictor.strips([predictor.read(picture)]))], dim=1)[0].numpy()
    assert mask.shape == logits.shape == (140, 90)
    sure = np.abs(logits) > 0.1
    assert sure.mean() > 0.7
    np.testing.assert_array_equal(mask[sure], np.where(logits > 0, 700, 3)[sure])


@pytest.mark.slow
def test_the_folder_holds_no_pickle_and_says_what_it_is(served: tuple[Path, Path], picture: Path) -> None:
    import mlflow.pyfunc
    import pandas as pd

    run, to = served
    folder = to / "mlflow_model"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "served_model.py", "model.onnx", "export.json", "input_example.json"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pth", ".pt"))]
    model = mlflow.pyfunc.load_model(str(folder))
    metadata = model.metadata.metadata
    assert metadata["model"]["channel_means"] == [0.7077, 0.5913, 0.5467]
    assert metadata["classes"]["names"] == ["background", "lesion"] and "sha256" in metadata["data"]
    assert model.metadata.get_input_schema().input_names() == ["image"]
    answer = model.predict(pd.DataFrame({"image": [picture.read_bytes(), picture.read_bytes()]}))
    mask = np.asarray(Image.open(BytesIO(answer["mask"][1])))
    assert (answer["height"][0], answer["width"][0]) == (140, 90)
    check_mask(mask, run, picture)
    assert set(np.unique(mask)) == {3, 700}


@pytest.mark.slow
def test_registered_beside_its_run(make_run: Callable, picture: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run = make_run(f"tracking.uri={uri}")
    arguments = [str(run), "--to", str(tmp_path / "out"), "--mlflow", "--register", "lesions", "--check", str(picture)]
    with pytest.raises(UserError, match="has no run in MLflow"):
        main(arguments)
    tracked = client.create_run(experiment).info.run_id
    (run / "mlflow_run_id").write_text(tracked + "\n")
    assert main(arguments) == 0 and main(arguments) == 0
    first, second = sorted(client.search_model_versions("name = 'lesions'"), key=lambda each: int(each.version))
    assert first.run_id == second.run_id == tracked
    assert second.tags["channel_means"] == "0.7077, 0.5913, 0.5467" and second.tags["classes"] == "background, lesion"
    assert second.description.startswith("# made")
    names = {file.path for file in client.list_artifacts(tracked, "served_model")}
    assert "served_model/MLmodel" in names


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve` of a folder, on the loopback; at the end it and its children are gone."""
    port = free_port()
    scripts = Path(sys.executable).parent  # where an activated environment finds uvicorn
    command = [str(scripts / "mlflow"), "models", "serve", "--model-uri", str(folder)]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
        )
    try:
        deadline = time.monotonic() + 200
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]


def post(address: str, content: bytes) -> tuple[int, dict]:
    rows = {"columns": ["image"], "data": [[base64.b64encode(content).decode()]]}
    body = json.dumps({"dataframe_split": rows}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_mlflow_models_serve_answers_a_jpeg(served: tuple[Path, Path], picture: Path, tmp_path: Path) -> None:
    run, to = served
    with server(to / "mlflow_model", tmp_path / "log") as address:
        status, answer = post(address, picture.read_bytes())
        assert status == 200, answer
        [row] = answer["predictions"]
        mask = np.asarray(Image.open(BytesIO(base64.b64decode(row["mask"]))))
        assert (row["height"], row["width"]) == (140, 90)
        check_mask(mask, run, picture)
        status, answer = post(address, b"no image")
        assert status == 400 and "image 0 cannot be read" in answer["message"]
