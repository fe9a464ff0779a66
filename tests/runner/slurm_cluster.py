"""A Slurm cluster of one machine for tests: pretended nodes and GPUs, daemons that belong to one test run.

Partitions: `main` of two nodes with two GPUs each; `fragile` of two, whose slurmd a test kills; `low` and
`high` of one node, where `high` preempts. All files are in one folder, ports are free ones, munge has its own
key.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
"""The daemons are where an ordinary user's PATH may not reach."""
NODES = ("n1", "n2", "n3", "n4", "n5")

SLURM_CONF = """\
ClusterName=gkd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
InactiveLimit=0
KillWait=5
MinJobAge=900
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DefMemPerCPU=100
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
NodeName=n[1-5] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports}
PartitionName=main Nodes=n[1-2] Default=YES State=UP MaxTime=INFINITE
PartitionName=fragile Nodes=n[3-4] State=UP MaxTime=INFINITE
PartitionName=short Nodes=n[1-2] State=UP MaxTime=10
PartitionName=low Nodes=n5 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=3
PartitionName=high Nodes=n5 State=UP PriorityTier=10 PreemptMode=OFF
"""


def find_missing_program() -> str | None:
    """Return a program that a cluster needs and this machine lacks, or None."""
    return next((name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None), None)


class Cluster:
    """A running cluster; commands and drivers reach it with `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        variables = {"PATH": SEARCH_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment = {**os.environ, **variables}

    def run(self, *words: str) -> str:
        """Return the output of a command of Slurm."""
        process = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert process.returncode == 0, (words, process.stderr)
        return process.stdout

    def start(self) -> None:
        """Write the configuration, start all daemons and wait until every node is idle."""
        ports = find_free_ports(len(NODES) + 1)
        values = {
            "host": socket.gethostname().partition(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "port": ports[0],
            "ports": f"[{','.join(map(str, ports[1:]))}]",
        }
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (self.folder / "gres.conf").write_text(
            "NodeName=n[1-5] Name=gpu File=/dev/null\nNodeName=n[1-5] Name=gpu File=/dev/zero\n"
        )
        version = tuple(int(part) for part in self.run("sinfo", "--version").split()[-1].split(".")[:2])
        plugin = "disabled" if version >= (23, 11) else "cgroup/v1\nCgroupAutomount=no"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.run(
            "munged",
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")),
            f"--socket={self.folder}/munge.socket",
        )
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + 60
        while (states := self.run("sinfo", "-h", "-N", "-o", "%T").split()) and set(states) != {"idle"}:
            assert time.monotonic() < deadline, (states, (self.folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.2)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and every process of its jobs, as a power cut would."""
        daemon = psutil.Process(int((self.folder / f"slurmd-{node}.pid").read_text()))
        spool = str(self.folder / f"spool-{node}")
        daemon.kill()
        for process in psutil.process_iter(["cmdline", "environ"]):
            variables = process.info["environ"] or {}
            is_job = variables.get("SLURMD_NODENAME") == node and "SLURM_JOB_ID" in variables
            if is_job and variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                kill_tree(process, spool)

    def stop(self) -> None:
        """End all jobs, then the daemons that this object started."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}")
            time.sleep(1)
        for file in self.folder.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError, OSError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def kill_tree(process: psutil.Process, spool: str) -> None:
    """Kill a process of a job, with its parent if that is Slurm's own keeper of the job."""
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        process.kill()
        if parent is not None and "slurmstepd" in " ".join(parent.cmdline()):
            parent.kill()


def find_free_ports(count: int) -> list[int]:
    """Return ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def run_cluster() -> Iterator[Cluster]:
    """Yield a running cluster, and stop it at the end. Its folder has a short name, for munge's socket."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
