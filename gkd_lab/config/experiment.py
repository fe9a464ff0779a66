"""An experiment file: its settings, and the grid of axes whose values are crossed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args

import yaml
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

from gkd_lab.config.errors import ConfigError, Location, Origin, explain_validation_error
from gkd_lab.config.evaluation_settings import AnyEvaluationSettings
from gkd_lab.config.file_checks import check_fixed_axes, check_numbers, check_task_sections
from gkd_lab.config.fingerprint import canonical_json
from gkd_lab.config.first_sentence import extract_first_sentence
from gkd_lab.config.model_places import get_name_field
from gkd_lab.config.settings import LoraSettings, Section, Settings, SftSettings, merge_settings
from gkd_lab.config.yaml_files import parse_yaml, read_yaml_mapping

Scale = Literal["nano", "smol", "paper"]
SCALES: tuple[Scale, ...] = ("nano", "smol", "paper")
ClaimId = Literal[
    "C1", "C2", "C3", "C4", "C4b", "C5", "C6", "C6b", "C7", "C8", "C9", "C10", "C11", "C12", "C13", "C14",
    "C15", "C16", "C17", "C18", "C19", "C20", "C21", "C22", "C23", "C24", "C25", "C26", "C27", "C28",
]  # fmt: skip
FigureName = Literal[
    "1", "2", "3", "4", "5", "6", "7", "8", "9", "A.10", "A.11", "A.12", "A.13", "A.14", "A.15", "A.16",
]  # fmt: skip


def _define_axes() -> dict[str, Any]:
    """Return axis name -> pydantic field definition: task, all settings, `data.train` and other fields."""
    axes: dict[str, Any] = {"task": _define_axis(str, "tasks that are crossed with the other axes")}
    for name, field in Settings.model_fields.items():
        axes[name] = _define_axis(_drop_none(field.annotation), field.description)
    for section in ("data", "tokenizer", "teacher_tokenizer"):
        model = get_args(Settings.model_fields[section].annotation)[0]
        for name, field in model.model_fields.items():
            alias = f"{section}.{name}"
            axes[f"{section}__{name}"] = _define_axis(field.annotation, field.description, alias=alias)
    rows = SftSettings.model_fields["rows"]
    axes["student__sft__rows"] = _define_axis(PositiveInt, rows.description, alias="student.sft.rows")
    for name, field in LoraSettings.model_fields.items():
        alias = f"student.lora.{name}"
        value_type = _drop_none(field.annotation)
        axes[f"student__lora__{name}"] = _define_axis(value_type, field.description, alias=alias)
    return axes


def _drop_none(annotation: Any) -> Any:
    """Return a union type without None."""
    types = tuple(item for item in get_args(annotation) if item is not type(None))
    return Union[types]  # noqa: UP007  # of a list of types


def _define_axis(value_type: Any, description: str | None, **options: Any) -> tuple[Any, Any]:
    """Return (type, pydantic field) of an axis: a non-empty list of `value_type`."""
    return tuple[value_type, ...], Field(default=None, min_length=1, description=description, **options)


class _OrderedAxes(Section):
    """Axes in the order of the file; pydantic itself keeps the order of declaration."""

    _order: tuple[str, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _remember_order(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate the axes and store the order of the file's keys in `_order`."""
        axes = handler(data)
        if isinstance(data, Mapping):
            axes._order = tuple(data)
        return axes

    def list_ordered_values(self) -> dict[str, tuple[Any, ...]]:
        """Return axis name -> values as plain data, in the order of the file."""
        values = self.model_dump(by_alias=True, exclude_unset=True)
        return {axis: values[axis] for axis in self._order}


GridAxes = create_model(
    "GridAxes",
    __base__=_OrderedAxes,
    __doc__="Axes: for each field the list of its values; every combination is a cell.",
    **_define_axes(),
)
AXIS_NAMES = tuple(field.alias or name for name, field in GridAxes.model_fields.items())
_MODELS = ("teacher", "student")
_SCALAR_AXES = set(AXIS_NAMES) - {"objectives", "student.lora.targets"}
"""Axes whose values are not lists themselves."""


class Paper(Section):
    """Figures and claims of the paper that an experiment answers."""

    figures: tuple[FigureName, ...] = Field(default=(), description="numbers of the ICLR 2024 text")
    claims: tuple[ClaimId, ...] = Field(default=(), description="ids, as `gkd-lab claims` lists them")


