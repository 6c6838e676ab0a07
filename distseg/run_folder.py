"""What a run leaves on the disk, and under which names: the only module that knows them.

runs/NAME/config.yaml          the resolved config
          metrics.jsonl        one line a logged step
          result.json          final figures, once the run is done
          test_counts.csv      true and false positives and negatives of each test image
          test_counts_own.csv  the same at the files' own resolution, unless data.score_own is never
          mlflow_run_id        the id of its MLflow run
          run.lock             held by the process that trains it (distseg/run_lock.py)
          checkpoints/         distseg/training/checkpoint.py
          figures/             training panels along the steps
          noisy_masks/         the noisy stream's masks, where they are simulated or made of several annotators'
          init.json            of a run with model.init_from, the file that it began with and the tensors taken from it
          data.json            its samples: split, group, whether it is clean, the SHA-256 of its files
          left_out.csv         under data.on_bad=skip the samples that it does without, and why
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def test_counts(self) -> Path:
        return self.path / "test_counts.csv"

    @property
    def test_counts_own(self) -> Path:
        return self.path / "test_counts_own.csv"

    @property
    def mlflow_run_id(self) -> Path:
        return self.path / "mlflow_run_id"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def noisy_masks(self) -> Path:
        return self.path / "noisy_masks"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def init(self) -> Path:
        return self.path / "init.json"

    @property
    def left_out(self) -> Path:
        return self.path / "left_out.csv"

    def figure(self, step: int) -> Path:
        return self.figures / f"step_{step:08d}.png"
