"""Merge the settings of a point: defaults of the task at a scale, the experiment file, values of the axes.

Later ones win. Each value keeps its source, so that `gkd-lab show` can say where it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.experiment import ExperimentFile
from gkd_lab.config.model_places import get_name_field
from gkd_lab.config.settings import ModelSettings, merge_settings
from gkd_lab.config.value_sources import SourcedSettings, SourceKind, ValueSource

_SHORTHANDS = {
    "source": ("lmbda", "temperature", "method"),
    "objectives": ("method", "beta", "divergence", "rescale_divergence", "reward", "alpha", "anchor"),
}
"""Long form -> the settings that are short for a part of it."""

_NON_SETTING_KEYS = ("models", "students", "evaluations", "per_student")
"""Keys of a task's defaults that are not fields of `Settings`."""


class TaskDefaults(Protocol):
    """Interface of a task for resolving a grid; `gkd_lab.tasks.Task` implements it."""

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def family(self) -> Family:
        """Family of its models, such as `decoder-only`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of its default evaluations."""

    def list_default_layers(
        self, scale: str, source: str | None
    ) -> Sequence[tuple[SourceKind, Mapping[str, Any]]]:
        """Return (kind, settings, `models`, `evaluations`) at a scale for a data source, later ones win.

        source: None: the task's own.
        """
        ...


@dataclass(frozen=True)
class MergedLayers:
    """Settings of a point, merged, with the layers that code asks for by themselves."""

    settings: SourcedSettings
    defaults: SourcedSettings
    """The task's defaults, with its `models`, `students` and `evaluations`."""
    stated: SourcedSettings
    """What the experiment file and the axes state."""
    reverse_kl: Mapping[str, Any]
    """Defaults of the student's optimizer that replace those of `settings` for reverse KL."""


def merge_layers(
    experiment: ExperimentFile, task: TaskDefaults, scale: str, axis_values: Mapping[str, Any]
) -> MergedLayers:
    """Return the merged settings of a point. ConfigError: no such scale, no data, a value set twice."""
    stated = _merge_stated_settings(experiment, task.name, scale, axis_values)
    defaults = _merge_defaults(task, scale, stated.values.get("data", {}).get("source"))
    student_defaults, reverse_kl = _get_student_defaults(defaults.values, stated.values)
    student = stated.values.get("student", defaults.values["student"])
    settings = SourcedSettings()
    settings.merge_sourced(defaults, exclude=_NON_SETTING_KEYS)
    settings.merge(student_defaults, ValueSource("student", detail=f"the student {student}"))
    settings.merge_sourced(stated)
    _scale_schedule(settings, defaults, stated.values)
    unstated = {name: value for name, value in reverse_kl.items() if name not in stated.values}
    return MergedLayers(settings, defaults, stated, unstated)


def _merge_defaults(task: TaskDefaults, scale: str, data_source: str | None) -> SourcedSettings:
    """Return the task's merged defaults for a data source. ConfigError: no such scale, no data."""
    defaults = SourcedSettings()
    try:
        layers = task.list_default_layers(scale, data_source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for kind, layer in layers:
        defaults.merge(layer, ValueSource(kind))
    return defaults


def _merge_stated_settings(
    experiment: ExperimentFile, task_name: str, scale: str, axis_values: Mapping[str, Any]
) -> SourcedSettings:
    """Return the experiment's settings, axis values over them. ConfigError: shorthand and long form."""
    stated = SourcedSettings()
    for location, layer in experiment.list_task_settings(task_name, scale):
        stated.merge(layer, ValueSource("file", location))
    # A field of the student, an axis with dots, is set after the student itself.
    for axis in sorted(axis_values, key=lambda axis: axis.count(".")):
        if axis != "task":
            value = axis_values[axis]
            for field in reversed(axis.split(".")):
                value = {field: value}
            _expand_student_name(stated, axis)
            stated.merge(value, ValueSource("axis", ("grid", axis)))
    for long_form, shorthands in _SHORTHANDS.items():
        conflicts = [name for name in shorthands if name in stated.values or name in experiment.axis_names]
        if conflicts and not isinstance(stated.values.get(long_form), str | None):
            raise ConfigError(f"{long_form} and {', '.join(conflicts)} set the same twice; leave one out")
    return stated


def _expand_student_name(stated: SourcedSettings, axis: str) -> None:
    """Make a section of a student's name in stated settings, if an axis sets a field of the student."""
    student = stated.values.get("student")
    if axis.startswith("student.") and isinstance(student, str):
        stated.rename_leaf("student", (get_name_field(student),))


def select_settings(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's defaults without the keys that are no `Settings` fields, such as `models`."""
    return {name: value for name, value in defaults.items() if name not in _NON_SETTING_KEYS}


def list_models(role: str, defaults: Mapping[str, Any]) -> dict[str, ModelSettings]:
    """Return size -> model of the scale; for students with the scale's changes of `students`."""
    changes = defaults.get("students", {}) if role == "student" else {}
    return {
        name: ModelSettings.model_validate(merge_settings(model, changes))
        for name, model in defaults["models"].items()
    }


def _get_student_defaults(
    defaults: Mapping[str, Any], stated: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scale's changes for the stated student: (always applied, applied with reverse KL only)."""
    student = stated.get("student", defaults["student"])
    fields = dict(defaults.get("per_student", {}).get(student, {})) if isinstance(student, str) else {}
    return fields, fields.pop("reverse_kl", {})


def _scale_schedule(settings: SourcedSettings, defaults: SourcedSettings, stated: Mapping[str, Any]) -> None:
    """Set, in `settings`, unstated warm-up and cool-down to their default share of the steps."""
    default_steps = defaults.values["steps"]
    share = settings.values["steps"] / default_steps
    for name in ("warmup_steps", "cooldown_steps"):
        if name not in stated and name in defaults.values:
            default = defaults.values[name]
            (source,) = defaults.find((name,))
            if share != 1:
                source = ValueSource("derived", detail=f"as {default} of the default {default_steps} steps")
            settings.merge({name: int(default * share)}, source)
