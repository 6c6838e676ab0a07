"""What a rank sends, in worlds that are not there and in small ones that are, is what the model says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from distseg.testing.ranks import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fake_world")


@pytest.fixture
def traffic(fake_world: ModuleType) -> ModuleType:
    return fake_world.traffic


def run(*options: str, timeout: float = 280) -> dict:
    path = Path(options[-1])
    command = [sys.executable, "benchmarks/fake_world.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(path.read_text())


@pytest.mark.parametrize("ranks", [[512], pytest.param([8, 512], marks=pytest.mark.slow)], ids=str)
def test_one_of_512_ranks_sends_what_the_model_says(ranks: list[int], tmp_path: Path) -> None:
    result = run("--ranks", *map(str, ranks), "--brief", "--widths", "--json", str(tmp_path / "figures.json"))
    rows = {(row["ranks"], row["stage"], row["lean"]): row for row in result["small"]}
    assert len(rows) == 5 * len(ranks) and all(row["difference"] is None for row in rows.values())
    for stage in (0, 1, 2):
        assert rows[512, stage, False]["messages_of_distseg"] == 3, "g, eight numbers and the flags"
    if 8 in ranks:
        assert rows[512, 3, True]["messages"] == rows[8, 3, True]["messages"], "the number does not grow with the ranks"


def test_the_model_by_hand(traffic: ModuleType) -> None:
    network = traffic.Network(used=(traffic.Layer(100, 4), traffic.Layer(4, 1)), registered=(100, 4, 4, 1))
    world = traffic.World(ranks=8, stage=0)
    sizes = [message.size for message in traffic.step(network, world, "forward")]
    assert sizes == [4 * 110, 8 * 8, 4 * 109, 4 * 9]
    partition = traffic.step(network, traffic.World(8, 1), "plain")[-1]
    assert partition == ("deepspeed", "allgather_base", 4 * 14, False), "109 elements in 8 parts of an even length"
    lean = traffic.step(network, traffic.World(8, 3, lean=True), "plain")
    shards = [message.size // 4 for message in lean if message.operator == "allgather_base"]
    assert shards == [13 + 1, 1 + 1, 1 + 1, 13 + 1], "forward, then backward"
    scattered = [message.size // 4 for message in lean if message.operator == "reduce_scatter_base"]
    assert scattered == [8, 8, 8 * 13, 8]
    assert traffic.step(network, traffic.World(1, 0), "forward") == []


def test_a_difference_is_seen(fake_world: ModuleType, traffic: ModuleType) -> None:
    expected = traffic.step(fake_world.small_network(), traffic.World(8, 0), "forward")
    assert fake_world.difference(expected, expected) is None
    larger = [expected[0]._replace(size=expected[0].size + 4), *expected[1:]]
    assert fake_world.difference(larger, expected).startswith("message 0")
    assert fake_world.difference(expected[:-1], expected).startswith(f"message {len(expected) - 1}")
    assert fake_world.difference(expected[::-1], expected).startswith("message 0"), "their order counts"


def of_a_real_rank(runtime, ranks: int) -> dict[str, Tensor]:
    """By world and kind of step, 1 where this rank's messages are not the model's."""
    import fake_world

    differs = {}
    for world in fake_world.small_worlds(ranks, (2,)):
        for kind, actual in fake_world.record_small(world).items():
            expected = fake_world.traffic.step(fake_world.small_network(), world, kind)
            difference = fake_world.difference(actual, expected)
            differs[f"{world} {kind}: {difference}"] = torch.tensor(difference is not None)
    return differs


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_real_ranks_send_what_the_model_says(fake_world: ModuleType, ranks: int) -> None:
    for rank, differs in enumerate(run_ranks(of_a_real_rank, ranks, ranks, timeout=280)):
        assert len(differs) == 5 * 4
        assert not [what for what, differ in differs.items() if differ], f"rank {rank}"


@pytest.mark.slow
def test_a_network_without_elements_sends_what_the_model_says_and_its_memory_is_counted(tmp_path: Path) -> None:
    options = ["--brief", "--ranks", "64", "--widths", "16", "--batch", "1", "--side", "16"]
    result = run(*options, "--json", str(tmp_path / "figures.json"))
    whole = 4 * result["large"][0]["parameters"]
    held = {row["stage"]: row["held"] / whole for row in result["large"]}
    assert all(row["difference"] is None for row in result["large"])
    assert held[0] == pytest.approx(2, rel=0.01), "parameters and momentum"
    assert held[1] == held[2] == pytest.approx(1 + 2 / 64, rel=0.05), "and masters and momentum in parts"
    assert held[3] == pytest.approx(3 / 64, rel=0.2), "all in parts, and the buffer of gradients"
