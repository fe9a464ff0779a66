"""An experiment file: one question, its settings, and the grid of values that are crossed to answer it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args

import yaml
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, create_model, model_validator

from gkd_lab.config.errors import ConfigError, explain_validation_error, report_yaml_errors
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.config.settings import AnyEvaluationSettings, Section, Settings, merge_settings

Scale = Literal["nano", "smol", "paper"]
SCALES: tuple[Scale, ...] = ("nano", "smol", "paper")


def _define_axes() -> dict[str, Any]:
    """Every field of `Settings`, and every field of its sections under a dotted name."""
    axes: dict[str, Any] = {"task": _define_axis(str, "tasks that are crossed with the other axes")}
    for name, field in Settings.model_fields.items():
        stated = tuple(part for part in get_args(field.annotation) if part is not type(None))
        axes[name] = _define_axis(Union[stated], field.description)  # noqa: UP007  # of a list of types
    for section in ("data", "tokenizer", "teacher_tokenizer"):
        model = get_args(Settings.model_fields[section].annotation)[0]
        for name, field in model.model_fields.items():
            place = f"{section}.{name}"
            axes[f"{section}__{name}"] = _define_axis(field.annotation, field.description, alias=place)
    return axes


def _define_axis(value: Any, description: str | None, **more: Any) -> tuple[Any, Any]:
    """Type and default of an axis; `None` is no value of one, but inside a section it may mean `all`."""
    return tuple[value, ...], Field(default=None, min_length=1, description=description, **more)


class _OrderedAxes(Section):
    """Remembers the order in which its fields were written; pydantic's own is that of their declaration."""

    _written: tuple[str, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _remember_order(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        axes = handler(data)
        if isinstance(data, Mapping):
            axes._written = tuple(data)
        return axes

    def list_ordered_values(self) -> dict[str, tuple[Any, ...]]:
        """Axis name -> values as plain data, in the order of the file."""
        dumped = self.model_dump(by_alias=True, exclude_unset=True)
        return {axis: dumped[axis] for axis in self._written}


GridAxes = create_model(
    "GridAxes",
    __base__=_OrderedAxes,
    __doc__="Axes: for each field the list of its values; every combination is a cell.",
    **_define_axes(),
)
AXIS_NAMES = tuple(field.alias or name for name, field in GridAxes.model_fields.items())
_SCALAR_AXES = set(AXIS_NAMES) - {"objectives"}


ClaimId = Literal[
    "C1", "C2", "C3", "C4", "C4b", "C5", "C6", "C6b", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14",
    "C15", "C16", "C17", "C18", "C19", "C20", "C21", "C22", "C23", "C24", "C25", "C26", "C27", "C28",
]  # fmt: skip
FigureName = Literal[
    "1", "2", "3", "4", "5", "6", "7", "8", "9", "A.10", "A.11", "A.12", "A.13", "A.14", "A.15", "A.16",
]  # fmt: skip


class Paper(Section):
    """What of the paper an experiment answers."""

    figures: tuple[FigureName, ...] = Field(default=(), description="as the ICLR 2024 text numbers them")
    claims: tuple[ClaimId, ...] = Field(default=(), description="of `gkd-lab claims`")


class TaskSettings(Settings):
    """What an experiment may say of all tasks, or of one."""

    evaluations: tuple[AnyEvaluationSettings, ...] | None = Field(
        default=None, min_length=1, description="ways of decoding and judging; default: the task's own"
    )


class Experiment(TaskSettings):
    """One experiment file, validated; the grid keeps the file's order of axes."""

    description: str = Field(description="the question, the hypothesis, the cost")
    paper: Paper = Field(default=Paper(), description="what of the paper this answers")
    scale: Scale = Field(default="nano", description="models and data; `--scale` chooses another one")
    task: str | None = Field(default=None, description="one task; several go into `grid.task`")
    grid: GridAxes = Field(  # type: ignore[valid-type]
        default=GridAxes(), description="axes that are crossed; the first one varies slowest"
    )
    per_task: dict[str, TaskSettings] = Field(default={}, description="what holds for one task only")

    def list_axes(self) -> dict[str, tuple[Any, ...]]:
        """Axis name -> values, in the file's order; the first axis varies slowest."""
        grid: _OrderedAxes = self.grid
        return {
            axis: tuple({canonical_json(v): v for v in found}.values())
            for axis, found in grid.list_ordered_values().items()
        }

    def merge_task_settings(self, task: str) -> dict[str, Any]:
        """The settings that the file states for a task, as plain nested dictionaries."""
        return merge_settings(*(_dump_stated_fields(layer) for layer in self._list_settings_layers(task)))

    def get_task_evaluations(self, task: str) -> tuple[AnyEvaluationSettings, ...] | None:
        """The evaluations that the file states for a task; None: the task's own."""
        found = [layer.evaluations for layer in self._list_settings_layers(task) if layer.evaluations]
        return found[-1] if found else None

    def _list_settings_layers(self, task: str) -> list[TaskSettings]:
        return [self, *([self.per_task[task]] if task in self.per_task else [])]


def _dump_stated_fields(layer: TaskSettings) -> dict[str, Any]:
    """A field that is null says nothing; inside a section null is a value (`train: null`, all rows)."""
    stated = layer.model_dump(include=set(Settings.model_fields), exclude_unset=True)
    return {name: value for name, value in stated.items() if value is not None}


def read_experiment(path: Path, overrides: Mapping[str, str] | None = None) -> Experiment:
    """The experiment in the YAML file `path`, `--set` overrides applied. Raises SpecError."""
    with report_yaml_errors(path):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected `field: value` lines, got {type(document).__name__}")
    _check_grid_lists(document, str(path))
    where = f"{path}, with the values set" if overrides else str(path)
    return parse_experiment(apply_overrides(document, overrides or {}), where)


def parse_experiment(document: Mapping[str, Any], origin: str) -> Experiment:
    """`document` as an Experiment; `where` names it in errors. Raises SpecError."""
    try:
        return Experiment.model_validate(document)
    except ValidationError as error:
        raise explain_validation_error(error, origin, Experiment) from error


def _check_grid_lists(document: dict[str, Any], origin: str) -> None:
    """Errors that teach, before pydantic's: an axis is a list of values."""
    grid = document["grid"] = {} if document.get("grid") is None else document["grid"]
    if not isinstance(grid, dict):
        raise ConfigError(f"{origin}: grid: expected `axis: [values]` lines, got {grid!r}")
    for axis, values in grid.items():
        if not isinstance(values, list):
            raise ConfigError(
                f"{origin}: grid.{axis}: must be a list of values, got {values!r}; did you mean [{values}]?"
            )
        if not values:
            raise ConfigError(f"{origin}: grid.{axis}: the list is empty, so there is no cell to run")


def apply_overrides(document: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """`document` with each `key=v1,v2` set, over what it says of single tasks too. Raises SpecError.

    Several values, or an axis of the file, make an axis; one value else sets a field.
    """
    for key, text in overrides.items():
        values = _parse_override(key, text)
        grid = document.setdefault("grid", {})
        if key in grid or len(values) > 1:
            grid[key] = values
            continue
        _set_field(document, key, values[0])
        for section in (document.get("per_task") or {}).values():
            _remove_field(section, key)
    return document


def _parse_override(key: str, text: str) -> list[Any]:
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "not a YAML value"
        raise ConfigError(f"{key}={text}: {reason}; expected a value, or values as V1,V2") from error
    if not values:
        raise ConfigError(f"{key}={text}: no value given; expected a value, or values as V1,V2")
    is_axis = len(values) == 1 and isinstance(values[0], list) and key in _SCALAR_AXES
    return list(values[0]) if is_axis and values[0] else list(values)


def _set_field(document: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if document.get(section) is None:
            document[section] = {}
        document = document[section]
        if not isinstance(document, dict):
            raise ConfigError(f"{key}: {section} is the value {document!r}, it has no fields")
    document[last] = value


def _remove_field(section: Any, key: str) -> None:
    *outer, last = key.split(".")
    for name in outer:
        section = section.get(name) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(last, None)


def build_json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    schema = _strip_titles_and_nulls(Experiment.model_json_schema(by_alias=True))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _strip_titles_and_nulls(schema: Any) -> Any:
    """No titles, which only repeat names, and no defaults of null."""
    if isinstance(schema, list):
        return [_strip_titles_and_nulls(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {k: v for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return {k: _strip_titles_and_nulls(v) for k, v in kept.items() if not (k == "default" and v is None)}


__all__ = [
    "AXIS_NAMES",
    "SCALES",
    "Experiment",
    "Paper",
    "Scale",
    "apply_overrides",
    "build_json_schema",
    "parse_experiment",
    "read_experiment",
]
