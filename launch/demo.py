"""See the method work in five minutes, on data that is drawn on the spot.

    python launch/demo.py [--folder demo] [--ranks 2]

Draws dermoscopy-like images, replaces the training masks by triangles, trains a network that trusts them and one that
weighs their pixels, and sets the two side by side. `make demo` calls this.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from distseg.data.synthetic import write_dataset
from distseg.errors import UserError
from distseg.testing.launcher import train_command, train_environment

METHODS = ("noisy_only", "pixel_reweight")
IMAGES = {"train": 420, "val": 40, "test": 120}
SIZE = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where data, runs and the figure go")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the training")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    store, runs, figure = f"sqlite:///{folder}/mlflow.db", folder / "runs", folder / "figure.png"

    print(f"drawing {sum(IMAGES.values())} images into {folder / 'data'}", flush=True)
    try:
        write_dataset(folder / "data", IMAGES, SIZE, seed=0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for method in METHODS:
        shutil.rmtree(runs / method, ignore_errors=True)
        settings = [f"name={method}", f"method.name={method}", f"data.root={folder / 'data'}", f"tracking.uri={store}"]
        command = train_command(arguments.ranks, "--config", "configs/demo.yaml", "--runs-dir", str(runs), *settings)
        if code := subprocess.run(command, env=train_environment()).returncode:
            return code

    print()
    compare = [sys.executable, "launch/compare.py", *(runs / method for method in METHODS), "--figure", figure]
    if code := subprocess.run(compare).returncode:
        return code
    print(f"\nfigure          {figure}")
    print(f"compare runs    {mlflow()} ui --host 127.0.0.1 --backend-store-uri {store}")
    return 0


def mlflow() -> str:
    program = Path(sys.executable).with_name("mlflow")
    return os.path.relpath(program) if program.exists() else "mlflow"


if __name__ == "__main__":
    sys.exit(main())
