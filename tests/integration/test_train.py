"""`deepspeed launch/train.py` as a user runs it: real ranks, a real DALI pipeline, a real MLflow store."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from distseg.config.load import dump_config, load_config
from distseg.errors import UserError
from distseg.methods.presets import PRESETS
from distseg.testing.forked import start_script
from distseg.testing.launcher import train_environment
from distseg.testing.ranks import run_ranks
from distseg.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = train_environment() | {"OMP_NUM_THREADS": "1"}  # bits depend on the number of threads

SMALL = """
name: small
data: {image_size: 32, clean_count: 4, noise: {kind: polygon, vertices: 3}, augment: {flip: true, right_angles: true}}
model: {width: 4, depth: 2, norm: batch}
optim: {name: adam, lr: 1e-3, schedule: one_cycle}
train: {steps: 12, batch_size: 2, clean_batch_size: 2, log_every: 1, validate_every: 6, checkpoint_every: 2}
"""


@pytest.fixture
def small(tmp_path: Path, drawn_data: Path, empty_store: Path) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    config = yaml.safe_load(SMALL)
    config["data"]["root"] = str(drawn_data)
    config["tracking"] = {"uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_train_track_and_report(small: Path, tmp_path: Path, train) -> None:
    import mlflow

    runs = tmp_path / "runs"
    done = train(2, "--config", str(small), "--runs-dir", str(runs), "train.accumulation=2", "deepspeed.zero_stage=2")
    assert done.returncode == 0, done.stderr
    run = runs / "small"
    result = json.loads((run / "result.json").read_text())
    assert {f"test/{m}" for m in ("dice", "jaccard", "sensitivity", "specificity", "accuracy")} <= result.keys()
    assert result["test/dice_low"] <= result["test/dice"] <= result["test/dice_high"]
    assert result["steps"] == 12 and result["world_size"] == 2 and 0 < result["noise_rate"] < 0.5
    logged = metrics_of(run)
    assert [row["step"] for row in logged if "train/loss" in row] == list(range(1, 13))
    diagnostics = ("gradient_norm", "effective_fraction", "zero_fraction", "wrong_mass", "auroc")
    assert {f"meta/{name}" for name in diagnostics} <= logged[0].keys()
    assert [row["step"] for row in logged if "val/dice" in row] == [6, 12]
    assert len(list((run / "noisy_masks").glob("*.png"))) == 16
    assert (run / "figures" / "step_00000006.png").stat().st_size > 1000
    assert (run / "checkpoints" / "last").read_text() == "step_00000012"
    assert "small" in done.stderr and "12/12" in done.stderr, "no progress bar"
    assert "Warning" not in done.stderr

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_run((run / "mlflow_run_id").read_text().strip())
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["method.name"] == "pixel_reweight"
    assert tracked.data.metrics["test/dice"] == pytest.approx(result["test/dice"])
    assert len(client.get_metric_history(tracked.info.run_id, "train/loss")) == 12

    again = train(0, "--config", str(small), "--runs-dir", str(runs), "train.accumulation=2", "deepspeed.zero_stage=2")
    assert again.returncode == 2
    assert again.stderr.strip().endswith("holds a run already; continue it with --resume, or choose another name=")
    other = train(0, "--config", str(small), "--runs-dir", str(runs), "--resume", "optim.lr=0.5")
    assert other.returncode == 2
    assert "--resume with another config: optim.lr was 0.001, is 0.5" in other.stderr


@pytest.fixture
def begin(small: Path, tmp_path: Path) -> Iterator[Callable[[str], BaseProcess]]:
    """Start a run of 40 steps, as one process, in the folder of that name; what still runs at the end is killed."""
    processes = []

    def start(name: str) -> BaseProcess:
        command = ["launch/train.py", *arguments_of(small, tmp_path / name)]
        files = (tmp_path / f"{name}.{stream}" for stream in ("stdout", "stderr"))
        processes.append(start_script(command, ROOT, ENVIRONMENT, *files))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def arguments_of(config: Path, runs: Path) -> list[str]:
    return ["--config", str(config), "--runs-dir", str(runs), "tracking.mlflow=false", "train.steps=40"]


def test_killed_and_resumed_is_bit_equal_to_never_stopped(small: Path, tmp_path: Path, begin, train) -> None:
    """As one process, the whole run beside the other; several ranks are in test_faults.py."""
    whole, killed = begin("whole"), begin("killed")
    log, deadline = tmp_path / "killed" / "small" / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 11):
        assert killed.is_alive(), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not (tmp_path / "killed" / "small" / "result.json").exists(), "finished before it was killed"

    resumed = train(0, *arguments_of(small, tmp_path / "killed"), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole.join(200)
    assert whole.exitcode == 0, (tmp_path / "whole.stderr").read_text()
    ends = [tmp_path / run / "small" / "checkpoints" / "step_00000040" for run in ("whole", "killed")]
    for name in sorted(path.name for path in ends[0].glob("*.safetensors")):
        expected, actual = (load_file(end / name) for end in ends)
        assert expected.keys() == actual.keys()
        for key in expected:
            assert expected[key].equal(actual[key]), f"{name}: {key}"
    expected, actual = (
        [{k: v for k, v in row.items() if "second" not in k} for row in metrics_of(end.parents[1])] for end in ends
    )
    assert actual == expected


def test_a_run_whose_folder_is_deleted_ends_with_one_line(small: Path, tmp_path: Path, begin) -> None:
    run, log = tmp_path / "gone" / "small", tmp_path / "gone" / "small" / "metrics.jsonl"
    process, deadline = begin("gone"), time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    shutil.rmtree(run, ignore_errors=True)
    process.join(200)
    said = (tmp_path / "gone.stderr").read_text()
    errors = [line for line in said.splitlines() if "error: " in line]
    assert process.exitcode == 1 and len(errors) == 1 and str(run) in errors[0], said
    assert "Traceback" not in said


@pytest.mark.parametrize("content", ["", "[]", '{"test/dice": "high"}', '{"test/dice": 1e400}', "\xff", "{" * 10**5])
def test_a_finished_run_with_an_odd_result_is_one_line(small: Path, tmp_path: Path, train, content: str) -> None:
    """What resuming a finished run reads."""
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config(small, [])))
    (run / "result.json").write_text(content, encoding="latin-1")
    done = train(0, "--config", str(small), "--runs-dir", str(tmp_path / "runs"), "--resume")
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(errors) == 1 and str(run / "result.json") in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_would_happen_and_keeps_nothing(small: Path, tmp_path: Path, train_ranks) -> None:
    before = sorted(tmp_path.iterdir())
    done = train_ranks(2, "--config", str(small), "--runs-dir", str(tmp_path / "runs"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "16 noisy, 4 clean, 6 val, 6 test" in done.stdout
    assert "12 steps of 4 images on 2 ranks (cpu)" in done.stdout
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.clean_cuont=3"], "data.clean_cuont: unknown key; did you mean clean_count?"),
        (["data.clean_count=50"], "data.clean_count"),
        (["data.root=/no/such/folder"], "/no/such/folder"),
        (["model.name=nowhere:Net"], "model.width=null takes it back"),
        (["model.name=nowhere:Net", "model={width: null, depth: null, norm: null}"], "model.name 'nowhere:Net'"),
        (["deepspeed.zero_stage=3", "method.meta_precision=bf16"], "a meta pass in bf16 needs whole parameters"),
        (
            [
                "model={name: 'tests.training.smooth_network:SmoothNetwork', width: null, depth: null, norm: null}",
                "method.estimator=head",
                "method.warm_up=0.5",
            ],
            "estimator head: the network's output is not that of a trained 1×1 convolution",
        ),
        *(
            (
                [
                    "model={name: 'tests.training.no_forward_mode:OwnOperator', width: null, depth: null, norm: null}",
                    f"method.name={method}",
                ],
                "estimator forward: the network has an operator without a derivative in forward mode",
            )
            for method in ("pixel_reweight", "meta_weight_net")
        ),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    small: Path, tmp_path: Path, train, arguments: list[str], said: str
) -> None:
    done = train(0, "--config", str(small), "--runs-dir", str(tmp_path / "runs"), *arguments)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_two_ranks_tell_of_bad_data_once_and_end(small: Path, drawn_data: Path, tmp_path: Path, train_ranks) -> None:
    broken = tmp_path / "data"
    shutil.copytree(drawn_data, broken)
    victim = sorted((broken / "images").glob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    done = train_ranks(2, "--config", str(small), "--runs-dir", str(tmp_path / "runs"), f"data.root={broken}")
    assert done.returncode == 2
    assert sum(victim.name in line for line in done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def train_each(runtime, config: str, folder: str, methods: list[str], stage: int) -> dict[str, Tensor]:
    for method in methods:
        overrides = [f"method.name={method}", f"deepspeed.zero_stage={stage}", "tracking.mlflow=false", "train.steps=4"]
        sparing = ["data.pipeline=torch", "train.validate_every=4", "train.checkpoint_every=4", "train.figure_every=9"]
        result = Trainer(load_config(Path(config), [*overrides, *sparing]), Path(folder, method), runtime).run(
            resume=False
        )
        assert result["method"] == method and result["steps"] == 4
    return {}


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_every_method_trains(small: Path, tmp_path: Path, stage: int) -> None:
    """At every ZeRO stage that it allows; a stage that it does not is refused."""
    needs_whole_parameters = ["meta_weight_net"] if stage == 3 else []
    for method in needs_whole_parameters:
        with pytest.raises(UserError, match=r"deepspeed\.zero_stage 3"):
            load_config(small, [f"method.name={method}", "deepspeed.zero_stage=3"])
    methods = [name for name in PRESETS if name not in needs_whole_parameters]
    run_ranks(train_each, 1, str(small), str(tmp_path), methods, stage)
    for method in methods:
        assert json.loads((tmp_path / method / "result.json").read_text())["steps"] == 4
