"""Make the report of a study again, from its tracking server, wherever the study ran, or from its folder.

    python launch/report.py RUN_ID [--uri sqlite:///mlflow.db] [--folder report]
    python launch/report.py runs/NAME [--folder report]

RUN_ID is the MLflow run that the study's runs are nested under; launch/sweep.py keeps it in runs/NAME/mlflow_run_id.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from distseg.cli.process import say_in_passing
from distseg.study.folder import StudyFolder


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="RUN_ID", help="the study's MLflow run, or its folder")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"), help="the store")
    parser.add_argument("--folder", type=Path, default=Path("report"), help="where report.html and its files go")
    arguments = parser.parse_args(argv)
    # Late: it takes the seconds that matplotlib and torch take to import.
    from distseg.study.report import write_report

    if Path(arguments.study).is_dir():
        from distseg.study.local import LocalRuns

        source = LocalRuns(StudyFolder(Path(arguments.study)))
        say_in_passing(write_report(source, arguments.study, arguments.folder).text)
        return 0
    from distseg.tracking.mlflow import Study

    tracked = Study(arguments.uri, arguments.study)
    report = write_report(tracked, f"MLflow run {tracked.run_id}", arguments.folder)
    say_in_passing(report.text)
    for file in report.files:
        tracked.log_file(file, "report")
    return 0
