"""The run in MLflow: parameters, metrics, images and artifacts. The only importer of mlflow.

MLflow's client is used rather than its module-level functions: those keep one active run per process, which an exit
handler marks FINISHED even when the process died of an exception, and which blocks at exit on a dead server.
"""

import importlib.metadata
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from distseg.config.load import dump_config, flatten_config
from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.files import write_atomically
from distseg.run_folder import RunFolder
from distseg.tracking import jsonl
from distseg.tracking.delivery import Delivery

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | int | str | None]

_VERSIONED = {
    "distseg": "distseg",
    "torch": "torch",
    "deepspeed": "deepspeed",
    "triton": "triton",
    "dali": "nvidia-dali-cuda130",
    "mlflow": "mlflow",
}
# MLflow retries for minutes by default, and for as long as a server asks it to.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}
_PARAMS_PER_REQUEST, _METRICS_PER_REQUEST = 100, 1000
_LONGEST_VALUE = 6000
_IMAGES_WAITING = 16
"""Images are large: more of them do not wait for a slow server. The run's folder has them all."""
_LOCK_SECONDS = 60
PROMINENT = {"test/dice": "dice/test", "val/dice": "dice/val"}
"""Logged under a second name, and first of all as NaN: MLflow's pages order metrics by name, or by when a store has
first seen them, and the comparison opens on the first one."""
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
"""The tag of an experiment that has MLflow open it in the view for training runs."""


