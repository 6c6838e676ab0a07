"""What a run tells while it goes on: metrics.jsonl, MLflow, figures, a progress bar. It watches and never steers."""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from distseg.config.schema import Config
from distseg.files import write_atomically
from distseg.pages.figures import save_png
from distseg.run_folder import RunFolder
from distseg.tracking.jsonl import JsonlLog
from distseg.tracking.mlflow import MlflowTracker

logger = logging.getLogger(__name__)


class RunRecorder:
    """Writes on the main rank, and does nothing on the others.

    What cannot be written is named in one line and left out: neither a full disk nor a lost server stops a run here.
    """

    def __init__(self, config: Config, folder: RunFolder, steps: int, done: int, main: bool) -> None:
        """`done` updates have been made before; later lines of an earlier start are dropped."""
        self._folder, self._main = folder, main
        self._told: set[str] = set()
        self._log = JsonlLog(folder.metrics, from_step=done + 1) if main else None
        self._tracker = MlflowTracker(config, folder.path) if main and config.tracking.mlflow else None
        self._bar = tqdm(
            total=steps, initial=done, desc=config.name, unit="step", disable=not main,
            mininterval=0.5 if sys.stderr.isatty() else 15,
        )  # fmt: skip

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def show(self, text: str) -> None:
        """Beside the bar."""
        self._bar.set_postfix_str(text)

    def metrics(self, done: int, metrics: Mapping[str, float]) -> None:
        """Numbers after `done` updates."""
        if log := self._log:
            self._attempt("metrics.jsonl", lambda: log.log_metrics(metrics, done))
        if self._tracker:
            self._tracker.log_metrics(metrics, done)

    def figure(self, done: int, picture: np.ndarray) -> None:
        """A training panel (h, w, 3) uint8 after `done` updates."""
        if self._main:
            self._attempt("figures", lambda: save_png(picture, self._folder.figure(done)))
        if self._tracker:
            self._tracker.log_image(picture, "training batch", done)

    def result(self, result: Mapping[str, Any], steps: int) -> None:
        """The figures that the run ends with: result.json, which says that it is done, and the tracker."""
        if self._main:
            write_atomically(self._folder.result, json.dumps(result, indent=2) + "\n")
        if self._tracker:
            for path in (self._folder.result, self._folder.test_counts, self._folder.test_counts_own):
                if path.exists():
                    self._tracker.log_artifact(path)
        self.metrics(steps, {k: v for k, v in result.items() if isinstance(v, int | float) and math.isfinite(v)})

    def model(self, network: Callable[[], tuple[Any, np.ndarray]]) -> None:
        """Log a network, as `network` makes it with example images; it is made only where there is a tracker."""
        if self._tracker:
            self._tracker.log_model(*network())

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        self._bar.close()
        if log := self._log:
            self._attempt("metrics.jsonl", log.close)
        if self._tracker:
            self._tracker.finish(status)

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write, or say once for each kind of file that it could not be written."""
        try:
            write()
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                logger.warning("%s; the run goes on without it", error)
