"""The run in MLflow: parameters, metrics, images and artifacts. The only importer of mlflow.

MLflow's client is used rather than its module-level functions: those keep one active run per process, which an exit
handler marks FINISHED even when the process died of an exception, and which blocks at exit on a dead server.
"""

import importlib.metadata
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distseg.config.load import dump_config, flatten_config
from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.files import write_atomically

_VERSIONED = {
    "distseg": "distseg",
    "torch": "torch",
    "deepspeed": "deepspeed",
    "triton": "triton",
    "dali": "nvidia-dali-cuda130",
    "mlflow": "mlflow",
}
# MLflow retries for minutes by default. Two tries of five seconds bound what a dead server can cost a run.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
_PARAMS_PER_REQUEST = 100
_LONGEST_VALUE = 6000


class MlflowTracker:
    """One MLflow run for one training run; make it on rank 0 only.

    The run is named `config.name` in the experiment `config.tracking.experiment`, in the store `config.tracking.uri`,
    else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder. Its id is kept in
    `run_folder/mlflow_run_id`, and a resumed training run continues the run of that id. Parameters are those of the
    first start (MLflow never changes one); `config.yaml` and the tags are those of the last.

    Tracking never stops a training run: nothing here raises. The first failure is reported in one line on stderr, and
    from then on every method returns at once.
    """

    def __init__(self, config: Config, run_folder: Path):
        self._uri = store_of(config)
        self._run_folder = run_folder
        self._system_monitor = None
        self._failed = False
        self._attempt(self._start, config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step. Names may hold `/`, which groups charts, but none of `@ [ ] ( ) =`.

        Values that are not finite are left out: MLflow would draw an infinity as 1.8e308.
        """
        self._attempt(self._log_metrics, metrics, step)

    def log_image(self, array: np.ndarray, key: str, step: int) -> None:
        """Log an image (h, w, 3) uint8 under the slider `key`."""
        self._attempt(lambda: self._client.log_image(self._run_id, array, key=key, step=step, synchronous=True))

    def log_artifact(self, path: Path) -> None:
        """Upload a file to the top of the run's artifacts."""
        self._attempt(lambda: self._client.log_artifact(self._run_id, str(path)))

    def log_model(self, network, images: np.ndarray) -> None:
        """Upload a network (on the CPU, in evaluation mode) as `model/`, with signature and input example.

        The format is torch.export's archive, a graph and its tensors, no pickled code. `images` (B ≥ 2, 3, H, W)
        float32 are the example; the batch size stays free.

        `mlflow.pytorch.load_model("runs:/RUN_ID/model")` brings it back without distseg. Where the network cannot be
        exported, that is told in one line.
        """
        self._attempt(self._log_model, network, images)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run: FAILED after an exception, KILLED where it was stopped and may be resumed."""
        self._attempt(self._finish, status)

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                _without_password(
                    f"mlflow: no more tracking of this run at {self._uri}; its metrics are in "
                    f"{self._run_folder / 'metrics.jsonl'} ({reason[:500]})"
                ),
                file=sys.stderr,
            )

    def _start(self, config: Config) -> None:
        _be_patient_and_quiet()

        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = MlflowClient(tracking_uri=self._uri)
        run = self._resumed_run(config) or self._new_run(config)
        self._run_id = run.info.run_id

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
        self._client.log_text(self._run_id, _without_password(dump_config(config)), "config.yaml")

        if config.tracking.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._system_monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._uri)
            self._system_monitor.start()

    def _resumed_run(self, config: Config):
        """The run that `mlflow_run_id` names, running again; None where there is none in this store."""
        from mlflow.exceptions import MlflowException

        try:
            run_id = self._id_file.read_text().strip()
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
        if config.tracking.parent_run:
            self._client.set_tag(run_id, "mlflow.parentRunId", config.tracking.parent_run)
        return run

    def _new_run(self, config: Config):
        from mlflow.tracking.context.registry import resolve_tags

        # resolve_tags: who started what, for the columns of MLflow's table.
        tags = resolve_tags() | {"mlflow.note.content": _description(config)}
        if config.tracking.parent_run:
            tags["mlflow.parentRunId"] = config.tracking.parent_run
        experiment = _experiment(self._client, config.tracking.experiment)
        run = self._client.create_run(experiment, None, tags, config.name)
        aside = self._id_file.with_name(self._id_file.name + ".tmp")
        aside.write_text(run.info.run_id + "\n")
        aside.replace(self._id_file)
        return run

    @property
    def _id_file(self) -> Path:
        return self._run_folder / "mlflow_run_id"

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        finite = [Metric(name, value, now, step) for name, value in metrics.items() if math.isfinite(value)]
        self._client.log_batch(self._run_id, metrics=finite, synchronous=True)

    def _log_model(self, network, images: np.ndarray) -> None:
        import mlflow.pytorch
        import torch
        from mlflow.models import infer_signature

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
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
                print(f"mlflow: the network is not logged, it cannot be exported: {reason}", file=sys.stderr)
                return
            self._client.log_artifacts(self._run_id, str(path), "model")

    def _finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status)
        if self._system_monitor is not None:
            self._system_monitor.finish()


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

    def _history(self, run, name: str) -> list[tuple[int, float]]:
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


def _client(uri: str):
    _be_patient_and_quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _be_patient_and_quiet() -> None:
    for name, value in (_PATIENCE | {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}).items():
        os.environ.setdefault(name, value)
    # They would tell, line by line, what one line tells.
    for name in ("urllib3.connectionpool", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _experiment(client, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another run that started just now
                raise
            experiment = client.get_experiment_by_name(name)
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
    return (
        f"**{tags['method']}** on noise *{tags['noise']}*, K = {tags['clean_count']}, seed {tags['seed']}. "
        f"{config.model.name} of width {config.model.width}, {config.data.image_size}×{config.data.image_size}, "
        f"{config.optim.name} at {config.optim.lr:g}."
    )


def _tags(config: Config) -> dict[str, str]:
    tags = {
        "method": config.method.name,
        "noise": config.data.noise.level,
        "clean_count": str(config.data.clean_count),
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
