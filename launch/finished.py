"""Whether a run is done, by its result.json and not by an exit code: a launcher that is killed may end with 0.

    python launch/finished.py --config configs/isic2017.yaml [--runs-dir runs] [section.key=value …]

`--help` says more; the command itself is distseg/cli/finished.py.
"""

import sys

from distseg.cli.finished import main
from distseg.cli.process import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
