"""Memory limits of control groups, made up and real, and kills for lack of memory by the kernel."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gkd_lab.runner.control_groups import (
    VERSION_1,
    describe_kill_counts,
    find_memory_groups,
    has_killed_since,
    iterate_group_free_bytes,
)
from gkd_lab.runner.memory import compute_capacity, measure_free_bytes
from gkd_lab.runner.pack_capacity import absorb_kills
from gkd_lab.store import Store
from gkd_lab.store.pack_limits import PackLimits

from .tiny_experiments import options, tiny_grid

GIB, MIB = 2**30, 2**20
V2_MOUNT = "33 24 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "34 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def write_process_files(root: Path, cgroup: str, mounts: str) -> None:
    """Write the made-up `/proc/self/cgroup` and `/proc/self/mountinfo` below `root`."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(cgroup)
    (root / "proc" / "self" / "mountinfo").write_text(mounts)


def write_group(folder: Path, version: int, limit: str, usage: int, cached: int = 0, kills: int = 0) -> None:
    """Write the made-up files of one control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
    row = {1: "total_inactive_file", 2: "inactive_file"}[version]
    texts = (limit, str(usage))
    for name, text in zip(names[version], texts, strict=True):
        (folder / name).write_text(f"{text}\n")
    (folder / "memory.stat").write_text(f"anon 600\n{row} {cached}\n")
    (folder / {1: "memory.oom_control", 2: "memory.events"}[version]).write_text(f"low 0\noom_kill {kills}\n")


def test_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert list(iterate_group_free_bytes(tmp_path)) == []
    write_process_files(tmp_path, "0::/\n", "22 1 0:1 / / rw - ext4 /dev/sda rw\n")
    assert list(iterate_group_free_bytes(tmp_path)) == []
    assert measure_free_bytes("cpu", tmp_path) > 0


def test_own_group_of_version_2_limits_free_memory_to_1_gib(tmp_path: Path) -> None:
    write_process_files(tmp_path, "0::/slurm/job_7/step_0\n", V2_MOUNT)
    groups = tmp_path / "sys" / "fs" / "cgroup"
    write_group(groups / "slurm", 2, "max", 90 * GIB)
    write_group(groups / "slurm" / "job_7", 2, "max", GIB)
    write_group(groups / "slurm" / "job_7" / "step_0", 2, str(GIB), 400 * MIB, 100 * MIB)
    free_bytes = measure_free_bytes("cpu", tmp_path)
    assert free_bytes == GIB - 300 * MIB
    capacity = compute_capacity(16, 100 * MIB, free_bytes)
    assert capacity.max_cells == 4, "5 fit, 16 are evenly split into 4 packs of 4"
    assert "0.707 GiB are free" in capacity.reason


def test_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    write_process_files(tmp_path, "0::/a/b\n", V2_MOUNT)
    groups = tmp_path / "sys" / "fs" / "cgroup"
    write_group(groups, 2, str(50_000), 20_000)
    write_group(groups / "a", 2, str(1_000), 700, 100)
    write_group(groups / "a" / "b", 2, str(2_000), 50)
    assert list(iterate_group_free_bytes(tmp_path)) == [1_950, 400, 30_000]
    assert measure_free_bytes("cpu", tmp_path) == 400


def test_own_group_of_version_1_counts_beside_version_2(tmp_path: Path) -> None:
    mounts = V1_MOUNTS + V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    write_process_files(tmp_path, "4:cpuacct,memory:/jobs/7\n3:cpu:/\n0::/jobs\n", mounts)
    groups = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    write_group(groups, 1, str(2**63 - 4096), 9_000)
    write_group(groups / "jobs" / "7", 1, "1000", 700, 100, kills=3)
    (tmp_path / "sys" / "fs" / "cgroup" / "unified" / "jobs").mkdir(parents=True)
    assert min(iterate_group_free_bytes(tmp_path)) == 400
    counts = describe_kill_counts(tmp_path)
    assert list(counts["group_kills"].values()) == [3]


@pytest.mark.parametrize(
    ("own_path", "mount_root"), [("/docker/1f", "/docker/1f"), ("/", "/"), ("/docker/1f", "/")]
)
def test_container_whose_mount_begins_at_its_own_group(
    own_path: str, mount_root: str, tmp_path: Path
) -> None:
    write_process_files(tmp_path, f"0::{own_path}\n", V2_MOUNT.replace("0:28 /", f"0:28 {mount_root}", 1))
    write_group(tmp_path / "sys" / "fs" / "cgroup", 2, "1000", 700)
    assert list(iterate_group_free_bytes(tmp_path)) == [300]


def test_kills_are_counted_in_the_group_and_if_it_is_gone_on_the_machine(tmp_path: Path) -> None:
    write_process_files(tmp_path, "0::/job\n", V2_MOUNT)
    group = tmp_path / "sys" / "fs" / "cgroup" / "job"
    write_group(group, 2, "1000", 700, kills=1)
    (tmp_path / "proc" / "vmstat").write_text("pgfault 5\noom_kill 8\n")
    counts = describe_kill_counts(tmp_path)
    assert not has_killed_since(counts, tmp_path)
    (tmp_path / "proc" / "vmstat").write_text("pgfault 5\noom_kill 9\n")
    assert not has_killed_since(counts, tmp_path), "another group's"
    (group / "memory.events").write_text("oom_kill 2\n")
    assert has_killed_since(counts, tmp_path)
    assert has_killed_since({**counts, "machine": "far/1"}, tmp_path) is None, "nothing is known of it"
    (group / "memory.events").unlink()
    assert has_killed_since(counts, tmp_path)
    (tmp_path / "proc" / "vmstat").write_text("oom_kill 8\n")
    assert has_killed_since(counts, tmp_path) is False
    (tmp_path / "proc" / "vmstat").unlink()
    assert has_killed_since(counts, tmp_path) is None


@contextmanager
def create_real_group(limit: int) -> Iterator[Path]:
    """Create a memory control group of version 1 below this process's own; skip the test where it cannot."""
    own_groups = [group for group in find_memory_groups() if group.files == VERSION_1]
    if not own_groups:
        pytest.skip("no memory control group of version 1 on this machine")
    folder = own_groups[0].folder / f"gkd-lab-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be created here: {error}")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def run_in_group(group: Path, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a Python script in a control group, which it enters before all else."""
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", enter + script, *words], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_real_group_of_1_gib_sizes_the_packs(tmp_path: Path) -> None:
    """In a run inside the group, whose cells are said to need 256 MiB each."""
    if psutil.virtual_memory().available < 2 * GIB:
        pytest.skip("the machine itself has less than 2 GiB free")
    tiny_grid(tmp_path, "arithmetic", evaluations=[{"decoding": "greedy"}])
    script = (
        "import sys; from pathlib import Path\n"
        "from gkd_lab import experiments\n"
        "from gkd_lab.runner import train_cells\n"
        "from gkd_lab.runner.memory import measure_free_bytes\n"
        "from gkd_lab.runner.run import run_grid\n"
        "from gkd_lab.runner.run_options import RunOptions\n"
        "train_cells.measure_step_bytes = lambda trainer, inputs: 256 * 2**20\n"
        "outputs = Path(sys.argv[2])\n"
        "outcome = run_grid(experiments.load(sys.argv[1], outputs=outputs), RunOptions(outputs))\n"
        "assert not outcome.failures, outcome.failures\n"
        "print(measure_free_bytes('cpu'))"
    )
    with create_real_group(GIB) as group:
        done = run_in_group(group, script, str(tmp_path / "tiny.yaml"), str(tmp_path / "outputs"))
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < GIB
    grid = tiny_grid(tmp_path, "arithmetic", evaluations=[{"decoding": "greedy"}])
    limit = PackLimits(tmp_path / "outputs").read_capacity(grid.cells[0], "training", "cpu")
    assert limit is not None
    assert 1 <= limit.cells <= 3, "of 256 MiB in four fifths of what is free of 1 GiB"
    sizes = [
        len(Store(tmp_path / "outputs").get_record(cell).read_provenance()["pack"]) for cell in grid.cells
    ]
    assert set(sizes) <= {1, 2, 3}


LEAVE_ATTEMPT = """
import json, os, signal, sys
from pathlib import Path
from gkd_lab.runner.control_groups import describe_kill_counts
from gkd_lab.store import Record
from gkd_lab.store.attempts import record_attempt
facts = {"stage": "training", "cells": 6, "micro_batches": 1, "device": "cpu", **describe_kill_counts()}
with record_attempt([Record(Path(folder)) for folder in sys.argv[2:]], facts):
    if sys.argv[1] == "plain":
        os.kill(os.getpid(), signal.SIGKILL)
    memory = [bytearray(2**20) for _ in range(4096)]
"""


@pytest.mark.parametrize(("kind", "limit"), [("memory", 3), ("plain", None)])
def test_real_kill_for_lack_of_memory_halves_the_pack_and_a_plain_kill_does_not(
    kind: str, limit: int | None, tmp_path: Path
) -> None:
    grid = tiny_grid(tmp_path, "arithmetic")
    run_options = options(tmp_path / "outputs")
    records = [run_options.store.get_record(cell) for cell in grid.cells]
    for record in records:
        record.folder.mkdir(parents=True)
    with create_real_group(256 * MIB) as group:
        done = run_in_group(group, LEAVE_ATTEMPT, kind, *(str(record.folder) for record in records))
        assert done.returncode == -9, done.stderr
        facts: dict[str, Any] = json.loads((records[0].folder / "attempt.json").read_text())
        assert has_killed_since(facts) is (kind == "memory")
        absorb_kills(grid.cells, run_options)
    if kind == "memory":
        assert has_killed_since(facts), "the machine's count tells it when the group is gone"
    kept = PackLimits(run_options.outputs).read_capacity(grid.cells[0], "training", "cpu")
    assert (kept and kept.cells) == limit
