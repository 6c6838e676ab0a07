"""Write a trained run as ONNX, as a torch.export program, or as a model that MLflow serves.

    python launch/export.py RUN --to FOLDER [--onnx] [--program] [--mlflow]

`--help` says more; the command itself is distseg/cli/export.py.
"""

import sys

from distseg.cli.export import main
from distseg.cli.process import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
