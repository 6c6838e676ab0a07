"""Score predictions, or a run, against references.

    python launch/evaluate.py RUN --to FOLDER [--data ROOT] [--split test]

`--help` says more; the command itself is distseg/cli/evaluate.py.
"""

from distseg.cli.evaluate import main
from distseg.cli.process import run_command
from distseg.distributed.ending import leave

if __name__ == "__main__":
    leave(run_command(main))
