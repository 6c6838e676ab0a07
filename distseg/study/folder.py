"""What a study leaves on the disk, and under which names: the only module that knows them.

RUNS_DIR/NAME/plan.json            what the study consists of (distseg/study/plan.py)
              mlflow_run_id        the MLflow run that the study's runs are nested under
              configs/RUN.yaml     the config that each run is started with
              logs/RUN.log         what each run has printed
              status/RUN.json      how each run ended the last time
              locks/RUN            held by the process that makes the run; `study` by the one that writes the plan
              report/              report.html, its tables and figures
              RUN/                 each run's own folder (distseg/run_folder.py)
"""

from dataclasses import dataclass
from pathlib import Path

from distseg.run_folder import RunFolder


@dataclass(frozen=True)
class StudyFolder:
    path: Path

    def make(self) -> None:
        for name in ("configs", "logs", "status", "locks"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def lock(self) -> Path:
        return self.path / "locks" / "study"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    def config(self, name: str) -> Path:
        return self.path / "configs" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def status(self, name: str) -> Path:
        return self.path / "status" / f"{name}.json"

    def run_lock(self, name: str) -> Path:
        return self.path / "locks" / name
