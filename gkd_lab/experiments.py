"""From a name to a grid: find the experiment file, resolve data and models to contents, expand. No torch."""

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gkd_lab
from gkd_lab.records.files import read_json, write_json
from gkd_lab.spec import Experiment, GridOfCells, Revisions, SpecError, expand, read_experiment
from gkd_lab.spec.cell import DataSpec
from gkd_lab.spec.errors import nearest
from gkd_lab.spec.experiment import Scale, parse_experiment
from gkd_lab.spec.settings import DataSettings
from gkd_lab.tasks import TASKS, source_revision

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
        open_axes = [axis for axis, values in grid.axes.items() if len(values) > 1]
        if open_axes:
            raise SpecError(
                f"{len(grid.cells)} cells of {name!r} match: give one value for "
                + ", ".join(f"--{axis}" for axis in open_axes)
            )
        return grid
    if "task" not in fields:
        raise SpecError(f"no task: give --task; valid: {', '.join(TASKS)}")
    document: dict[str, Any] = {"description": "one cell"}
    for key, text in fields.items():
        _put(document, key, text)
    return _expanded("cell", parse_experiment(document, "cell"), scale, Path(outputs))


def _put(document: dict[str, Any], key: str, text: str) -> None:
    import yaml

    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
    document[last] = yaml.safe_load(text)


def _expanded(
    name: str, experiment: Experiment, scale: Scale | None, outputs: Path
) -> GridOfCells:
    known = outputs / "revisions.json"
    revisions = Revisions(
        data=cache(lambda task, settings: _data(task, settings, known)),
        model=cache(lambda place: _model(place, known)),
    )
    return expand(name, experiment, TASKS, revisions, scale)


def _data(task: str, settings: DataSettings, known: Path) -> DataSpec:
    """A source as content: made by a generator, the files of a folder, a commit of a hub data set."""
    source, about = settings.source or "made", TASKS[task]
    sizes = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    keep = known.parent / ".cache"
    try:
        if source in about.generators:
            seed = (settings.seed or 0) if about.generators[source].endless else 0
            revision = source_revision(about, "made", name=source, cache=keep)
            return DataSpec(kind="made", name=source, revision=revision, seed=seed, **sizes)
        folder = Path(source).expanduser()
        if folder.is_dir():
            revision = source_revision(
                about, "folder", path=folder, config=settings.config, cache=keep
            )
            path = str(folder.resolve())
            return DataSpec(
                kind="folder", path=path, config=settings.config, revision=revision, **sizes
            )
    except ValueError as error:
        raise SpecError(str(error)) from error
    if not _HUB_NAME.fullmatch(source) or source.startswith("."):
        raise SpecError(_no_source(source, task))
    commit = _commit("datasets", source, known)
    return DataSpec(
        kind="hub", name=source, config=settings.config, revision=commit, **sizes
    )


def _no_source(source: str, task: str) -> str:
    place = Path(source).expanduser()
    parent = place.parent
    beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    choices = [*TASKS[task].generators, *beside]
    return (
        f"data.source: no folder {source!r}, and no generator or hub name (owner/name) either; "
        + nearest(source, choices[:20])
    )


def _model(place: str, known: Path) -> tuple[str | None, str | None, str | None]:
    """(hub name, folder, revision): a checkpoint folder is known by its content."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        return None, str(folder.resolve()), f"sha256:{_digest(folder)}"
    if not _HUB_NAME.fullmatch(place) or place.startswith("."):
        raise SpecError(f"model: no checkpoint folder {place!r}, and not a hub name (owner/name)")
    return place, None, _commit("models", place, known)


def _digest(folder: Path) -> str:
    import hashlib

    total = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}:{content}\n".encode())
    return total.hexdigest()


def _commit(kind: str, name: str, known: Path) -> str:
    """The commit of a hub name, resolved once and kept in `revisions.json`."""
    table = read_json(known) or {}
    kept = table.get(kind, {}).get(name)
    if isinstance(kept, str):
        return kept
    line = json.dumps({kind: {name: "COMMIT"}})
    way_out = f"add it to {known}: {line}"
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


__all__ = ["find", "folders", "load", "load_one", "names"]
