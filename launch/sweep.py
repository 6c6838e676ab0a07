"""Run a study: every run of its plan as a process, and the report of what came out.

    python launch/sweep.py configs/experiments/isic2017_cpu.yaml data.root=PATH [section.key=value …]
    python launch/sweep.py … --parallel 2          # two runs at once, on disjoint cores (and GPUs)
    python launch/sweep.py … --list                # index, name and state of each run
    python launch/sweep.py … --index 7             # one run, for a Slurm job array: --index $SLURM_ARRAY_TASK_ID
    python launch/sweep.py … --report              # only the report of what there is

`--help` says more; the command itself is distseg/cli/sweep.py.
"""

import sys

from distseg.cli.process import run_command
from distseg.cli.sweep import main

if __name__ == "__main__":
    sys.exit(run_command(main))
