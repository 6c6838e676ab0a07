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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distseg.config.load import dump_config, flatten_config
from distseg.config.schema import Config

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
        self._uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
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
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        # They would tell, line by line, what the one line of _attempt tells.
        for name in ("urllib3.connectionpool", "mlflow.system_metrics"):
            logging.getLogger(name).setLevel(logging.ERROR)

        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = MlflowClient(tracking_uri=self._uri)
        run = self._resumed_run() or self._new_run(config)
        self._run_id = run.info.run_id

        # A start that was killed half-way may have left some of the parameters.
        params = [
            Param(name, _without_password(str(value))[:_LONGEST_VALUE])
            for name, value in flatten_config(config).items()
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

    def _resumed_run(self):
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
        return run

    def _new_run(self, config: Config):
        from mlflow.tracking.context.registry import resolve_tags

        # resolve_tags: who started what, for the columns of MLflow's table.
        run = self._client.create_run(self._experiment(config.tracking.experiment), None, resolve_tags(), config.name)
        aside = self._id_file.with_name(self._id_file.name + ".tmp")
        aside.write_text(run.info.run_id + "\n")
        aside.replace(self._id_file)
        return run

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another run that started just now
                    raise
                experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id

    @property
    def _id_file(self) -> Path:
        return self._run_folder / "mlflow_run_id"

    def _log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        finite = [Metric(name, value, now, step) for name, value in metrics.items() if math.isfinite(value)]
        self._client.log_batch(self._run_id, metrics=finite, synchronous=True)

    def _finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status)
        if self._system_monitor is not None:
            self._system_monitor.finish()


def _tags(config: Config) -> dict[str, str]:
    tags = {
        "method": config.method.name,
        "noise": config.data.noise.level,
        "clean_count": str(config.data.clean_count),
        "seed": str(config.seed),
    }
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
