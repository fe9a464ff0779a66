"""Memory limits of this process's control group, of both versions, and the kernel's out-of-memory kills.

A job's limit stands at its own group or at any group above it, so that all of them are read. `root` is the
folder below which `/proc` and `/sys` are looked up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gkd_lab.store.lock_owner import identify_machine


@dataclass(frozen=True)
class GroupFiles:
    """Names of the files of one version of control groups."""

    limit: str
    usage: str
    reclaimable: str
    """Row of `memory.stat` with the file cache that the kernel frees when memory is short."""
    kills: str
    """File with a row `oom_kill`, the number of processes of the group that the kernel has killed."""


VERSION_1 = GroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)
VERSION_2 = GroupFiles("memory.max", "memory.current", "inactive_file", "memory.events")


@dataclass(frozen=True)
class MemoryGroup:
    """Control group of this process, and the folder of the topmost group that it can see."""

    folder: Path
    top: Path
    files: GroupFiles


def iterate_group_free_bytes(root: Path = Path("/")) -> Iterator[int]:
    """Yield free bytes (limit - usage + inactive file cache) of each group around this process with a limit.

    That is its own group and all above it. A limit of version 1 may be huge: it stands for none.
    """
    for group in find_memory_groups(root):
        folder = group.folder
        while folder == group.top or folder.is_relative_to(group.top):
            limit = _read_number(folder / group.files.limit)
            usage = _read_number(folder / group.files.usage)
            if limit is not None and usage is not None:
                cached = _read_table(folder / "memory.stat").get(group.files.reclaimable, 0)
                yield max(0, limit - usage + cached)
            if folder == group.top:
                break
            folder = folder.parent


def find_memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """Return this process's memory control groups, one for each version that is mounted; [] without any."""
    own_paths = _read_own_paths(root / "proc/self/cgroup")
    groups = []
    for files, mount_root, mount_point in _iterate_mounts(root / "proc/self/mountinfo"):
        if files in own_paths:
            top = root / mount_point.lstrip("/")
            groups.append(MemoryGroup(_locate_group(top, mount_root, own_paths[files]), top, files))
    return groups


def describe_kill_counts(root: Path = Path("/")) -> dict[str, Any]:
    """Return the kernel's counts of out-of-memory kills: in this process's group, and in all."""
    groups = {
        str(group.folder / group.files.kills): kills
        for group in find_memory_groups(root)
        if (kills := _read_table(group.folder / group.files.kills).get("oom_kill")) is not None
    }
    return {
        "machine": identify_machine(),
        "group_kills": groups,
        "system_kills": _read_table(root / "proc/vmstat").get("oom_kill"),
    }


def has_killed_since(counts: Mapping[str, Any], root: Path = Path("/")) -> bool | None:
    """Return whether the kernel has killed a process for lack of memory since `describe_kill_counts`.

    That is in the group of the process that read the counts, or anywhere if that group is gone. None where
    nothing is known: on another machine, or without counts.
    """
    if counts.get("machine") != identify_machine():
        return None
    stored_kills: Mapping[str, int] = counts.get("group_kills") or {}
    present_kills = {path: _read_table(Path(path)).get("oom_kill") for path in stored_kills}
    if stored_kills and None not in present_kills.values():
        return any((present_kills[path] or 0) > kills for path, kills in stored_kills.items())
    stored_count, present_count = (
        counts.get("system_kills"),
        _read_table(root / "proc/vmstat").get("oom_kill"),
    )
    return None if stored_count is None or present_count is None else present_count > stored_count


def _read_own_paths(path: Path) -> dict[GroupFiles, str]:
    """Return version -> path of this process's memory group from `/proc/self/cgroup`; {} without the file."""
    own_paths = {}
    for line in _read_lines(path):
        number, controllers, group_path = line.split(":", 2)
        if number == "0" and not controllers:
            own_paths[VERSION_2] = group_path
        elif "memory" in controllers.split(","):
            own_paths[VERSION_1] = group_path
    return own_paths


def _iterate_mounts(path: Path) -> Iterator[tuple[GroupFiles, str, str]]:
    """Yield (version, root of the mount, mount point) of each memory group file system."""
    for line in _read_lines(path):
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        _, _, _, mount_root, mount_point = mount.split(" ")[:5]
        if kind == "cgroup2":
            yield VERSION_2, mount_root, mount_point
        elif kind == "cgroup" and "memory" in options.split(","):
            yield VERSION_1, mount_root, mount_point


def _locate_group(top: Path, mount_root: str, group_path: str) -> Path:
    """Return the folder of a group below its mount point; the mount point where it is not to be seen.

    In a container, the mount may begin at the container's own group.
    """
    path = PurePosixPath(group_path)
    relative_path = path.relative_to(mount_root) if path.is_relative_to(mount_root) else path.relative_to("/")
    folder = top / relative_path
    return folder if ".." not in relative_path.parts and folder.is_dir() else top


def _read_lines(path: Path) -> list[str]:
    """Return the lines of a file, [] where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_number(path: Path) -> int | None:
    """Return the number in a file; None for `max` and where there is no such file."""
    text = "".join(_read_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _read_table(path: Path) -> dict[str, int]:
    """Return name -> number of a file with one pair in each line; {} where it cannot be read."""
    pairs = (line.split() for line in _read_lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
