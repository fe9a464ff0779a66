"""What a result came from besides its specification: code, packages, machine, command. No secrets."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import gkd_lab

PACKAGES = ("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate", "numpy")


def provenance(**more: Any) -> dict[str, Any]:
    """Facts of this process, now; `more` is added."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gkd_lab": gkd_lab.__version__,
        **_code(),
        "python": platform.python_version(),
        "packages": _versions(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count()},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **more,
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _code() -> dict[str, Any]:
    """Commit of the source checkout and whether it was changed; nothing for an installed package."""
    root = Path(gkd_lab.__file__).parent.parent
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "-uno"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
