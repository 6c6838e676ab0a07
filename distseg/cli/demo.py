"""See the method work in five minutes, on data that is drawn on the spot.

    python launch/demo.py [--folder demo] [--ranks 2]

Draws dermoscopy-like images, replaces the training masks by triangles, trains a network that trusts them and one that
weighs their pixels, and sets the two side by side. The second one then predicts all images, and says which of the
training masks are wrong, and where. `make demo` calls this.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distseg.cli.process import say_in_passing
from distseg.distributed.launcher import train_command, train_environment
from distseg.errors import UserError

METHODS = ("noisy_only", "pixel_reweight")
IMAGES = {"train": 420, "val": 40, "test": 120}
SIZE = 96
CONFIG = Path("configs/demo.yaml")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where data, runs and the figure go")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the training")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    store, runs, figure = f"sqlite:///{folder}/mlflow.db", folder / "runs", folder / "figure.png"
    if not CONFIG.exists():
        raise UserError(f"{CONFIG}: no such file; run the demo in the folder of distseg's repository")

    from distseg.data.synthetic import write_dataset

    say_in_passing(f"drawing {sum(IMAGES.values())} images into {folder / 'data'}")
    write_dataset(folder / "data", IMAGES, SIZE, seed=0)
    for method in METHODS:
        shutil.rmtree(runs / method, ignore_errors=True)
        settings = [f"name={method}", f"method.name={method}", f"data.root={folder / 'data'}", f"tracking.uri={store}"]
        command = train_command(arguments.ranks, "--config", str(CONFIG), "--runs-dir", str(runs), *settings)
        if code := subprocess.run(command, env=train_environment()).returncode:
            return code

    say_in_passing("")
    compare = [sys.executable, "-m", "distseg.cli.main", "compare", *(str(runs / method) for method in METHODS)]
    if code := subprocess.run([*compare, "--figure", str(figure)]).returncode:
        return code
    run, images, predictions = str(runs / METHODS[-1]), str(folder / "data" / "images"), folder / "predictions"
    for words in (
        ["predict", run, images, "--to", str(predictions), "--overlays"],
        ["audit", run, "--to", str(folder / "audit")],
    ):
        say_in_passing("")
        if code := subprocess.run(
            [sys.executable, "-m", "distseg.cli.main", *words], env=train_environment()
        ).returncode:
            return code
    say_in_passing(f"\nfigure          {figure}")
    say_in_passing(f"predictions     {predictions / 'overlays'}")
    say_in_passing(f"masks in doubt  {folder / 'audit' / 'report.html'}")
    say_in_passing(f"compare runs    {mlflow()} ui --host 127.0.0.1 --backend-store-uri {store}")
    return 0


def mlflow() -> str:
    """How this environment's mlflow is called from the working folder."""
    program = Path(sys.executable).with_name("mlflow")
    return os.path.relpath(program) if program.exists() else "mlflow"
