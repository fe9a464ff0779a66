"""A Ray cluster of two nodes on this machine, bound to it alone, each with two pretended GPUs."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .slurm_cluster import find_free_ports

HOSTS = ("127.0.0.2", "127.0.0.3")
"""Loopback addresses: Ray has no authentication, and takes 127.0.0.1 for the machine's public address."""
START_SECONDS = 120
_RAY = (sys.executable, "-c", "from ray.scripts.scripts import main; main()")


class RayCluster:
    """A running cluster; drivers reach it with `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, find_free_ports(1)[0]
        self.environment = {**os.environ, "RAY_ADDRESS": f"{HOSTS[0]}:{self.port}"}
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the head and a second node, one after the other. Raises TimeoutError."""
        head = ("--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false")
        self.start_node(HOSTS[0], *head)
        self.start_node(HOSTS[1], f"--address={HOSTS[0]}:{self.port}")

    def start_node(self, host: str, *words: str) -> None:
        """Start a node and wait until it belongs to the cluster; its log is in the cluster's folder."""
        options = [f"--node-ip-address={host}", "--num-cpus=4", "--num-gpus=2", "--disable-usage-stats"]
        variables = {"RAY_raylet_start_wait_time_s": str(START_SECONDS), "GKD_STUB_SECONDS": "0.5"}
        file = self.folder / f"{host}.log"
        with file.open("wb") as log:
            self._nodes[host] = subprocess.Popen(
                [*_RAY, "start", *words, *options, "--block"],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in file.read_text(errors="replace"):
            if time.monotonic() > deadline or self._nodes[host].poll() is not None:
                raise TimeoutError(f"Ray did not start: {file.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)

    def kill_node(self, host: str) -> None:
        """Kill a node and every process of its tasks, as a power cut would."""
        node = psutil.Process(self._nodes.pop(host).pid)
        for process in (*node.children(recursive=True), node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """Kill all nodes."""
        for host in reversed([*self._nodes]):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.kill_node(host)


@contextlib.contextmanager
def run_ray_cluster() -> Iterator[RayCluster]:
    """Yield a running cluster, and stop it at the end. Its folder has a short name, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    cluster = RayCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
