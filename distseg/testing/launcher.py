"""`launch/train.py` as a user starts it, for the tests: run these commands in the repository's root."""

from distseg.distributed.launcher import launcher, train_environment

__all__ = ["train_command", "train_environment"]


def train_command(ranks: int, *arguments: str) -> list[str]:
    """Under DeepSpeed's launcher on `ranks` processes of this machine."""
    return [*launcher(ranks), "launch/train.py", *arguments]
