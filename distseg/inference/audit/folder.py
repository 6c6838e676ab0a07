"""What an audit leaves on the disk, and under which names: the only module that knows them.

audit.json         of which run, data and settings the folder is; and once it is done its figures
report.html        the page
table.csv          a row a mask, the most suspicious first
annotators.csv     a row an annotator
failed.csv         id, file and reason of what could not be judged; only if there is any
proposals/ID.png   the most probable mask of each image, at its own size
queue/             images to be annotated again, label-studio/ and cvat.zip
folds/             the study whose networks judge what they have not learned from (distseg/study/folder.py)
judges/NAME/       images/ and calibration/, each network's predictions (distseg/inference/job.py)
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distseg.errors import UserError
from distseg.files import read_regular, write_atomically

FORMAT = 1
_LARGEST_JSON = 2**24


@dataclass(frozen=True)
class AuditFolder:
    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "audit.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def table(self) -> Path:
        return self.path / "table.csv"

    @property
    def annotators(self) -> Path:
        return self.path / "annotators.csv"

    @property
    def failed(self) -> Path:
        return self.path / "failed.csv"

    @property
    def proposals(self) -> Path:
        return self.path / "proposals"

    @property
    def queue(self) -> Path:
        return self.path / "queue"

    @property
    def label_studio(self) -> Path:
        return self.queue / "label-studio"

    @property
    def cvat(self) -> Path:
        return self.queue / "cvat.zip"

    @property
    def folds(self) -> Path:
        return self.path / "folds"

    def images(self, judge: str) -> Path:
        return self.path / "judges" / judge / "images"

    def calibration(self, judge: str) -> Path:
        return self.path / "judges" / judge / "calibration"

    def check(self) -> None:
        """Raises UserError where the folder holds something that is not ours. Call it before anything is written."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"--to {self.path}: is a file; choose a folder")
        if any(path.name != "run.lock" for path in self.path.iterdir()) and not self.plan.exists():
            raise UserError(f"--to {self.path}: holds other things than an audit; choose a new folder")

    def begin(self, plan: dict[str, Any]) -> None:
        """Make the folder ready. What an audit of another plan has left goes, but for its folds."""
        self.path.mkdir(parents=True, exist_ok=True)
        plan = {"format": FORMAT, **plan}
        if _read(self.plan).get("plan") != plan:
            for path in (self.page, self.table, self.annotators, self.failed):
                path.unlink(missing_ok=True)
            for folder in (self.proposals, self.queue, self.path / "judges"):
                shutil.rmtree(folder, ignore_errors=True)
        self._write({"plan": plan})
        for folder in (self.proposals, self.queue):
            folder.mkdir(exist_ok=True)

    def add(self, content: dict[str, Any]) -> None:
        """What was found, beside the plan."""
        self._write({"plan": _read(self.plan).get("plan")} | content)

    def _write(self, content: dict[str, Any]) -> None:
        write_atomically(self.plan, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def keep_proposals(self, ids: Collection[str]) -> None:
        """Remove those of images that are not there any more."""
        for path in self.proposals.glob("*.png"):
            if path.stem not in ids:
                path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, _LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
