"""See the method work in five minutes, on data that is drawn on the spot.

    python launch/demo.py [--folder demo] [--ranks 2]

`--help` says more; the command itself is distseg/cli/demo.py.
"""

import sys

from distseg.cli.demo import main
from distseg.cli.process import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
