"""Provenance of a result beside its specification: code, packages, machine and command, without secrets."""

import hashlib
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
from gkd_lab.config.artifact_specs import DataSpec, SftModel
from gkd_lab.config.cell import Training
from gkd_lab.store.code_hash import compute_code_hash
from gkd_lab.store.file_hashes import read_file_hashes
from gkd_lab.store.record import Store

PACKAGES = (
    *("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate", "numpy", "safetensors"),
    *("huggingface-hub", "peft", "rouge-score", "sacrebleu", "lm-eval", "gguf", "num2words", "babel"),
)


def collect_provenance(**extra_facts: Any) -> dict[str, Any]:
    """Return time, code, packages, machine and redacted command of this process, plus `extra_facts`."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gkd_lab": gkd_lab.__version__,
        "code": compute_code_hash(),
        **_describe_code(),
        "python": platform.python_version(),
        "packages": _collect_package_versions(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), **_describe_hardware()},
        "command": [Path(sys.argv[0]).name, *redact_secrets(sys.argv[1:])],
        **extra_facts,
    }


def describe_sources(training: Training, scale: str, store: Store) -> dict[str, Any]:
    """Return a training's data and model revisions, seeds, and stored SHA-256 of both models' weights.

    With cached teacher scores, also the SHA-256 of their files.
    """
    scores = training.scores_spec
    score_hashes = (
        None if scores is None else read_file_hashes(store.get_teacher_scores(scale, scores).folder)
    )
    return {
        "data": _describe_data(training.data),
        "teacher": {
            **_describe_model(training.teacher),
            "files": _list_weight_hashes(store, scale, "teacher", training.teacher),
        },
        "start": {
            **_describe_model(training.start),
            "files": _list_weight_hashes(store, scale, "start", training.start),
        },
        "seeds": {"training": training.seed, "data": training.data.seed},
        **(
            {}
            if scores is None
            else {"scores": {"fingerprint": scores.full_fingerprint, "files": score_hashes}}
        ),
    }


def _describe_data(data: DataSpec) -> dict[str, Any]:
    """Return kind, name, configuration and revision of a data set as a dictionary, None left out."""
    return data.model_dump(include={"kind", "name", "config", "revision"}, exclude_none=True)


def _describe_model(model: SftModel) -> dict[str, Any]:
    """Return fingerprint and seeds of a model as a dictionary; of a loaded one also name and revision."""
    seeds = {"init": model.model.init_seed, **({} if model.sft is None else {"sft": model.sft.seed})}
    loaded = model.model.model_dump(include={"pretrained", "revision"}, exclude_none=True)
    return {"fingerprint": model.full_fingerprint, **loaded, "seeds": seeds}


def _list_weight_hashes(store: Store, scale: str, role: str, model: SftModel) -> dict[str, str]:
    """Return file -> stored SHA-256 of the safetensors files in an artifact's record; {} if it has none."""
    hashes = read_file_hashes(store.get_artifact(scale, role, model).folder) or {}
    return {name: sha256 for name, sha256 in hashes.items() if name.endswith(".safetensors")}


_SECRET_NAME = re.compile(r"(?i)token|secret|passw|credential|api_?key|auth(?!or)|(^|[-_.])key$")
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)\w[\w-]{9,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_REDACTED = "[hidden]"


def redact_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with all secrets replaced by `[hidden]`.

    A secret follows an option with a secret's name, has the form of a key, or is in an environment variable.
    """
    environment_secrets = [
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= 8 and not value.isdigit()
    ]
    redacted_words: list[str] = []
    for previous_word, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if previous_word.startswith("-") and "=" not in previous_word and _is_secret_name(previous_word):
            word = _REDACTED
        elif equals and value and _is_secret_name(name):
            word = f"{name}={_REDACTED}"
        for secret in environment_secrets:
            word = word.replace(secret, _REDACTED)
        redacted_words.append(_SECRET_VALUE.sub(_REDACTED, word))
    return redacted_words


def _is_secret_name(option: str) -> bool:
    """Return whether an option's name contains that of a secret, such as token, password or api_key."""
    # Options of gkd-lab contain such words: `max_output_tokens`, `tokenizer.kind`.
    return _SECRET_NAME.search(re.sub(r"tokens|tokenizer", "", option)) is not None


def _describe_hardware() -> dict[str, Any]:
    """Return CPUs, memory, processor and, only if torch is already imported, GPUs as a dictionary."""
    hardware: dict[str, Any] = {}
    if hasattr(os, "sched_getaffinity"):
        hardware["usable_cpus"] = len(os.sched_getaffinity(0))
    if sys.platform == "linux":
        hardware["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        hardware |= {"processor": name[1]} if name else {}
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        hardware["gpus"] = [torch.cuda.get_device_name(n) for n in range(count)]
        hardware["cuda"] = torch.version.cuda
    return hardware


@cache
def _collect_package_versions() -> dict[str, str]:
    """Return name -> version of those packages in `PACKAGES` that are installed; cached."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def _describe_code() -> dict[str, Any]:
    """Return commit and changes of the source checkout, cached; {} for an installed package."""
    root = Path(gkd_lab.__file__).parent.parent
    return describe_checkout(root) if (root / ".git").exists() else {}


def describe_checkout(root: Path) -> dict[str, Any]:
    """Return `commit`, whether files were `changed`, and `diff`: SHA-256 of changes and new modules.

    The changes themselves are not stored, because they may contain secrets.
    """
    commit = _run_git(root, "rev-parse", "HEAD")
    changes = _run_git(root, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color")
    added = _run_git(root, "ls-files", "-z", "--others", "--exclude-standard", "gkd_lab")
    if commit is None or changes is None or added is None:
        return {"commit": commit}
    new = sorted(name for name in added.split("\0") if (root / name).is_file())
    if not changes and not new:
        return {"commit": commit, "changed": False}
    total = hashlib.sha256(changes.encode(errors="surrogateescape"))
    for name in new:
        total.update(f"\0{name}\0".encode() + (root / name).read_bytes())
    return {"commit": commit, "changed": True, "diff": total.hexdigest()}


def _run_git(root: Path, *arguments: str) -> str | None:
    """Return the stripped output of a git command in `root`; None if it fails or takes over 10 seconds."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
