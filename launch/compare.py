"""Set finished runs side by side: a table of their test figures, and a picture of what their networks draw.

    python launch/compare.py runs/noisy_only runs/pixel_reweight [--figure comparison.png] [--markdown]

`--help` says more; the command itself is distseg/cli/compare.py.
"""

import sys

from distseg.cli.compare import main
from distseg.cli.process import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