class MlflowTracker:
    """One MLflow run for one training run; make it on rank 0 only.

    The run is named `config.name` in the experiment `config.tracking.experiment`, in the store `config.tracking.uri`,
    else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder. Its id is kept in
    `run_folder/mlflow_run_id`, and a resumed training run continues the run of that id. Parameters are those of the
    first start (MLflow never changes one); `config.yaml` and the tags are those of the last.

    Tracking never stops a training run, nor holds it up: nothing here raises, and all calls are made by a thread of
    their own. `finish` waits for them, `config.tracking.patience` seconds at most. Metrics that the store does not take
    wait in `metrics.jsonl`; they are sent, each once, when it answers again, at the end, or by the next start of the
    run. A file is tried once; the run's folder has all of them. The first failure is told in one line.
    """

    def __init__(self, config: Config, run_folder: Path):
        self._config = config
        self._uri = store_of(config)
        self._folder = RunFolder(run_folder)
        self._run_id: str | None = None
        self._system_monitor: Any = None
        self._delivered: set[tuple[str, int]] = set()
        self._refused: set[str] = set()
        self._behind = True
        """Whether metrics.jsonl may hold what the store does not. At the start: what an earlier start left."""
        self._uncertain = False
        """Whether a call has failed, so that only the store knows what it has taken."""
        self._told = self._told_of_files = False
        self._room_for_images = threading.Semaphore(_IMAGES_WAITING)
        _be_patient_and_quiet()
        self._import_error: Exception | None = None
        try:
            import mlflow  # noqa: F401  (seconds; here, and not while other threads import)
        except Exception as error:
            self._import_error = error
        self._delivery = Delivery(self._failed)
        self._delivery.submit(self._start, until_it_succeeds=True)

    def log_metrics(self, metrics: Metrics, step: int) -> None:
        """Log numbers at a step. Names may hold `/`, which groups charts, but none of `@ [ ] ( ) =`.

        Values that are not finite are left out: MLflow would draw an infinity as 1.8e308. Call it after the line is in
        metrics.jsonl: what cannot be sent now is read from there.
        """
        if not self._delivery.submit(partial(self._log_metrics, dict(metrics), step), until_it_succeeds=True):
            self._behind = True

    def log_image(self, array: np.ndarray, key: str, step: int) -> None:
        """Log an image (h, w, 3) uint8 under the slider `key`."""
        if not self._room_for_images.acquire(blocking=False):
            return

        def log() -> None:
            self._room_for_images.release()
            self._client.log_image(self._run_id, array, key=key, step=step, synchronous=True)

        if not self._delivery.submit(partial(self._once, log)):
            self._room_for_images.release()

    def log_artifact(self, path: Path) -> None:
        """Upload a file to the top of the run's artifacts."""
        self._delivery.submit(partial(self._once, lambda: self._client.log_artifact(self._run_id, str(path))))

    def log_model(self, network: Any, images: np.ndarray) -> None:
        """Upload a network (on the CPU, in evaluation mode) as `model/`, with signature and input example.

        The format is torch.export's archive, a graph and its tensors, no pickled code. `images` (B ≥ 2, 3, H, W)
        float32 are the example; the batch size stays free.

        `mlflow.pytorch.load_model("runs:/RUN_ID/model")` brings it back without distseg. Where the network cannot be
        exported, that is told in one line. The export is made here and not in the background.
        """
        folder = tempfile.TemporaryDirectory()

        def upload() -> None:
            with folder:
                self._client.log_artifacts(self._run_id, f"{folder.name}/model", "model")

        if _export(network, images, Path(folder.name) / "model"):
            self._delivery.submit(partial(self._once, upload))

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run: FAILED after an exception, KILLED where it was stopped and may be resumed."""
        complete = self._delivery.close(partial(self._finish, status), self._config.tracking.patience)
        if not complete and not self._told:
            self._tell(f"no answer within tracking.patience, {self._config.tracking.patience:g} s")

    def _once(self, send_file: Callable[[], Any]) -> None:
        """Files may have a store of their own: metrics do not wait for it."""
        try:
            send_file()
        except Exception as error:
            if not self._told_of_files:
                self._told_of_files = True
                reason = _without_password(" ".join(str(error).split())[:300])
                logger.warning("mlflow: files do not reach the run; they are in %s (%s)", self._folder.path, reason)

    def _failed(self, error: Exception) -> bool:
        """Called by the delivery's thread; True for what trying again does not mend."""
        for_good = isinstance(error, UserError)
        if for_good or not self._told:
            self._tell(" ".join(str(error).split()) or type(error).__name__, for_good)
        return for_good

    def _tell(self, reason: str, for_good: bool = False) -> None:
        self._told = True
        then = "are not sent" if for_good else "wait there until it answers, or for the next start"
        logger.warning(
            "%s",
            _without_password(
                f"mlflow: no tracking of this run at {self._uri}; its metrics are in {self._folder.metrics} and {then} "
                f"({reason[:500]})"
            ),
        )

    def _start(self) -> None:
        """Everything here may be made again, after a failure half-way."""
        if self._import_error:
            raise UserError(f"mlflow cannot be imported: {self._import_error}") from self._import_error
        from mlflow.entities import Param, RunTag

        config = self._config
        self._client = _client(self._uri)
        run = self._client.get_run(self._run_id) if self._run_id else self._resumed_run() or self._new_run()
        self._run_id = run.info.run_id
        write_atomically(self._folder.mlflow_run_id, self._run_id + "\n")

        # A start that was killed half-way may have left some of the parameters.
        params = [
            Param(name, _without_password(str(value))[:_LONGEST_VALUE])
            for name, value in _params(config).items()
            if name not in run.data.params
        ]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(self._run_id, params=params[first : first + _PARAMS_PER_REQUEST], synchronous=True)
        tags = [RunTag(name, value) for name, value in _tags(config).items()]
        self._client.log_batch(self._run_id, tags=tags, synchronous=True)
        self._uncertain = bool(run.data.metrics)
        self._send_waiting()
        text = _without_password(dump_config(config))
        self._once(lambda: self._client.log_text(self._run_id, text, "config.yaml"))
        if config.tracking.system_metrics and self._system_monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._system_monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._uri)
            self._system_monitor.start()

    def _resumed_run(self) -> Any:
        """The run that `mlflow_run_id` names, running again; None where there is none in this store."""
        from mlflow.exceptions import MlflowException

        try:
            run_id = self._folder.mlflow_run_id.read_text().strip()
            run = self._client.get_run(run_id)
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if run.info.lifecycle_stage == "deleted":
            return None
        self._client.update_run(run_id, status="RUNNING")
        if self._config.tracking.parent_run:
            self._client.set_tag(run_id, "mlflow.parentRunId", self._config.tracking.parent_run)
        return run

    def _new_run(self) -> Any:
        from mlflow.entities import Metric
        from mlflow.tracking.context.registry import resolve_tags

        # resolve_tags: who started what, for the columns of MLflow's table.
        tags = resolve_tags() | {"mlflow.note.content": _description(self._config)}
        if self._config.tracking.parent_run:
            tags["mlflow.parentRunId"] = self._config.tracking.parent_run
        experiment = _experiment(self._client, self._config.tracking.experiment)
        run = self._client.create_run(experiment, None, tags, self._config.name)
        now = round(time.time() * 1000)
        places = [Metric(name, math.nan, now, -1) for name in PROMINENT.values()]
        self._client.log_batch(run.info.run_id, metrics=places, synchronous=True)
        return run

    def _log_metrics(self, metrics: Metrics, step: int) -> None:
        self._send_waiting()
        self._send([(step, metrics)])

    def _send_waiting(self) -> None:
        """Send what metrics.jsonl holds and the store does not."""
        if self._uncertain:
            self._delivered = self._taken()
            self._uncertain = False
        if self._behind:
            self._behind = False
            records = jsonl.read(self._folder.metrics) if self._folder.metrics.exists() else []
            self._send([(record["step"], record) for record in records])

    def _taken(self) -> set[tuple[str, int]]:
        """The (name, step) of every metric that the store has of this run."""
        names = self._client.get_run(self._run_id).data.metrics
        return {
            (name, point.step)
            for name in names
            if not name.startswith("system/")
            for point in self._client.get_metric_history(self._run_id, name)
        }

    def _send(self, rows: Iterable[tuple[int, Metrics]]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        points = [
            Metric(name, value, now, step)
            for step, metrics in rows
            for name, value in _named(metrics)
            if (name, step) not in self._delivered and name not in self._refused
        ]
        for first in range(0, len(points), _METRICS_PER_REQUEST):
            sent = points[first : first + _METRICS_PER_REQUEST]
            try:
                self._log_batch(sent)
            except Exception:
                self._uncertain = self._behind = True  # the store may have them, and not have said so
                raise
            self._delivered |= {(point.key, point.step) for point in sent}

    def _log_batch(self, points: list[Any]) -> None:
        """One request. A metric that MLflow refuses for its name is told once, and does not hold up the others."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._run_id, metrics=points, synchronous=True)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(points) > 1:
                for point in points:
                    if point.key not in self._refused:
                        self._log_batch([point])
                return
            self._refused.add(points[0].key)
            logger.warning("mlflow: no tracking of %r: %s", points[0].key, " ".join(str(error).split())[:300])

    def _finish(self, status: str) -> None:
        self._send_waiting()
        self._client.set_terminated(self._run_id, status)
        if self._system_monitor is not None:
            self._system_monitor.finish()


def _named(metrics: Metrics) -> Iterator[tuple[str, float]]:
    """The finite numbers, some of them under two names."""
    for name, value in metrics.items():
        if name == "step" or isinstance(value, str | None) or not math.isfinite(value):
            continue
        yield name, value
        if name in PROMINENT:
            yield PROMINENT[name], value


def _export(network: Any, images: np.ndarray, path: Path) -> bool:
    """Write MLflow's model folder; whether the network could be exported."""
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    try:
        outputs = network(torch.from_numpy(images)).detach().numpy()
        mlflow.pytorch.save_model(
            network,
            path,
            signature=infer_signature(images, outputs),
            input_example=images,
            serialization_format="pt2",
            pip_requirements=[f"torch=={importlib.metadata.version('torch')}"],
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning("mlflow: the network is not logged, it cannot be exported: %s", reason)
        return False
    return True


def save_servable(path: Path, graph: Path, facts_file: Path, facts: Mapping[str, Any], example: bytes) -> None:
    """Write the model that `mlflow models serve` takes to the folder `path`, in place of one that is there.

    It is tracking/served_model.py as source, an ONNX `graph`, and the facts of its export: bytes of an image in the
    column `image`, the bytes of a PNG in the column `mask`. `example` is an image's file. Raises UserError.
    """
    with _quiet():
        import mlflow.pyfunc
        import pandas as pd
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        signature = ModelSignature(
            Schema([ColSpec("binary", "image")]),
            Schema([ColSpec("binary", "mask"), ColSpec("long", "height"), ColSpec("long", "width")]),
        )
        needed = ["mlflow", "numpy", "onnxruntime", "pandas", "pillow"]
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            try:
                mlflow.pyfunc.save_model(
                    f"{aside}/model",
                    python_model=str(Path(__file__).with_name("served_model.py")),
                    artifacts={"graph": str(graph), "facts": str(facts_file)},
                    signature=signature,
                    input_example=pd.DataFrame({"image": [example]}),
                    pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in needed],
                    metadata=dict(facts),
                )
            except Exception as error:
                raise UserError(f"mlflow: the model cannot be written: {' '.join(str(error).split())[:300]}") from None
            shutil.rmtree(path, ignore_errors=True)
            Path(aside, "model").replace(path)


def register(uri: str, run_id: str, folder: Path, name: str, card: str, facts: Mapping[str, Any]) -> str:
    """Upload a model's folder to the run, and make it a version of the registered model `name`: its address.

    The version's description is the model card, and its tags are what a registry's readers look for. Raises UserError.
    """
    from mlflow.exceptions import MlflowException

    model, data = facts["model"], facts["data"]
    tags = {
        "classes": ", ".join(facts["classes"]["names"]),
        "channel_means": ", ".join(map(str, model["channel_means"])),
        "data_sha256": str(data["sha256"]),
        "checkpoint_sha256": model["sha256"],
        **{score.replace("/", "."): f"{value:.6f}" for score, value in facts["scores"].items()},
    }

    def upload() -> str:
        client = _client(uri)
        client.log_artifacts(run_id, str(folder), "served_model")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/served_model"
        version = client.create_model_version(name, source, run_id, tags, description=card)
        return f"models:/{name}/{version.version}"

    return _told(uri, upload)


class Study:
    """The MLflow run that a study's runs are nested under, found again by the id in `folder/mlflow_run_id`.

    Unlike MlflowTracker this raises UserError: a study is read back from MLflow, so it is nothing without it.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id
        self._client = self._call(_client, uri)
        self.name = self._call(self._client.get_run, run_id).info.run_name

    @classmethod
    def open(cls, uri: str, experiment: str, name: str, description: str, folder: Path) -> "Study":
        """The study of `folder`, running; a new one where there is none in this store yet."""

        def find_or_create() -> str:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking.context.registry import resolve_tags

            client, id_file = _client(uri), folder / "mlflow_run_id"
            try:
                run = client.get_run(id_file.read_text().strip())
                if run.info.lifecycle_stage != "deleted":
                    client.update_run(run.info.run_id, status="RUNNING")
                    return run.info.run_id
            except FileNotFoundError:
                pass
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            tags = resolve_tags() | {"study": name, "mlflow.note.content": description}
            run = client.create_run(_experiment(client, experiment), None, tags, name)
            write_atomically(id_file, run.info.run_id + "\n")
            return run.info.run_id

        return cls(uri, _told(uri, find_or_create))

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Upload a file into `folder` of the study's artifacts, or to their top."""
        self._call(self._client.log_artifact, self.run_id, str(path), folder)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._call(self._client.log_metric, self.run_id, name, value)

    def read_text(self, artifact: str) -> str | None:
        """A text file at the top of the study's artifacts, None where there is none."""
        return self._call(self._text_of, self.run_id, artifact)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        self._call(self._client.set_terminated, self.run_id, status)

    def runs(self, histories: Iterable[str], texts: Iterable[str]) -> list[dict[str, Any]]:
        """The nested runs as plain data, newest first, without those that were deleted.

        Each has `run_id`, `name`, `status`, `tags`, `params`, `metrics` (the last value of each), `history` (metric to
        [(step, value)] for those asked for, the last value of each step) and `texts` (artifact to its text or None).
        """
        return self._call(self._runs, list(histories), list(texts))

    def images(self, run_id: str, key: str) -> dict[int, bytes]:
        """The PNGs that a nested run has logged under the slider `key`, by step."""
        return self._call(self._images, run_id, key)

    def _runs(self, histories: list[str], texts: list[str]) -> list[dict[str, Any]]:
        experiment = self._client.get_run(self.run_id).info.experiment_id
        query, token, found = f"tags.`mlflow.parentRunId` = '{self.run_id}'", None, []
        while page := self._client.search_runs([experiment], query, page_token=token):
            found += page
            if not (token := page.token):
                break
        return [
            {
                "run_id": run.info.run_id,
                "name": run.info.run_name,
                "status": run.info.status,
                "tags": dict(run.data.tags),
                "params": dict(run.data.params),
                "metrics": dict(run.data.metrics),
                "history": {name: self._history(run, name) for name in histories},
                "texts": {name: self._text_of(run.info.run_id, name) for name in texts},
            }
            for run in found
        ]

    def _history(self, run: Any, name: str) -> list[tuple[int, float]]:
        if name not in run.data.metrics:
            return []
        # A run that was killed logs the steps since its last checkpoint twice.
        points = sorted(self._client.get_metric_history(run.info.run_id, name), key=lambda point: point.timestamp)
        return sorted({point.step: point.value for point in points}.items())

    def _text_of(self, run_id: str, artifact: str) -> str | None:
        if artifact not in {file.path for file in self._client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, artifact, folder)).read_text()

    def _images(self, run_id: str, key: str) -> dict[int, bytes]:
        found = {}
        for file in self._client.list_artifacts(run_id, "images"):
            # MLflow names them KEY%step%STEP%timestamp%TIME%ID.png, in older stores with + for %.
            parts = re.split("[%+]", Path(file.path).name)
            if file.path.endswith(".png") and parts[0].replace("~", " ") == key and "step" in parts:
                with tempfile.TemporaryDirectory() as folder:
                    content = Path(self._client.download_artifacts(run_id, file.path, folder)).read_bytes()
                found[int(parts[parts.index("step") + 1])] = content
        return found

    def _call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return _told(self.uri, call, *arguments)


