"""Load the grid of an experiment by name: find its file, expand it, collect the faults of data and models."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import gkd_lab
from gkd_lab.config import ConfigError, ExperimentFile, Grid, RevisionLookup, expand_grid, read_experiment
from gkd_lab.config.artifact_specs import DataSpec
from gkd_lab.config.cell import Cell, Evaluation, Split
from gkd_lab.config.errors import (
    MissingRevision,
    build_unknown_name_error,
    join_faults,
    suggest_choices,
    suggest_sibling,
)
from gkd_lab.config.experiment import SCALES, Scale, apply_overrides, parse_experiment
from gkd_lab.config.explain_cell import ResolvedValue, explain_cell
from gkd_lab.config.hub_cache import find_cached_snapshot
from gkd_lab.config.lora import check_peft_is_installed
from gkd_lab.config.loss_terms import ResolvedReward
from gkd_lab.config.model_checks import list_model_faults, list_unchecked_models
from gkd_lab.config.resolve_cell import CellResolver
from gkd_lab.config.reward_names import BUILT_IN_REWARDS, import_reward
from gkd_lab.config.settings import DataSettings
from gkd_lab.metrics import METRICS
from gkd_lab.revisions import list_fault_sentences, resolve_data_spec, resolve_model_revision
from gkd_lab.store.output_folders import check_outputs_folder
from gkd_lab.tasks import (
    TASKS,
    check_first_rows,
    count_few_train_rows,
    is_data_folder,
    list_missing_splits,
    load_rows,
)

_PACKAGE_FOLDER = Path(gkd_lab.__file__).parent
_UNKNOWN_REVISION = "unknown"


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
            nearest = suggest_sibling(name, lambda path: path.suffix in (".yaml", ".yml"))
            if nearest is not None:
                raise ConfigError(f"no experiment file {name!r}; did you mean {nearest!r}?")
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
    return _expand_experiment(
        path.stem, experiment, scale, Path(outputs), allow_missing_revisions=allow_missing_revisions
    )


@dataclass(frozen=True)
class Experiment:
    """An experiment's cells and the folder of their records: what `gkd_lab.load` returns."""

    grid: Grid
    """The resolved cells."""
    outputs: Path
    """Folder of the records, which may not exist yet."""

    @property
    def name(self) -> str:
        """Name of the experiment: its file without `.yaml`."""
        return self.grid.name

    @property
    def scale(self) -> str:
        """Scale of its models and data: nano, smol or paper."""
        return self.grid.scale

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells in order; each has `lmbda`, `beta`, `divergence`, `seed`, `task`, `fingerprint`."""
        return self.grid.cells

    def __repr__(self) -> str:
        """Return one line: name, scale, number of cells and folder."""
        count = f"{len(self.cells)} cell{'s' * (len(self.cells) > 1)}"
        return f"<experiment {self.name}: {count} at {self.scale} scale, records in {str(self.outputs)!r}>"


def load_experiment(
    name_or_path: str | Path,
    scale: Scale | None = None,
    outputs: str | Path = "outputs",
    **overrides: Any,
) -> Experiment:
    """Load an experiment and resolve its cells, as `gkd-lab plan` does; run nothing, load no torch.

    Args:
        name_or_path: Name of an experiment (`gkd-lab list`), or a YAML file.
        scale: `nano`, `smol` or `paper`; None: that of the file.
        outputs: Folder of the records; created by the first run.
        overrides: Fields and axes to replace, as `--set` does: `steps=100` sets a field, `beta=[0, 1]` the
            values of an axis. Fields of sections have dots: `**{"data.source": "folder"}`. A list of lists
            crosses values that are lists themselves, such as `objectives`.

    Returns:
        The cells (`.cells`, `.grid`) and the folder, for `gkd_lab.run` and `gkd_lab.table`.

    Raises:
        ConfigError: (a ValueError) for an unknown name, scale or field, a value out of range, and all faults
            of data at once, each with the nearest valid choice.

    Examples:
        >>> experiment = gkd_lab.load("quickstart", beta=[0, 1], steps=100)
    """
    if scale is not None and scale not in SCALES:
        raise build_unknown_name_error("scale", scale, SCALES)
    folder = Path(outputs)
    check_outputs_folder(folder)
    texts = {key: format_override(key, value) for key, value in overrides.items()}
    return Experiment(load(str(name_or_path), scale=scale, overrides=texts, outputs=folder), folder)


def format_override(key: str, value: Any) -> str:
    """Return a Python value as the text of `--set KEY=TEXT`: JSON, of a list of lists its items by commas.

    NumPy's numbers and arrays, ranges and paths may stand for plain ones. Raises ConfigError for others.
    """
    try:
        plain = json.loads(json.dumps(value, default=_convert_to_plain))
    except TypeError as error:
        raise ConfigError(
            f"{key}: {value!r} is not valid: expected text, a number, true, false, a list or a dict"
        ) from error
    has_lists = isinstance(plain, list) and bool(plain) and all(isinstance(item, list) for item in plain)
    items = plain if has_lists else [plain]
    return ",".join(json.dumps(item, ensure_ascii=False) for item in items)


def _convert_to_plain(value: Any) -> Any:
    """Return a number, list or text for a value that JSON does not know. Raises TypeError."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, Set | bytes):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no plain form")


