"""An experiment file: one question, its settings, and the grid of values that are crossed to answer it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model

from gkd_lab.spec.errors import SpecError, explain
from gkd_lab.spec.settings import EvaluationSettings, Section, Settings

Scale = Literal["nano", "smol", "paper"]
SCALES: tuple[Scale, ...] = ("nano", "smol", "paper")


def _axes() -> dict[str, Any]:
    """Every field of `Settings`, and every field of its sections under a dotted name."""
    axes: dict[str, Any] = {"task": (tuple[str, ...] | None, Field(None, min_length=1))}
    for name, field in Settings.model_fields.items():
        axes[name] = (tuple[field.annotation, ...] | None, Field(None, min_length=1))
    for section in ("data", "tokenizer"):
        model = Settings.model_fields[section].annotation.__args__[0]  # type: ignore[union-attr]
        for name, field in model.model_fields.items():
            axes[f"{section}__{name}"] = (
                tuple[field.annotation, ...] | None,
                Field(None, min_length=1, alias=f"{section}.{name}"),
            )
    return axes


Grid = create_model("Grid", __config__=ConfigDict(frozen=True, extra="forbid"), **_axes())
Grid.__doc__ = "Axes: for each field the list of its values; every combination is a cell."
AXES = tuple(field.alias or name for name, field in Grid.model_fields.items())


class Paper(Section):
    """What of the paper an experiment answers."""

    figures: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()


class Experiment(Settings):
    """One experiment file, validated; the grid keeps the file's order of axes."""

    description: str = Field(description="the question, the hypothesis, the cost")
    paper: Paper = Paper()
    scale: Scale = "nano"
    task: str | None = Field(None, description="one task; several go into `grid.task`")
    grid: Grid = Grid()  # type: ignore[valid-type]
    evaluations: tuple[EvaluationSettings, ...] | None = Field(None, min_length=1)
    per_task: dict[str, Settings] = Field({}, description="settings that hold for one task only")

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Axis name -> values, in the file's order; the first axis varies slowest."""
        values: Mapping[str, Any] = self.grid.model_dump(  # type: ignore[attr-defined]
            by_alias=True, exclude_unset=True
        )
        return dict(values)

    def settings(self) -> dict[str, Any]:
        """The settings that the file states, as plain nested dictionaries."""
        return self.model_dump(include=set(Settings.model_fields), exclude_unset=True)


def read_experiment(path: Path, overrides: Mapping[str, str] | None = None) -> Experiment:
    """The experiment in the YAML file `path`, `--set` overrides applied. Raises SpecError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: {error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path}: expected `field: value` lines, got {type(document).__name__}")
    _check_grid(document.get("grid", {}), str(path))
    for key, text in (overrides or {}).items():
        _override(document, key, text)
    return parse_experiment(document, str(path))


def parse_experiment(document: Mapping[str, Any], where: str) -> Experiment:
    """`document` as an Experiment; `where` names it in errors. Raises SpecError."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        in_grid = error.errors()[0]["loc"][0] == "grid"
        raise explain(error, where, AXES if in_grid else Experiment.model_fields) from error


def _check_grid(grid: Any, where: str) -> None:
    """Errors that teach, before pydantic's: an axis is a list of values."""
    if not isinstance(grid, dict):
        raise SpecError(f"{where}: grid: expected `axis: [values]` lines, got {grid!r}")
    for axis, values in grid.items():
        if not isinstance(values, list):
            raise SpecError(
                f"{where}: grid.{axis}: must be a list of values, got {values!r}; "
                f"did you mean [{values}]?"
            )
        if not values:
            raise SpecError(f"{where}: grid.{axis}: the list is empty, so there is no cell to run")


def _override(document: dict[str, Any], key: str, text: str) -> None:
    """`--set key=v1,v2`: several values, or an axis of the file, make an axis; else a base field."""
    values = [yaml.safe_load(part) for part in text.split(",") if part.strip()]
    if not values:
        raise SpecError(f"--set {key}={text}: no value given")
    grid = document.setdefault("grid", {})
    if key in grid or len(values) > 1:
        grid[key] = values
        return
    place = document
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(place.setdefault(section, {}), dict):
            raise SpecError(f"--set {key}: {section} is a value, not a section")
        place = place[section]
    place[last] = values[0]


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    schema = Experiment.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


__all__ = [
    "AXES",
    "SCALES",
    "Experiment",
    "Paper",
    "Scale",
    "json_schema",
    "parse_experiment",
    "read_experiment",
]
