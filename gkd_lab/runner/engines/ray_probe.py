"""Probe Ray before a hundred tasks are queued: package, cluster, resources of nodes, shared folders.

It runs in a process of its own, as `python -m gkd_lab.runner.engines.ray_probe ADDRESS PATH...`, because Ray
may wait minutes for a cluster that is gone, or end the process that asks.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from gkd_lab.config import ConfigError
from gkd_lab.runner.engines.ray_engine import RayOptions
from gkd_lab.status.unit_resources import UnitResources
from gkd_lab.store.unit_files import UnitFiles

PROBE_SECONDS = 60
"""Seconds to wait for the cluster to answer."""
_NODE_SECONDS = 30
"""Seconds to wait for what the nodes see; one that is too busy to answer is not asked again."""


def check_ray_cluster(
    options: RayOptions,
    requests: Collection[UnitResources],
    files: UnitFiles,
    folder: Path,
    seconds: float = PROBE_SECONDS,
) -> None:
    """Raise ConfigError for a missing package or cluster, a node without a folder, or too small nodes.

    requests: What the units ask for. folder: Where they run.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--executor ray needs the package ray: pip install 'gkd-lab[ray]'")
    token = files.folder.absolute() / "ray-probe"
    token.touch()
    try:
        facts = _ask_cluster(options.address, [str(token), str(folder), sys.executable], seconds)
    finally:
        token.unlink(missing_ok=True)
    for node, path in facts["missing"]:
        if path == sys.executable:
            way_out = "install gkd-lab into an environment on a file system that the nodes share"
        else:
            way_out = "take a file system that the nodes share, by --outputs and a folder to start from"
        raise ConfigError(f"--executor ray: the node {node} does not see {path}: {way_out}")
    for request in requests:
        _check_capacity(options, request, facts["nodes"])


def _ask_cluster(address: str, paths: Sequence[str], seconds: float) -> dict[str, Any]:
    """Return what the probe's process says: `nodes` and `missing`. ConfigError where it has no cluster."""
    where = "at the address of RAY_ADDRESS, or on this machine" if address == "auto" else f"at {address}"
    way_out = "start one with `ray start --head`, or set RAY_ADDRESS (docs/clusters.md)"
    words = [sys.executable, "-m", "gkd_lab.runner.engines.ray_probe", address, *paths]
    try:
        process = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"--executor ray: no Ray cluster answers {where} within {seconds:g} s: {way_out}"
        ) from error
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        reason = " ".join((process.stderr.strip().splitlines() or ["no answer"])[-1].split())
        raise ConfigError(f"--executor ray: no Ray cluster {where} ({reason}): {way_out}")
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def _check_capacity(options: RayOptions, request: UnitResources, nodes: Sequence[dict[str, float]]) -> None:
    """Raise ConfigError if no node has the devices, or the memory, that a unit asks for."""
    wanted = {"GPU": options.gpus, "memory": options.memory_bytes or request.memory_bytes or 0, "CPU": 1}
    if any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
    raise ConfigError(
        f"--executor ray: no node has {_format_resources(wanted)}, as a unit asks; the most that one has is "
        f"{_format_resources(largest)}: ask for less by --gpus or --mem"
    )


def _format_resources(amounts: dict[str, float]) -> str:
    """Return amounts as `2 GPUs, 4.0 GiB and 1 CPUs`."""
    return f"{amounts['GPU']:g} GPUs, {amounts['memory'] / 2**30:.1f} GiB and {amounts['CPU']:g} CPUs"


def _list_missing_paths(ray: Any, nodes: Sequence[dict[str, Any]], paths: Sequence[str]) -> list[list[str]]:
    """Return [node, path] for each path that a node does not see."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def find_missing(paths: list[str]) -> list[str]:
        """Return the paths that do not exist on this node."""
        import os

        return [path for path in paths if not os.path.exists(path)]

    tasks = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(find_missing).options(num_cpus=0, scheduling_strategy=strategy)
        tasks[task.remote(list(paths))] = node["NodeManagerHostname"]
    ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_NODE_SECONDS)
    return [[tasks[reference], path] for reference in ready for path in ray.get(reference)]


def main() -> None:
    """Print JSON on the cluster at the address in the command line: resources of nodes, and missing paths."""
    import ray

    address, *paths = sys.argv[1:]
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        sys.exit(" ".join(str(error).split()))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    missing = _list_missing_paths(ray, nodes, paths)
    print(json.dumps({"nodes": [node["Resources"] for node in nodes], "missing": missing}))


if __name__ == "__main__":
    main()
