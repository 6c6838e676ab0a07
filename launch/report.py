"""Make the report of a study again, from its tracking server or from its folder.

    python launch/report.py RUN_ID [--uri sqlite:///mlflow.db] [--folder report]
    python launch/report.py runs/NAME [--folder report]

`--help` says more; the command itself is distseg/cli/report.py.
"""

import sys

from distseg.cli.process import run_command
from distseg.cli.report import main

if __name__ == "__main__":
    sys.exit(run_command(main))
