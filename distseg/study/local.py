"""A study's runs as their folders hold them: the report needs no tracking server."""

from collections.abc import Iterable
from typing import Any

from distseg.run_folder import RunFolder
from distseg.study.folder import StudyFolder
from distseg.study.records import read_history, read_result


class LocalRuns:
    """Reads what distseg.tracking.mlflow.Study reads from a server; a `study.analysis.RunSource`."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def read_text(self, artifact: str) -> str | None:
        """A file at the top of the study's folder, None where there is none."""
        path = self._folder.path / artifact
        return path.read_text(errors="replace") if path.is_file() else None

    def runs(self, histories: Iterable[str], texts: Iterable[str]) -> list[dict[str, Any]]:
        """The runs that have a result.json. Raises UserError, one line, for a file that is not what a run writes."""
        found = sorted(path.parent for path in self._folder.path.glob("*/result.json"))
        return [self._run(RunFolder(path), list(histories), list(texts)) for path in found]

    def images(self, run_id: str, key: str) -> dict[int, bytes]:
        """A run's panels by step; `key` has no meaning here, folders hold one kind of picture."""
        panels = self._folder.run(run_id).figures.glob("step_*.png")
        steps = {path: path.stem.removeprefix("step_") for path in panels}
        return {int(step): path.read_bytes() for path, step in steps.items() if step.isdecimal()}

    def _run(self, run: RunFolder, histories: list[str], texts: list[str]) -> dict[str, Any]:
        records = read_history(run.metrics) if run.metrics.exists() else []
        last: dict[str, float] = {}
        for record in records:
            last |= record.numbers
        return {
            "run_id": run.path.name,
            "name": run.path.name,
            "status": "FINISHED",
            "metrics": last | read_result(run).numbers,
            "history": {
                name: [(record.step, record.numbers[name]) for record in records if name in record.numbers]
                for name in histories
            },
            "texts": {name: self.read_text(f"{run.path.name}/{name}") for name in texts},
        }
