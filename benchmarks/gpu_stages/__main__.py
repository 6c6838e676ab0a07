"""One stage of benchmarks/gpu.py in a process of its own: `python -m gpu_stages NAME --device DEVICE --out FOLDER`."""

import argparse
import importlib
from pathlib import Path

from gpu_stages.findings import Findings, Setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    stage = importlib.import_module(f"gpu_stages.stage_{arguments.stage}")
    findings = Findings(arguments.out / f"{arguments.stage}.json", arguments.device)
    stage.measure(Setting(arguments.device, arguments.tiny), findings)


if __name__ == "__main__":
    main()