def store_of(config: Config) -> str:
    """Where the runs of this config go: tracking.uri, else MLFLOW_TRACKING_URI, else a file in the working folder."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def _told(uri: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        told = f"mlflow at {uri}: {reason}; check tracking.uri or start the server"
        raise UserError(_without_password(told)) from None


def _client(uri: str) -> Any:
    """MLflow's client of a store that is there, complete and of this version."""
    _be_patient_and_quiet()
    from mlflow import MlflowClient

    with _first_use(uri):
        client = MlflowClient(tracking_uri=uri)
        if _database_file(uri):
            client.search_experiments(max_results=1)  # a new store is filled now, and by one process
    return client


@contextmanager
def _first_use(uri: str) -> Iterator[None]:
    """Alone with an sqlite store: processes that create one at once lose runs, and can ruin the file.

    Raises UserError where the file cannot be made or written; MLflow would try for 100 seconds.
    """
    database = _database_file(uri)
    if database is None:
        yield
        return
    if database.is_dir():
        raise UserError(f"{uri} names a folder; name a file in it, for instance {uri.rstrip('/')}/mlflow.db")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.open("ab"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{database} cannot be written ({reason}); set tracking.uri, or start in a folder that can be written to"
        ) from None
    lock = FileLock(database.with_name(f"{database.name}.lock"), timeout=_LOCK_SECONDS)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise
        except OSError as error:  # a file system without locks
            logger.warning(
                "mlflow: %s cannot be locked (%s); start the first run of a new store alone", database, error
            )
        yield


