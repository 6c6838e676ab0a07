"""Train one experiment.

    deepspeed launch/train.py --config configs/isic2017.yaml data.root=PATH [section.key=value …] [--resume [auto]]
    python launch/train.py --config …                 # the same as one process

`--help` says more; the command itself is distseg/cli/train.py.
"""

from distseg.cli.process import run_command
from distseg.cli.train import main
from distseg.distributed.ending import leave

if __name__ == "__main__":
    leave(run_command(main))
