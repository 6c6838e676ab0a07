"""Predict masks of images with a trained run, at the images' own size.

    deepspeed launch/predict.py RUN INPUT [INPUT …] --to FOLDER
    python launch/predict.py RUN INPUT …              # the same as one process

`--help` says more; the command itself is distseg/cli/predict.py.
"""

from distseg.cli.predict import main
from distseg.cli.process import run_command
from distseg.distributed.ending import leave

if __name__ == "__main__":
    leave(run_command(main))
