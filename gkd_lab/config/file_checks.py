"""Refuse what a file leaves ambiguous: doubtful numbers, a value beside its axis, sections of no task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from gkd_lab.config.errors import (
    ConfigError,
    Location,
    Origin,
    explain_violation,
    list_key_types,
    locate_field,
    suggest_choices,
    walk_annotation,
)
from gkd_lab.config.yaml_files import suggest_plain_number


def check_numbers(document: Mapping[str, Any], origin: Origin, model: type[BaseModel]) -> None:
    """Raise ConfigError for `true` or text such as `010` or `1_000` where `model` takes a number alone.

    pydantic would take `true` as 1, and other readers take `010` as 8. Quoted plain numbers are numbers.
    """
    for location, value, annotations in _walk_scalars(document, (), [model]):
        types = {item for annotation in annotations for item in walk_annotation(annotation)}
        if not types & {int, float} or types & {bool, str}:
            continue
        plain = None if isinstance(value, bool) else suggest_plain_number(value)
        if plain is None and not isinstance(value, bool):
            continue
        name, annotation = locate_field(model, location)
        reason = explain_violation("float_type" if float in types else "int_type", value, annotation)
        hint = "" if plain is None else f", without leading zeros or `_`; did you mean {plain}?"
        place, shown = origin.format_place(location), repr(value) if plain else str(value).lower()
        raise ConfigError(f"{place}: {name}: {shown} is not valid: {reason}{hint}")


def _walk_scalars(
    value: Any, location: Location, annotations: Sequence[Any]
) -> Iterator[tuple[Location, Any, Sequence[Any]]]:
    """Yield (location, value, possible types) of the booleans and texts inside plain data."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            key_types = [item for annotation in annotations for item in list_key_types(annotation, key)]
            yield from _walk_scalars(part, (*location, key), key_types)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _walk_scalars(part, (*location, number), annotations)
    elif isinstance(value, bool | str):
        yield location, value, annotations


def check_fixed_axes(document: Mapping[str, Any], origin: Origin) -> None:
    """Raise ConfigError if a field has a fixed value and an axis, of which only the axis counted."""
    sections: list[tuple[Location, Any]] = [((), document)]
    for group in ("per_scale", "per_task"):
        sections += [((group, name), part) for name, part in (document.get(group) or {}).items() if part]
    for axis in document.get("grid") or {}:
        path = tuple(axis.split("."))
        for start, section in sections:
            value = _get_nested_value(section, path)
            if value is not None:
                place, name = origin.format_place((*start, *path)), ".".join(map(str, (*start, *path)))
                reason = f"the fixed value {value!r} stands beside the axis grid.{axis}; leave one out"
                raise ConfigError(f"{place}: {name}: {reason}")


def _get_nested_value(section: Any, path: Sequence[str]) -> Any:
    """Return the value at a path of keys in nested dictionaries; None where there is none."""
    for key in path:
        section = section.get(key) if isinstance(section, Mapping) else None
    return section


def check_task_sections(document: Mapping[str, Any], origin: Origin) -> None:
    """Raise ConfigError for a `per_task` section of a task that the experiment does not have."""
    grid, task, sections = document.get("grid") or {}, document.get("task"), document.get("per_task")
    tasks = grid.get("task") or ([task] if task else [])
    for name in sections if isinstance(sections, Mapping) else ():
        if tasks and name not in tasks:
            place = origin.format_place(("per_task", name))
            raise ConfigError(
                f"{place}: per_task.{name}: the experiment has no such task; {suggest_choices(name, tasks)}"
            )
