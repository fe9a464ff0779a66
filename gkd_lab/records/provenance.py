"""What a result came from besides its specification: code, packages, machine, command. No secrets."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
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
        "command": [Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])],
        **more,
    }


_SECRET_NAME = re.compile(r"(?i)token|secret|passw|credential|api_?key|auth(?!or)|(^|[-_.])key$")
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)\w[\w-]{9,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HIDDEN = "[hidden]"


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command; what follows a secret's name, or looks like a secret, is hidden."""
    known = [
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= 8 and not value.isdigit()
    ]
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before.startswith("-") and "=" not in before and _is_secret(before):
            word = _HIDDEN
        elif equals and value and _is_secret(name):
            word = f"{name}={_HIDDEN}"
        for secret in known:
            word = word.replace(secret, _HIDDEN)
        shown.append(_SECRET_VALUE.sub(_HIDDEN, word))
    return shown


def _is_secret(option: str) -> bool:
    # Names of ours that hold one of these words: `max_output_tokens`, `tokenizer.kind`.
    return _SECRET_NAME.search(re.sub(r"tokens|tokenizer", "", option)) is not None


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
