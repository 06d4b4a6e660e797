"""A real Slurm on this machine: a controller and two node daemons, each in a process namespace of its own."""

import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
CONFIGURATION = """\
ClusterName=flatlab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


class Slurm:
    """A running Slurm; SLURM_CONF names its configuration while it runs."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder, self.stack = folder, stack
        self.nodes: dict[str, subprocess.Popen] = {}

    def start(self, *command: str) -> subprocess.Popen:
        log = self.stack.enter_context((self.folder / f"{Path(command[0]).name}.log").open("a"))
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.stack.callback(end, process)
        return process

    def start_node(self, name: str) -> None:
        own = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "slurmd", "-D", "-N", name)
        self.nodes[name] = self.start(*own)

    def kill_node(self, name: str) -> None:
        """Kill a node and all of its processes by SIGKILL, as where its power fails."""
        os.kill(self.nodes[name].pid, signal.SIGKILL)  # of `unshare`, whose child is the namespace's first process
        self.nodes[name].wait(20)


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def until(holds, seconds=300.0):
    """Wait until a condition holds; return what it gave."""
    limit = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.1)
    return found


def answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def slurm(folder: Path):
    """Start Slurm, and stop it at the end; skip where it is not installed or cannot be started by this user."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"Slurm is not installed here ({', '.join(lacking)}): apt-get install slurmctld slurmd munge.")
    if os.geteuid() != 0:
        pytest.skip("Slurm's node daemons must be started by root.")
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "true"]).returncode:
        pytest.skip("Slurm's node daemons need process namespaces of their own, which are refused here.")
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    words = {"host": platform.node(), "user": "root", "folder": folder, "ports": free_ports(3)}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**words))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        made = Slurm(folder, stack)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        made.start("munged", "--force", "--foreground", *(f"--{o}={folder}/munge.{f}" for o, f in files.items()))
        until((folder / "munge.socket").exists)
        made.start("slurmctld", "-D")
        for name in ("n1", "n2"):
            (folder / f"spool-{name}").mkdir()
            made.start_node(name)
        until(lambda: _idle(2))
        yield made


def _idle(count: int) -> bool:
    asked = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%T"], capture_output=True, text=True)
    return asked.stdout.split() == ["idle"] * count


def settled() -> None:
    """Wait until both nodes are idle again."""
    until(lambda: _idle(2))
