"""Whether a run is done, by its result.json and not by an exit code: a launcher that is killed may end with 0.

    python launch/finished.py --config configs/isic2017.yaml [--runs-dir runs] [section.key=value …]

The arguments are those of launch/train.py. Exit codes: 0 done; 1 not done, one line on stderr; 2 bad config.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from distseg.cli.process import tell_error
from distseg.files import read_regular
from distseg.run_folder import RunFolder

_LARGEST = 2**20


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    # Late: `--help` imports no torch.
    from distseg.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    result = RunFolder(arguments.runs_dir / config.name).result
    try:
        done = isinstance(json.loads(read_regular(result, _LARGEST)), dict)
    except (OSError, ValueError, RecursionError):
        done = False
    if not done:
        tell_error(f"{result.parent}: is not done, it has no whole {result.name}; --resume goes on")
    return 0 if done else 1
