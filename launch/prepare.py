"""Look through a data set before training on it, and decode its originals once and for all.

    python launch/prepare.py --config configs/isic2017.yaml data.root=PATH [section.key=value …]

`--help` says more; the command itself is distseg/cli/prepare.py.
"""

import sys

from distseg.cli.prepare import main
from distseg.cli.process import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
