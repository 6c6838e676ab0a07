"""A real Slurm on one machine: a controller and two nodes, below a folder, on the loopback, gone when the test ends."""

import os
import secrets
import shutil
import subprocess
import time
from pathlib import Path

import psutil
from experiment import wait_until

from distseg.distributed.runtime import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until the credentials of its first start are void: 120 s by default, 5 s at the least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
# On the loopback, instead of every address of the machine.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=2
# What waits in `urgent` takes the nodes of what runs in `patient`, which has a minute to put its affairs in order.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Slurm's nodes are their names; ours are addresses of the loopback, so that the first of them resolves.
NodeName=127.0.0.1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=patient Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    if os.geteuid() != 0:
        return "starting Slurm's daemons takes root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    return f"not installed: {', '.join(absent)}; make cluster-packages" if absent else None


class Slurm:
    """The cluster in `folder`; a context manager. `environment` is what its jobs are submitted with."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        # Every process of the cluster, daemon or task, has the path of its configuration in its environment.
        deadline = time.monotonic() + 20
        while own := self._processes():
            assert time.monotonic() < deadline, f"still there: {own}"
            for process in own:
                process.kill()
            psutil.wait_procs(own, timeout=5)

    def run(self, *command: str) -> str:
        """What `command`, one of Slurm's, prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None) -> str:
        """The id of a new batch job."""
        command = ["sbatch", "--parsable", *arguments]
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def describe(self, job: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode and whatever else Slurm knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        key = munge / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = dict(zip(("controller", "first", "second"), (free_port() for _ in range(3)), strict=True))
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, **ports))
        # --force: the socket's folder need not be open to other users, for there are none.
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "seed-file": munge / "seed"}
        options = [f"--{name}={path}" for name, path in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        wait_until((munge / "socket").exists, 20, "munged listens", self._log)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", "127.0.0.1")
        self._daemon("slurmd", "-D", "-N", "127.0.0.2")
        sinfo = ["sinfo", "--noheader", "--Node", "--partition=patient", "--format=%T"]

        def ready() -> bool:
            done = subprocess.run(sinfo, env=self.environment, capture_output=True, text=True, timeout=60)
            return done.stdout.split() == ["idle", "idle"]

        wait_until(ready, 60, "two idle nodes", self._log)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def _log(self) -> str:
        return (self.folder / "daemons.log").read_text()[-4000:]

    def _processes(self) -> list[psutil.Process]:
        own = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    own.append(process)
            except psutil.Error:  # gone, or a kernel thread
                continue
        return own
