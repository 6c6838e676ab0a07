"""Whether a run is done, by its result.json and not by an exit code: a launcher that is killed may end with 0.

    python launch/finished.py --config configs/isic2017.yaml [--runs-dir runs] [section.key=value …]

The arguments are those of launch/train.py. Exit codes: 0 done; 1 not done, one line on stderr; 2 bad config.
"""

import argparse
import json
import sys
from pathlib import Path

from distseg.config.load import load_config
from distseg.errors import UserError
from distseg.files import read_regular
from distseg.run_folder import RunFolder

_LARGEST = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = RunFolder(arguments.runs_dir / config.name).result
    try:
        done = isinstance(json.loads(read_regular(result, _LARGEST)), dict)
    except (OSError, ValueError, RecursionError):
        done = False
    if not done:
        print(f"error: {result.parent}: is not done, it has no whole {result.name}; --resume goes on", file=sys.stderr)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