def _database_file(uri: str) -> Path | None:
    """The file of an sqlite store; None for other stores, and for one in memory."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(match[1]) if match and match[1] != ":memory:" else None


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow tells on stderr what it infers of a model, and that nobody has logged it yet."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _be_patient_and_quiet() -> None:
    for name, value in (_PATIENCE | {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}).items():
        os.environ.setdefault(name, value)
    # They would tell, line by line, what one line tells.
    for name in ("urllib3.connectionpool", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _experiment(client: Any, name: str) -> str:
    """The id of the experiment of this name, which is made where there is none. Raises UserError for a deleted one."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, tags=dict([EXPERIMENT_KIND]))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another run that started just now
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"tracking.experiment {name!r} has been deleted in this store; set another name, or restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    if EXPERIMENT_KIND[0] not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, *EXPERIMENT_KIND)
    return experiment.experiment_id


def _params(config: Config) -> dict[str, Any]:
    """The leaves that describe the experiment: no nulls and no `tracking`.

    A study's places come with them as `axis.method`, `axis.noise` …: MLflow's comparison opens on the first parameters
    of the alphabet that differ.
    """
    axes = {f"axis.{name}": value for name, value in config.tracking.tags.items()}
    leaves = flatten_config(config)
    return axes | {
        name: value for name, value in leaves.items() if value is not None and not name.startswith("tracking.")
    }


def _description(config: Config) -> str:
    tags = _tags(config)
    study = f"noise *{tags['noise']}*, K = {tags['clean_count']}"
    return (
        f"**{tags['method']}** on {study if config.data.clean_count is not None else 'real annotations'}, "
        f"seed {tags['seed']}. "
        f"{config.model.name}, {config.data.image_size}×{config.data.image_size}, "
        f"{config.optim.name} at {config.optim.lr:g}."
    )


def _tags(config: Config) -> dict[str, str]:
    tags = {
        "method": config.method.name,
        "noise": config.data.noise.level,
        "clean_count": "given" if config.data.clean_count is None else str(config.data.clean_count),
        "seed": str(config.seed),
    }
    tags |= config.tracking.tags
    if commit := _git_commit():
        tags["git_commit"] = commit
    for name, distribution in _VERSIONED.items():
        try:
            tags[f"version.{name}"] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags


def _git_commit() -> str | None:
    """The commit that this code is checked out at, with `-dirty` for uncommitted changes; None outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _without_password(text: str) -> str:
    """Drop `user:password@` from addresses: tables of runs and logs are shared more widely than credentials."""
    return re.sub(r"//[^/@\s]+@", "//", text)
