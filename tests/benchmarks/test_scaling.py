import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling")


def test_the_benchmark_finds_every_collective_of_a_step(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--ranks", "2", "--width", "4", "--depth", "1", "--size", "16", "--batch", "2", "--rounds", "2"]
    command = [sys.executable, "benchmarks/scaling.py", *small, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text())
    measured = result["measured"]
    assert len(measured["scaling"]) == 4 and all(row["seconds"] > 0 for row in measured["scaling"])

    calls = {(row["kind"], row["asker"].split()[-1]): (row["calls"], row["bytes"]) for row in measured["collectives"]}
    gradient = 4 * measured["parameters"]
    assert calls["plain", "DeepSpeed"] == calls["weighted", "DeepSpeed"] == (1, gradient)
    assert calls["weighted", "_ready"] == (1, gradient + 4)  # with the count of valid pixels
    assert calls["weighted", "weight_maps"] == (1, 8 * 8)
    more = {name for kind, name in calls if kind == "weighted"} - {name for kind, name in calls if kind == "plain"}
    assert more == {"_ready", "weight_maps"}, "the meta pass communicates twice"
    assert "512" in done.stdout and "assumed, and not measured here" in done.stdout


def test_the_model_by_hand(scaling: ModuleType) -> None:
    cluster = scaling.Cluster(
        gpus_per_node=4, intra_latency=1e-6, intra_bandwidth=1e9, inter_latency=1e-5, inter_bandwidth=1e8,
        operations=1e12, overlap=0.5,
    )  # fmt: skip
    assert cluster.all_reduce(10**6, 1) == 0
    assert cluster.all_reduce(4 * 10**6, 4) == pytest.approx(6 * (1e-6 + 1e-3))  # a ring in one node
    assert cluster.all_reduce(8 * 10**6, 8) == pytest.approx(14 * (1e-5 + 1e-2))  # over two
    assert cluster.all_reduce(8, 512) == pytest.approx(18 * (1e-5 + 8e-8))  # a tree

    assert cluster.all_gather(10**6, 8) == pytest.approx(3 * 1e-5 + 7 * 1e-2)  # recursive doubling
    scattered = scaling.Message("deepspeed", "reduce_scatter_base", 8 * 10**6)
    assert cluster.seconds(scattered, 8) == pytest.approx(0.5 * cluster.all_gather(10**6, 8))

    network = scaling.Network(used=(scaling.traffic.Layer(10**6 - 1, 1),), registered=(10**6 - 1, 1))
    rows = scaling.extrapolate(cluster, network, operations_per_image=1e9, batch=10, gpus=[8], stage=0)
    by = {(row["mode"], row["kind"], row["gpus"]): row for row in rows}
    one, eight = by["weak", "weighted", 1], by["weak", "weighted", 8]
    assert one["seconds"] == pytest.approx(10 * 1e9 * scaling.WEIGHTED_RATIO / 1e12) and one["efficiency"] == 1
    assert eight["engine"] == pytest.approx(0.5 * 14 * (1e-5 + 5e-3))
    assert eight["clean_gradient"] == pytest.approx(0.5 * 14 * (1e-5 + 4 * (10**6 + 1) / 8e8))
    parts = ("computation", "engine", "clean_gradient", "scalars")
    assert eight["seconds"] == pytest.approx(sum(eight[part] for part in parts))
    assert by["strong", "plain", 1]["computation"] == pytest.approx(8 * by["strong", "plain", 8]["computation"])
    assert by["weak", "plain", 8]["clean_gradient"] == 0
    assert eight["scalars"] == pytest.approx(cluster.all_reduce(64, 8) + cluster.all_reduce(36, 8))
    assert one["messages"] == 0 and eight["messages"] == 4
