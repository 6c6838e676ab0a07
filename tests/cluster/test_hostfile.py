"""`deepspeed --hostfile` over two hosts: real ssh and pdsh, one rank on each, and the parameters of two local ranks."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from experiment import STEPS, assert_same_end, steps_done, wait_until
from hosts import PATH, Host, missing, two_hosts

from distseg.testing.launcher import train_environment

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.hostfile,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"no two hosts: {missing()}"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


def rank_on(host: Host) -> psutil.Process | None:
    """The process of the host's rank, once it trains."""
    for process in psutil.Process(host.pid).parent().children(recursive=True):
        if any(word.startswith("--local_rank=") for word in process.cmdline()):
            return process
    return None


def test_two_hosts_end_as_two_local_ranks_and_one_of_them_is_shut_down(
    hosts: list[Host], tmp_path: Path, experiment: Path, two_ranks: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    variables = tmp_path / "deepspeed_env"  # what the ranks are to have of this shell's variables
    variables.write_text("OMP_NUM_THREADS=1\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    script = ["launch/train.py", "--config", str(experiment), "--runs-dir", str(tmp_path), "--resume", "auto"]
    command = hosts[0].command("env", f"--chdir={ROOT}", *launcher, *script)
    environment = train_environment() | {"PATH": PATH, "DS_ENV_FILE": str(variables)}
    run, output = tmp_path / "small", tmp_path / "output"

    def start() -> subprocess.Popen:
        with output.open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def told() -> str:
        return output.read_text()[-4000:]

    with start() as first:
        try:

            def trained() -> bool:
                assert first.poll() is None, told()
                return steps_done(run) >= 10

            wait_until(trained, 200, "ten steps", told)
            ranks = [rank_on(host) for host in hosts]
            assert None not in ranks and ranks[0].pid != ranks[1].pid, told()
            ranks[1].terminate()  # as the shutdown of its host would
            assert first.wait(timeout=100) == 75, told()
        finally:
            first.kill()
    stopped = (run / "checkpoints" / "last").read_text()
    assert stopped != f"step_{STEPS:08d}", "finished before it could be stopped"

    with start() as second:
        try:
            assert second.wait(timeout=200) == 0, told()
        finally:
            second.kill()
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    assert_same_end(run, two_ranks)
