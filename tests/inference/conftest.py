"""A run's folder as training leaves it, without the training: its network finds what is dark."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distseg.config.load import dump_config, load_config
from distseg.models.registry import build_model
from distseg.training.checkpoint import FORMAT

CONFIG = """
name: made
data: {root: /nowhere, image_size: 32, pipeline: torch, threads: 2}
model: {width: 4, depth: 2}
train: {steps: 1}
"""


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_run(*overrides, step=…, seed=…)`: the folder of a run whose network is drawn by seed."""

    def make(*overrides: str, steps: tuple[int, ...] = (1,), seed: int = 0) -> Path:
        run = tmp_path_factory.mktemp("run") / "made"
        run.mkdir()
        (run / "written.yaml").write_text(CONFIG)
        config = load_config(run / "written.yaml", [*overrides])
        (run / "config.yaml").write_text(dump_config(config))
        for step in steps:
            torch.manual_seed(seed + step)
            write_checkpoint(
                run / "checkpoints" / f"step_{step:08d}",
                build_model(config.model, class_count=config.data.class_count),
                step,
            )
        (run / "checkpoints" / "last").write_text(f"step_{steps[-1]:08d}")
        (run / "checkpoints" / "best").write_text(f"step_{steps[0]:08d}")
        return run

    return make


def write_checkpoint(folder: Path, network: torch.nn.Module, step: int) -> None:
    """Complete by its sums. The head looks at the mean of its inputs, so that masks have holes and islands."""
    folder.mkdir(parents=True)
    with torch.no_grad():
        network.head.weight.mul_(3)
    save_file(network.state_dict(), folder / "model.safetensors")
    for name in ("method", "rank_00000"):
        save_file({}, folder / f"{name}.safetensors")
    state = {
        "format": FORMAT,
        "progress": {"step": step},
        "world_size": 1,
        "zero_stage": 0,
        "images_seen": 0,
        "images_per_step": {"noisy": 1, "clean": 1},
    }
    (folder / "state.json").write_text(json.dumps(state))
    files = sorted(path for path in folder.iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten images of several sizes, kinds and names, one of them in a sub-folder."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["a.png", "b.jpg", "Läsion é.png", "d 'q'.jpg", "below/e.tif", "f.png", "g.bmp", "h.jpg", "i.png", "j.png"]
    for number, name in enumerate(names):
        height, width = 40 + 13 * number, 90 - 5 * number
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        # By bytes: cv2.imwrite takes no name with accents on every system.
        (folder / name).write_bytes(cv2.imencode(Path(name).suffix, smooth)[1].tobytes())
    return folder
