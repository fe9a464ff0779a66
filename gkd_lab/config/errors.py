"""Errors that a user can mend: each says what is wrong, why, and the nearest valid choice."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

_BOUND_WORDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_REQUIREMENTS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list of values",
    "too_short": "the list is empty",
}
_UNION_TAGS = {"str", "int", "float", "bool"}
"""What pydantic adds to a place to name the branch of a union; for a section it is the class."""


class ConfigError(ValueError):
    """A request that cannot be fulfilled as written; the command line exits with status 2."""


def suggest_choices(value: object, choices: Iterable[object]) -> str:
    """`did you mean 'x'? valid: ...`, for the end of an error message."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"


def build_unknown_name_error(kind: str, value: object, choices: Iterable[object]) -> ConfigError:
    """The error for a name that is not among its choices."""
    return ConfigError(f"unknown {kind} {value!r}; {suggest_choices(value, choices)}")


@contextmanager
def report_yaml_errors(path: Path) -> Iterator[None]:
    """What can be wrong with a YAML file that a user names, as one line. Raises SpecError."""
    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error


def explain_validation_error(error: ValidationError, origin: str, model: type[BaseModel]) -> ConfigError:
    """One line out of pydantic's report on a `model`: place, value, reason, what would be valid."""
    # Of a union (`small` or a section) each branch reports; the one that fits goes deepest.
    deepest = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    loc, kind, value = deepest["loc"], deepest["type"], deepest["input"]
    if kind == "extra_forbidden":
        place, parent = _locate_field(model, loc[:-1])
        names = [name for owner in _list_model_classes(parent) for name in _list_field_types(owner)]
        field = ".".join(filter(None, (place, str(loc[-1]))))
        return ConfigError(f"{origin}: unknown field {field!r}; {suggest_choices(loc[-1], names)}")
    place, annotation = _locate_field(model, loc)
    if kind == "union_tag_invalid":
        place, value = f"{place}.type", value.get("type")
    if kind == "missing":
        return ConfigError(f"{origin}: {place} is missing")
    reason = _explain_violation(kind, value, annotation) or deepest["msg"]
    if isinstance(value, list) and kind not in ("too_short", "layer_map") and not place.startswith("grid"):
        reason += "; several values make an axis: write them under `grid`"
    return ConfigError(f"{origin}: {place}: {_shorten_repr(value)} is not valid: {reason}")


def _explain_violation(kind: str, value: Any, annotation: Any) -> str:
    names = [name for owner in _list_model_classes(annotation) for name in _list_field_types(owner)]
    if kind == "union_tag_invalid":
        return suggest_choices(
            value,
            [
                name
                for owner in _list_model_classes(annotation)
                for name in _list_literal_choices(_get_type_annotation(owner))
            ],
        )
    if kind == "literal_error":
        return suggest_choices(value, _list_literal_choices(annotation))
    if kind in ("model_type", "model_attributes_type", "dict_type") or (kind == "string_type" and names):
        text = "text or " if kind == "string_type" else ""
        return f"must be {text}`field: value` lines" + (f" of {', '.join(names)}" if names else "")
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return f"must be {_describe_bounds(annotation)}"
    bounds = _describe_bounds(annotation)
    known = _REQUIREMENTS.get(kind, "")
    return f"{known} {bounds}" if bounds and "number" in known else known


def _get_type_annotation(model: type[BaseModel]) -> Any:
    """What tells a member of a union from the others."""
    return model.model_fields["type"].annotation


def _describe_bounds(annotation: Any) -> str:
    """`from 0 to 1`, `more than 0`: the bounds that stand beside a type."""
    found: dict[str, Any] = {}
    for mark in _list_constraints(annotation):
        found |= {name: getattr(mark, name) for name in _BOUND_WORDS if hasattr(mark, name)}
    if found.keys() == {"ge", "le"}:
        return f"from {found['ge']} to {found['le']}"
    return " and ".join(f"{_BOUND_WORDS[name]} {bound}" for name, bound in found.items())


def _locate_field(model: type[BaseModel], loc: Iterable[str | int]) -> tuple[str, Any]:
    """`grid.lmbda[1]` and the type that belongs there; a union's tags are no part of the place."""
    place: str = ""
    annotation: Any = model
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
            continue
        owners = [_list_field_types(owner) for owner in _list_model_classes(annotation)]
        of_models = [fields[part] for fields in owners if part in fields]
        of_mappings = [get_args(one)[1] for one in _walk_annotation(annotation) if get_origin(one) is dict]
        if of_models or of_mappings:
            place += f".{part}" if place else part
            annotation = (of_models or of_mappings)[0]
        elif part not in _UNION_TAGS and not part.startswith("literal["):
            tagged = [owner for owner in _list_model_classes(annotation) if owner.__name__ == part]
            place += "" if tagged else f".{part}" if place else part
            annotation = tagged[0] if tagged else Any
    return place, annotation


def _list_field_types(model: type[BaseModel]) -> dict[str, Any]:
    """Name as it is written -> type, with its bounds."""
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata]
        if field.metadata
        else field.annotation
        for name, field in model.model_fields.items()
    }


def _walk_annotation(annotation: Any) -> Iterator[Any]:
    """A type and those that it is composed of; dictionaries and models are left closed."""
    yield annotation
    if get_origin(annotation) is Annotated:
        yield from _walk_annotation(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for part in get_args(annotation):
            yield from _walk_annotation(part)


def _list_model_classes(annotation: Any) -> list[type[BaseModel]]:
    return [
        one for one in _walk_annotation(annotation) if isinstance(one, type) and issubclass(one, BaseModel)
    ]


def _list_literal_choices(annotation: Any) -> list[Any]:
    return [c for one in _walk_annotation(annotation) if get_origin(one) is Literal for c in get_args(one)]


def _list_constraints(annotation: Any) -> Iterator[Any]:
    """The bounds in a type; those of pydantic's `SpecDifference(...)` lie in its metadata."""
    for one in _walk_annotation(annotation):
        if get_origin(one) is Annotated:
            for mark in get_args(one)[1:]:
                yield from getattr(mark, "metadata", [mark])


def _shorten_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
