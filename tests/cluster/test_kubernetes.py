"""launch/k8s/: the manifest, and its command as two processes with the variables that the operator sets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distseg.config.load import load_config
from distseg.distributed.runtime import free_port
from distseg.testing.launcher import train_environment

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def replicas() -> dict:
    job = yaml.safe_load((ROOT / "launch" / "k8s" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    return job["spec"]["pytorchReplicaSpecs"]


def test_master_and_workers_are_alike_and_survive_pre_emption(replicas: dict) -> None:
    master, worker = replicas["Master"], replicas["Worker"]
    assert master["replicas"] == 1 and worker["replicas"] >= 1
    assert master["template"] == worker["template"]
    assert master["restartPolicy"] == worker["restartPolicy"] == "OnFailure"
    pod = master["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["args"][container["args"].index("--resume") + 1] == "auto"
    [config] = [word.removeprefix("--config=") for word in container["args"] if word.startswith("--config=")]
    load_config(ROOT / config, [word for word in container["args"] if word.startswith("data.")])


def test_its_command_trains_with_the_variables_of_the_operator(
    replicas: dict, tmp_path: Path, experiment: Path
) -> None:
    [container] = replicas["Worker"]["template"]["spec"]["containers"]
    python, *command = container["command"]
    assert python == "python"
    root = yaml.safe_load(experiment.read_text())["data"]["root"]
    every = [f"train.{key}=2" for key in ("steps", "validate_every", "checkpoint_every", "figure_every")]
    here = [f"--config={experiment}", f"--runs-dir={tmp_path}", f"data.root={root}", *every]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    pods = []
    try:
        for rank in (0, 1):
            environment = train_environment() | shared | {"RANK": str(rank)}
            arguments = [sys.executable, *command, *container["args"], *here]
            with (tmp_path / f"pod-{rank}").open("w") as log:
                pods.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = [pod.wait(timeout=240) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()
    assert codes == [0, 0], "\n".join((tmp_path / f"pod-{rank}").read_text() for rank in (0, 1))
    assert json.loads((tmp_path / "small" / "result.json").read_text())["world_size"] == 2
