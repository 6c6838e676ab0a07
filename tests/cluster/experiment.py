"""A small experiment, and what it means that two runs of it ended the same."""

import time
from collections.abc import Callable
from pathlib import Path

import yaml
from safetensors.torch import load_file

STEPS = 240

CONFIG = f"""
name: small
data:
  image_size: 32
  clean_count: 4
  noise: {{kind: polygon, vertices: 3}}
  augment: {{flip: true, right_angles: true}}
  pipeline: torch
model: {{width: 4, depth: 2, norm: batch}}
optim: {{name: adam, lr: 1e-3, schedule: one_cycle}}
train: {{steps: {STEPS}, batch_size: 2, clean_batch_size: 2, log_every: 1}}
tracking: {{mlflow: false}}
"""
"""No checkpoint on the way but those that a stop makes: what continues, continues from these."""


def write_experiment(folder: Path, data: Path) -> Path:
    config = yaml.safe_load(CONFIG)
    config["data"]["root"] = str(data)
    config["train"] |= dict.fromkeys(("validate_every", "checkpoint_every", "figure_every"), STEPS)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steps_done(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def wait_until(condition: Callable[[], bool], seconds: float, what: str, state: Callable[[], str] = str) -> None:
    """Poll `condition`; AssertionError with `what` and the `state` of things after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{state()}"
        time.sleep(0.1)


def assert_same_end(actual: Path, expected: Path) -> None:
    """Parameters, buffers, optimiser state and random streams of every rank after the last step, bit for bit."""
    ends = [run / "checkpoints" / f"step_{STEPS:08d}" for run in (actual, expected)]
    names = [sorted(path.name for path in end.glob("*.safetensors")) for end in ends]
    assert names[0] == names[1] and len(names[0]) >= 3, names
    for name in names[0]:
        got, wanted = (load_file(end / name) for end in ends)
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert got[key].equal(value), f"{name}: {key}"
