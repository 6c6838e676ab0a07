"""What several rooms' tests share: a small data set, and entry points run as a user runs them."""

import logging
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distseg.data.synthetic import write_dataset
from distseg.testing.forked import run_script
from distseg.testing.launcher import train_command, train_environment

ROOT = Path(__file__).parents[1]

# Triton decides when a kernel is defined: in its interpreter the kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests' tensors are small: threads would wait for each other, on a busy machine many times as long as they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """What a test, or a command that it runs in this process, sets is not the next one's."""
    yield
    torch.set_num_threads(1)
    logger = logging.getLogger("distseg")
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """`counted(what, number)`: how often a test did something; the end of the output adds up all tests' numbers."""
    return lambda what, number: request.node.user_properties.append((COUNTED, (what, number)))


COUNTED = "counted"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if COUNTED in getattr(item, "fixturenames", ()):
            item.add_marker(COUNTED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals = Counter[str]()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == COUNTED and report.when == "call":
                totals[value[0]] += value[1]
    if totals:
        terminalreporter.section("ended as promised")
        for what, number in sorted(totals.items()):
            terminalreporter.line(f"{number:6} {what}")


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 drawn dermoscopy images with true masks: 20 train, 6 val, 6 test."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_dataset(folder, {"train": 20, "val": 6, "test": 6}, size=48, seed=0)
    return folder


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite file of MLflow's with its tables and nothing in them, to be copied: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


# Bits depend on the number of threads; a model of the tests' own is found from the repository's root.
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def train(train_ranks: Callable[..., subprocess.CompletedProcess]) -> Callable[..., subprocess.CompletedProcess]:
    """Run `launch/train.py` to its end, by DeepSpeed's launcher or, for 0 ranks, alone; `train(ranks, *arguments)`."""

    def run(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
        if ranks == 0:
            return train_ranks(1, *arguments)
        return subprocess.run(
            train_command(ranks, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
        )

    return run


@pytest.fixture(scope="session")
def train_ranks() -> Callable[..., subprocess.CompletedProcess]:
    """`train` without DeepSpeed's launcher, by processes that start at once; the ranks' outputs are joined."""

    def run(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
        done = run_script(["launch/train.py", *arguments], ROOT, ENVIRONMENT, ranks)
        code = max((rank.returncode for rank in done), key=abs)
        outputs, errors = ("".join(getattr(rank, stream) for rank in done) for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(done[0].args, code, outputs, errors)

    return run