class TaskSettings(Settings):
    """Settings of an experiment for all tasks, or for one."""

    evaluations: tuple[AnyEvaluationSettings, ...] | None = Field(
        default=None,
        min_length=1,
        description="ways of decoding and scoring; default: the task's evaluations",
    )
    metrics: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="scores of evaluations that name none, the main one first; default: the task's metrics",
    )


class ExperimentFile(TaskSettings):
    """A validated experiment file."""

    description: str = Field(description="the question, the hypothesis, the cost")
    paper: Paper = Field(default=Paper(), description="figures and claims of the paper that this answers")
    scale: Scale = Field(default="nano", description="models and data; `--scale` overrides it")
    task: str | None = Field(default=None, description="one task; several go into `grid.task`")
    grid: GridAxes = Field(  # type: ignore[valid-type]
        default=GridAxes(), description="axes that are crossed; the first one varies slowest"
    )
    per_scale: dict[Scale, TaskSettings] = Field(default={}, description="settings at one scale only")
    per_task: dict[str, TaskSettings] = Field(default={}, description="settings for one task only")
    _origin: Origin = Origin("experiment")

    @property
    def question(self) -> str:
        """First sentence of the description."""
        return extract_first_sentence(self.description)

    @property
    def names_paper(self) -> bool:
        """Whether the file names figures or claims of the paper."""
        return bool(self.paper.figures or self.paper.claims)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes, in the order of the file."""
        grid: _OrderedAxes = self.grid
        return grid._order

    def list_axes(self) -> dict[str, tuple[Any, ...]]:
        """Return axis name -> distinct values, in the order of the file; the first axis varies slowest."""
        grid: _OrderedAxes = self.grid
        return {
            axis: tuple({canonical_json(value): value for value in values}.values())
            for axis, values in grid.list_ordered_values().items()
        }

    @property
    def origin(self) -> Origin:
        """Name of its file and the lines of its values, for messages."""
        return self._origin

    def merge_task_settings(self, task: str, scale: str) -> dict[str, Any]:
        """Return the file's stated settings for a task at a scale as nested dictionaries; `per_task` wins."""
        return merge_settings(*(values for _, values in self.list_task_settings(task, scale)))

    def list_task_settings(self, task: str, scale: str) -> list[tuple[Location, dict[str, Any]]]:
        """Return (location in the file, stated settings) of what `merge_task_settings` merges, in order."""
        layers = self._list_settings_layers(task, scale)
        return [(location, _dump_stated_fields(layer)) for location, layer in layers]

    def get_task_evaluations(self, task: str, scale: str) -> tuple[AnyEvaluationSettings, ...] | None:
        """Return the file's evaluations for a task at a scale, `per_task` first; None if it states none."""
        layer = self._find_stating_layer("evaluations", task, scale)
        return None if layer is None else layer[1].evaluations

    def get_task_metrics(self, task: str, scale: str) -> tuple[str, ...] | None:
        """Return the file's metrics for a task at a scale, `per_task` first; None if it states none."""
        layer = self._find_stating_layer("metrics", task, scale)
        return None if layer is None else layer[1].metrics

    def locate_task_field(
        self, name: Literal["evaluations", "metrics"], task: str, scale: str
    ) -> Location | None:
        """Return the location of the field that holds for a task at a scale; None if none is stated."""
        layer = self._find_stating_layer(name, task, scale)
        return None if layer is None else (*layer[0], name)

    def _find_stating_layer(self, name: str, task: str, scale: str) -> tuple[Location, TaskSettings] | None:
        """Return (location, settings) of the last layer that states a field; None if none does."""
        layers = reversed(self._list_settings_layers(task, scale))
        return next((layer for layer in layers if getattr(layer[1], name)), None)

    def _list_settings_layers(self, task: str, scale: str) -> list[tuple[Location, TaskSettings]]:
        """Return (location, settings): for all tasks, of this scale, of this task; later ones win."""
        layers: list[tuple[Location, TaskSettings]] = [((), self)]
        if scale in self.per_scale:
            layers.append((("per_scale", scale), self.per_scale[scale]))
        if task in self.per_task:
            layers.append((("per_task", task), self.per_task[task]))
        return layers


