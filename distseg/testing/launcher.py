"""`launch/train.py` as a user starts it, for the demo and the tests: run these commands in the repository's root."""

import os
import sys

from distseg.distributed.runtime import free_port


def train_command(ranks: int, *arguments: str) -> list[str]:
    """Under DeepSpeed's launcher on `ranks` processes of this machine, or as plain python for 0."""
    script = ["launch/train.py", *arguments]
    if ranks == 0:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *script]


def train_environment() -> dict[str, str]:
    """This process's variables, less what would make a child think that it is somebody's rank."""
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in ranks}
