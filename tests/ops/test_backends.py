"""Which backend serves, what it says of itself, and a package without its extension."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from distseg import ops

ROOT = Path(__file__).parents[2]
TRAIN_A_STEP = """
import torch
from distseg import PixelReweighter, weighted_loss
from distseg.ops import backend
torch.manual_seed(0)
model = torch.nn.Conv2d(3, 1, 3, padding=1)
images, masks = torch.rand(2, 3, 8, 8), torch.randint(0, 2, (2, 8, 8))
weights = PixelReweighter(model)(images, masks, images, masks)
loss = weighted_loss(model(images), masks, weights)
loss.backward()
print(backend(), f"{loss.item():.6f}", f"{model.weight.grad.norm().item():.6f}")
"""


def run(folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    # -S, with the installed packages as a plain folder: an editable install of distseg would lend its extension to the
    # package in `folder`.
    paths = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    env = {k: v for k, v in os.environ.items() if k != "DISTSEG_NO_EXT"} | {"PYTHONPATH": paths} | environment
    command = [sys.executable, "-S", "-c", TRAIN_A_STEP]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_each_instruction_set_gives_the_same_step() -> None:
    results = {}
    for wanted in ("default", "avx2", None):
        ran = run(**({"ATEN_CPU_CAPABILITY": wanted} if wanted else {}))
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        name, *numbers = ran.stdout.rsplit(maxsplit=2)
        results[name] = [float(number) for number in numbers]
    assert "csrc (DEFAULT)" in results
    for numbers in results.values():
        assert numbers == pytest.approx(results["csrc (DEFAULT)"], rel=1e-5)


def test_without_extension_the_package_works_and_says_so_once() -> None:
    with_extension, without = run(), run(DISTSEG_NO_EXT="1")
    assert without.returncode == 0, without.stderr
    assert without.stdout.split()[0] == "reference"
    assert [float(x) for x in without.stdout.split()[1:]] == pytest.approx(
        [float(x) for x in with_extension.stdout.split()[-2:]], rel=1e-5
    )
    assert without.stderr.count("distseg: DISTSEG_NO_EXT=1; eager operators serve the CPU instead, slower") == 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is checked out: nothing built."""
    folder = tmp_path_factory.mktemp("sources")
    files = subprocess.run(
        ["git", "ls-files", "distseg", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for file in files:
        if (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes((ROOT / file).read_bytes())
    return folder


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "/nowhere/g++", "CC": "/nowhere/gcc"}, {"DISTSEG_NO_EXT": "1"}],
    ids=["no compiler", "no extension"],
)
def test_a_build_without_compiler_leaves_a_working_package(sources: Path, environment: dict[str, str]) -> None:
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    assert not list((sources / "distseg").glob("_C*"))
    if "CXX" in environment:
        assert 'building extension "distseg._C" failed' in built.stderr
    ran = run(sources)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("reference ")
    assert ran.stderr.count("distseg: the extension is not built") == 1


def test_a_backend_is_named_and_chosen() -> None:
    assert ops.backend("cpu").startswith("csrc (")
    assert ops.backend("meta") == "reference"
    with ops.using("reference"):
        assert ops.backend("cpu") == "reference"
        with ops.using("csrc"):
            assert ops.backend("cpu").startswith("csrc (")
        assert ops.backend("cpu") == "reference"
    assert ops.backend(torch.device("cpu")).startswith("csrc (")
    with pytest.raises(ValueError, match="backend 'cuda': triton, csrc or reference"), ops.using("cuda"):
        pass