def check_before_run(grid: Grid) -> None:
    """Raise ConfigError for models, rows, packages or rewards that would make a grid's cells fail."""
    check_models_and_splits(grid)
    _check_scored_rows(grid)
    check_peft(grid)
    check_generators_and_rewards(grid)


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
    if len(grid.cells) > 1:
        open_axes = [f"--{axis}" for axis, values in grid.axes.items() if len(values) > 1]
        count = math.prod(len(values) for values in grid.axes.values())
        raise ConfigError(f"{count} cells of {grid.name!r} match: give one value for {', '.join(open_axes)}")
    return grid


def outline_experiment(
    name: str, *, scale: Scale | None = None, overrides: Mapping[str, str] | None = None
) -> tuple[ExperimentFile, int]:
    """Return (experiment, number of its cells) without reading data or models. Raises ConfigError."""
    path = find_experiment_file(name)
    experiment = read_experiment(path, overrides)
    return experiment, len(expand_grid(path.stem, experiment, TASKS, _NOT_READ, scale).cells)


_NOT_READ = RevisionLookup(
    resolve_data=lambda task, settings: DataSpec(
        kind="made", name=settings.source, revision="not read", train=settings.train
    ),
    resolve_model=lambda model_name: (model_name, None, "not read"),
)
"""Revisions that read neither data nor models; cells with them have no fingerprint to rely on."""


def explain_grid_cell(grid: Grid, cell: Cell) -> list[ResolvedValue]:
    """Return the values of a grid's cell, each with where it comes from."""
    return explain_cell(CellResolver(grid.experiment, TASKS, _NOT_READ, grid.scale), cell)


def check_models_and_splits(grid: Grid) -> None:
    """Raise ConfigError with all faults of the grid's local models and of the splits that it needs.

    Of models: files, families, tokenizers and lengths.
    """
    faults = [*list_model_faults(grid.cells), *_list_split_faults(grid), *_list_row_faults(grid)]
    faults += _list_hub_column_faults(grid)
    if faults:
        raise join_faults(faults)


def _list_split_faults(grid: Grid) -> list[str]:
    """Return a sentence for each split that the grid trains on or scores and its data folder lacks."""
    splits: dict[tuple[str, str | None], dict[Split, None]] = {}
    cached_folders = _find_cached_folders(grid)
    for cell in grid.cells:
        data = cell.training.data
        path = data.path if data.kind == "folder" else cached_folders.get(data)
        if path is not None:
            needed = splits.setdefault((path, data.config), {"train": None})
            decoded = (evaluation for evaluation in cell.evaluations if isinstance(evaluation, Evaluation))
            needed.update({evaluation.split: None for evaluation in decoded})
            if cell.training.selection is not None:
                needed["validation"] = None
    return [
        fault
        for (path, config), needed in splits.items()
        for fault in list_missing_splits(path, config, needed)
    ]


def _check_scored_rows(grid: Grid) -> None:
    """Raise ConfigError for rows in folders that an evaluation scores, after the training, and cannot read.

    Faults of the rows to train on show before anything is trained.
    """
    scored = dict.fromkeys(
        (cell.task, cell.training.data, evaluation.split)
        for cell in grid.cells
        for evaluation in cell.evaluations
        if cell.training.data.kind == "folder" and isinstance(evaluation, Evaluation)
    )
    faults: dict[str, None] = {}
    for task, data, split in scored:
        try:
            load_rows(
                TASKS[task],
                data.kind,
                path=data.path,
                config=data.config,
                split=split,
                count=getattr(data, split),
                calculator_marks=data.calculator_marks,
                columns=data.columns,
            )
        except ValueError as error:
            faults[str(error)] = None
    if faults:
        raise join_faults(list(faults))


def list_unchecked_sources(grid: Grid) -> list[str]:
    """Return a note that names the hub's models and data of which this machine has nothing; or no note."""
    models = list_unchecked_models(grid.cells)
    data = {data.name or "" for data, path in _find_cached_folders(grid).items() if path is None}
    parts = [f"models {', '.join(models)}"] if models else []
    parts += [f"data {', '.join(sorted(data))}"] if data else []
    return [f"not checked, as the local hub cache has nothing of it: {'; '.join(parts)}"] if parts else []


def _find_cached_folders(grid: Grid) -> dict[DataSpec, str | None]:
    """Return data of the hub -> its cached folder; None if that has no files that a data folder may have."""
    folders: dict[DataSpec, str | None] = {}
    for data in dict.fromkeys(cell.training.data for cell in grid.cells if cell.training.data.kind == "hub"):
        snapshot = find_cached_snapshot("dataset", data.name or "", data.revision)
        is_readable = snapshot is not None and is_data_folder(snapshot, data.config)
        folders[data] = str(snapshot) if is_readable else None
    return folders