def _dump_stated_fields(layer: TaskSettings) -> dict[str, Any]:
    """Return the settings that a file states as nested dictionaries; nulls at the top are left out.

    Inside a section null is a value.
    """
    fields = layer.model_dump(include=set(Settings.model_fields), exclude_unset=True)
    return {name: value for name, value in fields.items() if value is not None}


def read_experiment(path: Path, overrides: Mapping[str, str] | None = None) -> ExperimentFile:
    """Return the validated experiment of a YAML file, after `--set` overrides. Raises ConfigError.

    A `per_task` section must be of one of the file's own tasks; `--set task=` may choose another one.
    """
    document, origin = read_yaml_mapping(path, "task: arithmetic")
    _check_grid_lists(document, origin)
    check_task_sections(document, origin)
    if overrides:
        document = apply_overrides(document, overrides)
        origin = replace(origin, set_fields=tuple(overrides))
    return parse_experiment(document, origin)


def parse_experiment(document: Mapping[str, Any], origin: Origin | str) -> ExperimentFile:
    """Return plain data as a validated experiment; messages begin with `origin`. Raises ConfigError."""
    if isinstance(origin, str):
        origin = Origin(origin)
    check_numbers(document, origin, ExperimentFile)
    try:
        experiment = ExperimentFile.model_validate(document)
    except ValidationError as error:
        raise explain_validation_error(error, origin, ExperimentFile) from error
    check_fixed_axes(document, origin)
    experiment._origin = origin
    return experiment


def _check_grid_lists(document: dict[str, Any], origin: Origin) -> None:
    """Raise ConfigError unless each axis is a non-empty list; replace a null or missing grid by {}."""
    grid = document["grid"] = {} if document.get("grid") is None else document["grid"]
    if not isinstance(grid, dict):
        place = origin.format_place(("grid",))
        raise ConfigError(f"{place}: grid: expected `axis: [values]` lines, got {grid!r}")
    for axis, values in grid.items():
        place = f"{origin.format_place(('grid', axis))}: grid.{axis}"
        if not isinstance(values, list):
            raise ConfigError(f"{place}: must be a list of values, got {values!r}; did you mean [{values}]?")
        if not values:
            raise ConfigError(f"{place}: the list is empty, so there is no cell to run")


def apply_overrides(document: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Set each `key=v1,v2` in `document`, in place, and return it. Raises ConfigError.

    Several values, or a key that is an axis already, make an axis; one value sets a field. Either removes
    what stood in that field, in every section of `per_task` and `per_scale` too.
    """
    for key, text in overrides.items():
        values = parse_override(key, text)
        grid = document.setdefault("grid", {})
        groups = [document.get("per_task"), document.get("per_scale")]
        sections = [part for group in groups if isinstance(group, dict) for part in group.values()]
        for section in (document, *sections):
            _remove_field(section, key)
        if key in grid or len(values) > 1:
            grid[key] = values
        else:
            _set_field(document, key, values[0])
    return document


def parse_override(key: str, text: str) -> list[Any]:
    """Return the YAML values of `V1,V2` as a list; for an axis of scalars `[V1,V2]` gives the same list.

    Raises ConfigError.
    """
    try:
        values = parse_yaml(f"[{text}]")
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "not a YAML value"
        raise ConfigError(f"{key}={text}: {reason}; expected a value, or values as V1,V2") from error
    if not values:
        raise ConfigError(f"{key}={text}: no value given; expected a value, or values as V1,V2")
    is_axis = len(values) == 1 and isinstance(values[0], list) and key in _SCALAR_AXES
    return list(values[0]) if is_axis and values[0] else list(values)


def _set_field(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a field of nested dictionaries, in place, by dotted name. ConfigError if a section is a value.

    Missing sections are created. A model that is stated by its name alone gets fields beside the name.
    """
    *sections, field = key.split(".")
    for section in sections:
        stated = document.get(section)
        if stated is None:
            document[section] = {}
        elif section in _MODELS and isinstance(stated, str):
            document[section] = {get_name_field(stated): stated}
        document = document[section]
        if not isinstance(document, dict):
            raise ConfigError(f"{key}: {section} is the value {document!r}, which has no fields")
    document[field] = value


def _remove_field(section: Any, key: str) -> None:
    """Remove a field of nested dictionaries, in place, by its dotted name; do nothing if it is missing."""
    *sections, field = key.split(".")
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(field, None)
