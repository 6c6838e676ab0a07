"""Two hosts on one machine: namespaces with a name, processes, an address and an sshd of their own, joined by a wire.

Their file system is the machine's, as a cluster's shared one, but for /etc/ssh, /etc/hosts and /run, which the test
makes. The wire's ends are both inside: no packet leaves. A host ends, with all its processes, when its first one does.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from experiment import wait_until

PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "sshd", "ssh", "ssh-keygen", "pdsh")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
NAMESPACES = ("--net", "--pid", "--mount", "--uts")

SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
# The folder of the test lies in one that everybody may write to.
StrictModes no
"""
SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    UserKnownHostsFile none
    StrictHostKeyChecking yes
    BatchMode yes
"""
FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
ip link set lo up
touch "$2/ready"
exec sleep infinity
"""


def missing() -> str | None:
    """Why there can be no two hosts here; None where there can."""
    if os.geteuid() != 0:
        return "making namespaces takes root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; make cluster-packages"
    wire = "ip link add end0 type veth peer name end1"
    namespaces = [shutil.which("unshare", path=PATH), *NAMESPACES, "--fork"]
    environment = os.environ | {"PATH": PATH}
    tried = subprocess.run([*namespaces, "sh", "-c", wire], env=environment, capture_output=True, text=True)
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    pid: int
    """Of its first process, as the machine counts."""

    def command(self, *command: str) -> list[str]:
        """`command` as it is to be started on the machine, to run on this host, in its root folder."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *command]

    def run(self, *command: str) -> str:
        environment = os.environ | {"PATH": PATH}
        done = subprocess.run(self.command(*command), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}: {done.stderr}"
        return done.stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """host1 and host2, each with ssh to both; what they need lies in `folder`."""
    addresses = {"host1": "10.214.7.1", "host2": "10.214.7.2"}
    keys = folder / "keys"
    keys.mkdir()
    for name in ("user", *addresses):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", keys / name]
        subprocess.run(make, check=True, timeout=60)
    known = [f"{name},{address} {(keys / f'{name}.pub').read_text()}" for name, address in addresses.items()]
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in addresses.items():
            own = folder / name
            (own / "ssh").mkdir(parents=True)
            (own / "ssh" / "sshd_config").write_text(SSHD_CONFIG)
            (own / "ssh" / "ssh_config").write_text(SSH_CONFIG)
            (own / "ssh" / "known_hosts").write_text("".join(known))
            for source, target in ((name, "host_key"), ("user", "user_key"), ("user.pub", "user_key.pub")):
                shutil.copy(keys / source, own / "ssh" / target)
            names = [f"{a} {n}" for n, a in addresses.items()]
            (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            hosts.append(Host(name, address, stack.enter_context(_first_process(name, own))))
        one, two = hosts
        wire = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(two.pid)]
        subprocess.run(["nsenter", f"--net=/proc/{one.pid}/ns/net", *wire], check=True, timeout=60)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run(shutil.which("sshd", path=PATH), "-E", f"{folder}/{host.name}/sshd.log")
        for host in hosts:
            wait_until(lambda host=host: _answers(one, host), 20, f"sshd of {host.name}")
        yield hosts


@contextlib.contextmanager
def _first_process(name: str, folder: Path) -> Iterator[int]:
    # It dies with unshare, and unshare with this process, whatever ends that.
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child"]
    command = [*unshare, "bash", "-c", FIRST_PROCESS, "bash", name, str(folder)]
    with subprocess.Popen(command, env=os.environ | {"PATH": PATH}, stdin=subprocess.DEVNULL) as process:
        try:

            def ready() -> bool:
                assert process.poll() is None, f"{name} did not start"
                return (folder / "ready").exists()

            wait_until(ready, 20, f"{name} starts")
            [first] = psutil.Process(process.pid).children()
            yield first.pid
        finally:
            process.kill()


def _answers(asking: Host, host: Host) -> bool:
    tried = subprocess.run(asking.command("ssh", host.name, "hostname"), capture_output=True, text=True, timeout=30)
    return tried.stdout.strip() == host.name
