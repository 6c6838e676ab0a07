"""Find out which masks are wrong, and where, and have them drawn again.

    python launch/audit.py RUN --to FOLDER [--folds N] [--data ROOT]
    deepspeed launch/audit.py RUN --to FOLDER                        # predicts on several ranks; without --folds

`--help` says more; the command itself is distseg/cli/audit.py.
"""

from distseg.cli.audit import main
from distseg.cli.process import run_command
from distseg.distributed.ending import leave

if __name__ == "__main__":
    leave(run_command(main))
