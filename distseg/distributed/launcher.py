"""How a training is started as a process of its own: for studies, the demo and the tests."""

import os
import sys


def launcher(ranks: int) -> list[str]:
    """The command before the script: DeepSpeed's launcher for `ranks` processes of this machine, plain python for 0."""
    if ranks == 0:
        return [sys.executable]
    # Late: it imports torch.
    from distseg.distributed.runtime import free_port

    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*runner, "--master_port", str(free_port())]


def train_command(ranks: int, *arguments: str) -> list[str]:
    """`distseg train` on `ranks` processes, from any working folder."""
    return [*launcher(ranks), "--module" if ranks else "-m", "distseg.cli.train", *arguments]


def train_environment() -> dict[str, str]:
    """This process's variables, less what would make a child think that it is somebody's rank."""
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in ranks}
