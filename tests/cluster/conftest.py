"""What the tests of Slurm and of the hostfile compare with: the same experiment on two ranks of this machine."""

from pathlib import Path

import pytest
from experiment import write_experiment


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory, drawn_data: Path) -> Path:
    """The config file of a small experiment."""
    return write_experiment(tmp_path_factory.mktemp("experiment"), drawn_data)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, experiment: Path, train) -> Path:
    """The folder of its run on two local ranks that nothing interrupts."""
    runs = tmp_path_factory.mktemp("local")
    done = train(2, "--config", str(experiment), "--runs-dir", str(runs))
    assert done.returncode == 0, done.stderr
    return runs / "small"
