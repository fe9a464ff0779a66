"""What a result came from besides its specification: code, packages, machine, command. No secrets."""

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
from gkd_lab.store.file_hashes import read_file_hashes
from gkd_lab.store.record import Store

PACKAGES = (
    *("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate", "numpy", "safetensors"),
    *("huggingface-hub", "peft", "rouge-score", "sacrebleu", "lm-eval", "gguf", "num2words", "babel"),
)


def collect_provenance(**extra_facts: Any) -> dict[str, Any]:
    """Facts of this process, now; `more` is added."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "gkd_lab": gkd_lab.__version__,
        **_describe_code(),
        "python": platform.python_version(),
        "packages": _collect_package_versions(),
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), **_describe_hardware()},
        "command": [Path(sys.argv[0]).name, *redact_secrets(sys.argv[1:])],
        **extra_facts,
    }


def describe_sources(training: Training, scale: str, store: Store) -> dict[str, Any]:
    """Data, models and seeds of a training: revisions, and the weights of both models as they were then.

    Of a teacher whose scores were kept also their files.
    """
    scores = training.scores_spec
    kept = None if scores is None else read_file_hashes(store.get_teacher_scores(scale, scores).folder)
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
        **({} if scores is None else {"scores": {"fingerprint": scores.full_fingerprint, "files": kept}}),
    }


def _describe_data(data: DataSpec) -> dict[str, Any]:
    return data.model_dump(include={"kind", "name", "config", "revision"}, exclude_none=True)


def _describe_model(model: SftModel) -> dict[str, Any]:
    """Of a model that was loaded also where from; a local one is known by its content."""
    seeds = {"init": model.model.init_seed, **({} if model.sft is None else {"sft": model.sft.seed})}
    loaded = model.model.model_dump(include={"pretrained", "revision"}, exclude_none=True)
    return {"fingerprint": model.full_fingerprint, **loaded, "seeds": seeds}


def _list_weight_hashes(store: Store, scale: str, role: str, model: SftModel) -> dict[str, str]:
    """SHA-256 of each file of weights of an artifact's checkpoint."""
    stored = read_file_hashes(store.get_artifact(scale, role, model).folder) or {}
    return {name: one for name, one in stored.items() if name.endswith(".safetensors")}


_SECRET_NAME = re.compile(r"(?i)token|secret|passw|credential|api_?key|auth(?!or)|(^|[-_.])key$")
_SECRET_VALUE = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)\w[\w-]{9,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_REDACTED = "[hidden]"


def redact_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command; what follows a secret's name, or looks like a secret, is hidden."""
    known = [
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= 8 and not value.isdigit()
    ]
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if before.startswith("-") and "=" not in before and _is_secret_name(before):
            word = _REDACTED
        elif equals and value and _is_secret_name(name):
            word = f"{name}={_REDACTED}"
        for secret in known:
            word = word.replace(secret, _REDACTED)
        shown.append(_SECRET_VALUE.sub(_REDACTED, word))
    return shown


def _is_secret_name(option: str) -> bool:
    # Names of ours that hold one of these words: `max_output_tokens`, `tokenizer.kind`.
    return _SECRET_NAME.search(re.sub(r"tokens|tokenizer", "", option)) is not None


def _describe_hardware() -> dict[str, Any]:
    """Processor, memory, and the GPUs that torch sees where it is loaded: it is not imported for this."""
    found: dict[str, Any] = {}
    if hasattr(os, "sched_getaffinity"):
        found["usable_cpus"] = len(os.sched_getaffinity(0))
    if sys.platform == "linux":
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found |= {"processor": name[1]} if name else {}
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpus"] = [torch.cuda.get_device_name(n) for n in range(count)]
        found["cuda"] = torch.version.cuda
    return found


@cache
def _collect_package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _describe_code() -> dict[str, Any]:
    """Commit of the source checkout, and what was changed since; nothing for an installed package."""
    root = Path(gkd_lab.__file__).parent.parent
    return describe_checkout(root) if (root / ".git").exists() else {}


def describe_checkout(root: Path) -> dict[str, Any]:
    """`commit`, whether it was `changed`, and then `diff`: SHA-256 of the changes, new modules included.

    The changes themselves are not kept: they may hold what must stay secret.
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
