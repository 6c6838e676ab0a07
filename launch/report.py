"""Rebuild the report of a study from its tracking server, wherever the study ran.

    python launch/report.py RUN_ID [--uri sqlite:///mlflow.db] [--folder report]

RUN_ID is the MLflow run that the study's runs are nested under; launch/sweep.py keeps it in runs/NAME/mlflow_run_id.
"""

import argparse
import os
import sys
from pathlib import Path

from distseg.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_id", help="the study's MLflow run")
    parser.add_argument("--uri", default=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"), help="the store")
    parser.add_argument("--folder", type=Path, default=Path("report"), help="where report.html and its files go")
    arguments = parser.parse_args()
    from distseg.evaluation.study import write_report
    from distseg.tracking.mlflow import Study

    try:
        print(write_report(Study(arguments.uri, arguments.run_id), arguments.folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
