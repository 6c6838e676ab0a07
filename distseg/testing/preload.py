"""What a run needs most of its start for, imported once by the server that tests' processes are forked from."""

import importlib

import distseg.training.trainer
from distseg.distributed.engine import import_deepspeed

import_deepspeed()
for name in (
    "torch._dynamo",
    "mlflow",
    "nvidia.dali",
):  # the first by torch's optimisers, the last where it is installed
    try:
        importlib.import_module(name)
    except ImportError:
        continue