def _list_hub_column_faults(grid: Grid) -> list[str]:
    """Return a sentence for each cached data set of the hub whose first rows lack a column of the task."""
    faults: dict[str, None] = {}
    cached_folders = _find_cached_folders(grid)
    for task, data in dict.fromkeys((cell.task, cell.training.data) for cell in grid.cells):
        path = cached_folders.get(data)
        if path is not None:
            marks = bool(data.calculator_marks)
            try:
                check_first_rows(
                    TASKS[task], path=path, config=data.config, calculator_marks=marks, columns=data.columns
                )
            except ValueError as error:
                if "no column" in str(error) or "no field" in str(error):  # empty fields are left out
                    faults[str(error)] = None
    return list(faults)


def _list_row_faults(grid: Grid) -> list[str]:
    """Return a sentence for each data folder with fewer rows to train on than a batch has."""
    batches: dict[tuple[str, str | None], int] = {}
    for cell in grid.cells:
        data = cell.training.data
        if data.kind == "folder":
            key = (data.path or "", data.config)
            batches[key] = max(batches.get(key, 0), cell.training.batch_size)
    return [
        f"batch_size: {batch} rows, of which {path} has {rows} to train on; give at most {rows}, or more rows"
        for (path, config), batch in batches.items()
        if (rows := count_few_train_rows(path, config, batch)) is not None
    ]


def check_peft(grid: Grid) -> None:
    """Raise ConfigError if a student of the grid has an adapter, and the package peft is not installed."""
    if any(cell.training.lora is not None for cell in grid.cells):
        check_peft_is_installed()


def check_generators_and_rewards(grid: Grid) -> None:
    """Import the grid's own rewards; ConfigError if one fails, or a row generator's package is missing.

    This runs the modules of the rewards that the experiment names.
    """
    generators = {
        (cell.task, cell.training.data.name) for cell in grid.cells if cell.training.data.kind == "made"
    }
    for task, generator in sorted(generators, key=str):
        try:
            TASKS[task].generators[generator or "made"].check_dependencies()
        except ValueError as error:
            raise ConfigError(str(error)) from error
    terms = (term for cell in grid.cells for term in cell.training.objectives)
    rewards = {term.name for term in terms if isinstance(term, ResolvedReward)}
    for name in sorted(rewards - {*BUILT_IN_REWARDS}):
        import_reward(name)


def _expand_experiment(
    name: str,
    experiment: ExperimentFile,
    scale: Scale | None,
    outputs: Path,
    *,
    allow_missing_revisions: bool = False,
) -> Grid:
    """Return an experiment's grid with content revisions of data and models. ConfigError: unknown metric.

    Faults of data and models are collected and raised as one. With `allow_missing_revisions`, unknown commits
    alone are noted in the grid instead.
    """
    commits_file = outputs / "revisions.json"
    faults: dict[str, ConfigError] = {}

    @cache
    def resolve_data(task: str, settings: DataSettings) -> DataSpec:
        """Return the DataSpec of settings; after a fault, which is noted, a placeholder."""
        try:
            return resolve_data_spec(task, settings, commits_file)
        except ConfigError as error:
            faults[str(error)] = error
            return DataSpec(
                kind="hub", name=settings.source, revision=_UNKNOWN_REVISION, train=settings.train
            )

    @cache
    def resolve_model(model_name: str) -> tuple[str | None, str | None, str | None]:
        """Return name, path and revision of a model; after a fault, which is noted, placeholders."""
        try:
            return resolve_model_revision(model_name, commits_file)
        except ConfigError as error:
            faults[str(error)] = error
            return model_name, None, _UNKNOWN_REVISION

    try:
        grid = expand_grid(name, experiment, TASKS, RevisionLookup(resolve_data, resolve_model), scale)
    except ConfigError as error:
        faults[str(error)] = error
        raise join_faults(list_fault_sentences(faults.values(), commits_file)) from error
    if not all(isinstance(error, MissingRevision) for error in faults.values()):
        sentences = list_fault_sentences(faults.values(), commits_file)
        raise join_faults([*sentences, *list_model_faults(grid.cells)])
    if faults:
        (missing,) = list_fault_sentences(faults.values(), commits_file)
        grid = replace(grid, missing_revisions=missing)
    evaluations = (evaluation for cell in grid.cells for evaluation in cell.evaluations)
    decoded = (evaluation for evaluation in evaluations if isinstance(evaluation, Evaluation))
    for metric in {metric for evaluation in decoded for metric in evaluation.metrics}:
        if metric not in METRICS:
            raise build_unknown_name_error("metric", metric, METRICS)
    if grid.missing_revisions and not allow_missing_revisions:
        raise ConfigError(grid.missing_revisions)
    return grid
