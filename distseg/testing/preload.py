"""What a run needs most of its start for, imported once by the server that tests' processes are forked from."""

import importlib

from distseg.distributed.engine import import_deepspeed

import_deepspeed()
# torch's optimisers import its compiler; DALI is not installed everywhere.
for name in ("distseg.training.trainer", "torch._dynamo", "mlflow", "nvidia.dali"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
