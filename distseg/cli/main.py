"""distseg: train segmentation networks from many unreliable masks and a few expert ones.

distseg COMMAND …             distseg COMMAND --help says more

"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from distseg.cli.process import run_command
from distseg.distributed.ending import leave

COMMANDS = {
    "train": "train one experiment",
    "prepare": "look through a data set, and decode it once and for all",
    "sweep": "run a study: many runs from one file, and their report",
    "report": "make the report of a study again",
    "finished": "say whether a run is done",
    "predict": "masks of images, by a trained run",
    "evaluate": "score a run, or masks, against references",
    "audit": "which masks are wrong, and where; a queue to draw them again",
    "export": "write a run as ONNX, as a torch program, or as a model for MLflow",
    "compare": "set finished runs side by side",
    "demo": "see the method work in five minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `distseg`; returns its exit code, and ends the process itself after one with ranks."""
    words = sys.argv[1:] if argv is None else list(argv)
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"    {name:{width}}  {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="distseg", description=f"{__doc__}{commands}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    command = parser.parse_args(words[:1] or ["--help"]).command
    code = run_command(lambda: _run(command, words[1:]))
    if command in ("train", "predict", "evaluate", "audit"):
        leave(code)
    return code


def _run(command: str, words: list[str]) -> int:
    # Late: a command loads what it needs and no more.
    code: int = importlib.import_module(f"distseg.cli.{command}").main(words, prog=f"distseg {command}")
    return code


if __name__ == "__main__":
    sys.exit(main())
