"""Errors that the user can fix. Each message names the value, the reason and the nearest valid choices."""

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
"""Type of a pydantic error -> what the value must be."""
_UNION_TAGS = {"str", "int", "float", "bool", "constrained-int", "constrained-float", "constrained-str"}
"""Names that pydantic adds to a location for the branch of a union; for a section it is the class."""
_MAX_LISTED_CHOICES = 8
_NEAREST_CHOICES = 5


Location = tuple[str | int, ...]
"""Keys and list indices that lead to a value, from the top of a file."""


class ConfigError(ValueError):
    """An invalid request; the command line prints the message and exits with status 2."""

    faults: tuple[str, ...] = ()
    """Sentences of `join_faults`; empty for an error with one fault."""

    def list_faults(self) -> list[str]:
        """Return a sentence for each fault."""
        return list(self.faults) or [str(self)]


@dataclass(frozen=True)
class Origin:
    """Name of a file or request, with which a message begins, and the lines of its values where known."""

    name: str
    lines: Mapping[Location, int] = dataclass_field(default_factory=dict)
    set_fields: tuple[str, ...] = ()
    """Dotted names of the fields and axes that were set outside the file, by `--set`."""

    def find_set_field(self, location: Sequence[str | int]) -> str | None:
        """Return the key of the `--set` that stated the value at a location; None if the file did."""
        for key in self.set_fields:
            if tuple(location[:2]) == ("grid", key) or _begins_with(location, key.split(".")):
                return key
        return None

    def format_place(self, location: Sequence[str | int]) -> str:
        """Return `NAME:LINE` of the deepest part of a location whose line is known, else the name.

        Parts that the file has not, such as pydantic's names of a union's branches, are skipped.
        """
        if self.find_set_field(location) is not None:
            return f"{self.name}, with the values set"
        written: Location = ()
        for part in location:
            if (*written, part) in self.lines:
                written = (*written, part)
        return f"{self.name}:{self.lines[written]}" if written else self.name


def _begins_with(location: Iterable[str | int], keys: Iterable[str]) -> bool:
    """Return whether these keys lead a location, pydantic's names of a union's branches between them."""
    parts = iter(location)
    return all(
        key == next((part for part in parts if part == key or not _is_branch(part)), None) for key in keys
    )


def _is_branch(part: str | int) -> bool:
    """Return whether a part of pydantic's location names a branch of a union: a class or a type."""
    return isinstance(part, str) and (part in _UNION_TAGS or "[" in part or part[:1].isupper())


class MissingRevision(ConfigError):
    """The commit of a hub name is unknown and cannot be asked for now."""

    def __init__(self, kind: str, name: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.name = name


def join_faults(faults: Sequence[str]) -> ConfigError:
    """Return (not raise) one ConfigError for several faults, a line each; for one fault that alone."""
    if len(faults) == 1:
        return ConfigError(faults[0])
    error = ConfigError("\n".join([f"{len(faults)} faults:", *(f"  {fault}" for fault in faults)]))
    error.faults = tuple(faults)
    return error


def suggest_choices(value: object, choices: Iterable[object]) -> str:
    """Return the end of a message, `did you mean 'x'? valid: ...`; of over 8 choices the nearest 5."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) <= _MAX_LISTED_CHOICES:
        return f"{hint}valid: {', '.join(names)}"
    nearest = difflib.get_close_matches(str(value), names, n=_NEAREST_CHOICES, cutoff=0)
    return f"{hint}valid: {', '.join(nearest)} and {len(names) - len(nearest)} more"


def suggest_sibling(place: str | Path, accepts: Callable[[Path], bool] = Path.exists) -> str | None:
    """Return the nearest name beside a path that does not exist, written as the path is; None without one.

    accepts: Which names beside it may be meant.
    """
    text = str(place)
    path = Path(text).expanduser()
    if not path.parent.is_dir():
        return None
    siblings = [item.name for item in path.parent.iterdir() if accepts(item)]
    nearest = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    start, separator, _ = text.rstrip("/").rpartition("/")
    return f"{start}{separator}{nearest[0]}" if nearest else None


def build_unknown_name_error(kind: str, value: object, choices: Iterable[object]) -> ConfigError:
    """Return (not raise) a ConfigError `unknown KIND VALUE` with the nearest valid choices."""
    return ConfigError(f"unknown {kind} {value!r}; {suggest_choices(value, choices)}")


def explain_validation_error(
    error: ValidationError, origin: Origin | str, model: type[BaseModel]
) -> ConfigError:
    """Return (not raise) pydantic's error as a one-line ConfigError: field, value, reason, choices.

    origin: Names the file or request, if possible with the line; the message begins with it.
    """
    # Each branch of a union (`small` or a section) reports; the one that was meant reports deepest.
    deepest = max(error.errors(include_url=False), key=lambda report: len(report["loc"]))
    location, kind, value = deepest["loc"], deepest["type"], deepest["input"]
    place = origin if isinstance(origin, str) else origin.format_place(location)
    if kind == "extra_forbidden":
        section, annotation = locate_field(model, location[:-1])
        owners = list_model_classes(annotation)
        names = [name for owner in owners for name in list_field_types(owner)]
        name = ".".join(filter(None, (section, str(location[-1]))))
        synonyms = [getattr(owner, "field_synonyms", {}).get(location[-1]) for owner in owners]
        suggestion = next(filter(None, synonyms), None) or suggest_choices(location[-1], names)
        return ConfigError(f"{place}: unknown field {name!r}; {suggestion}")
    field, annotation = locate_field(model, location)
    if kind == "union_tag_invalid":
        field, value = f"{field}.type", value.get("type")
    if kind == "missing":
        return ConfigError(f"{place}: {field} is missing")
    reason = explain_violation(kind, value, annotation) or deepest["msg"]
    if (
        isinstance(value, list)
        and kind not in ("too_short", "layer_map", "lora_targets")
        and not field.startswith("grid")
    ):
        reason += "; several values make an axis: write them under `grid`"
    place = f"{place}: {field}" if field else place
    return ConfigError(f"{place}: {_shorten_repr(value)} is not valid: {reason}")


def explain_violation(kind: str, value: Any, annotation: Any) -> str:
    """Return text on what a value must be, by the kind of pydantic error; "" if pydantic's text will do."""
    classes = list_model_classes(annotation)
    names = [name for owner in classes for name in list_field_types(owner)]
    if kind == "union_tag_invalid":
        tags = [_list_literal_choices(owner.model_fields["type"].annotation) for owner in classes]
        return suggest_choices(value, itertools.chain(*tags))
    if kind == "literal_error":
        return suggest_choices(value, _list_literal_choices(annotation))
    if kind in ("model_type", "model_attributes_type", "dict_type") or (kind == "string_type" and names):
        text = "text or " if kind == "string_type" else ""
        return f"must be {text}`field: value` lines" + (f" of {', '.join(names)}" if names else "")
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return f"must be {_describe_bounds(annotation)}"
    bounds = _describe_bounds(annotation)
    requirement = _REQUIREMENTS.get(kind, "")
    return f"{requirement} {bounds}" if bounds and "number" in requirement else requirement


def _describe_bounds(annotation: Any) -> str:
    """Return the bounds of a number type in words, `from 0 to 1` or `more than 0`; "" without bounds."""
    bounds: dict[str, Any] = {}
    for constraint in _list_constraints(annotation):
        bounds |= {name: getattr(constraint, name) for name in _BOUND_WORDS if hasattr(constraint, name)}
    if bounds.keys() == {"ge", "le"}:
        return f"from {bounds['ge']} to {bounds['le']}"
    return " and ".join(f"{_BOUND_WORDS[name]} {bound}" for name, bound in bounds.items())


def locate_field(model: type[BaseModel], location: Iterable[str | int]) -> tuple[str, Any]:
    """Return (name as the user writes it, such as `grid.lmbda[1]`, type) of pydantic's error location."""
    path: str = ""
    annotation: Any = model
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        candidates = list_key_types(annotation, part)
        if candidates:
            path += f".{part}" if path else part
            annotation = candidates[0]
        elif part not in _UNION_TAGS and not part.startswith("literal["):
            tagged = [owner for owner in list_model_classes(annotation) if owner.__name__ == part]
            path += "" if tagged else f".{part}" if path else part
            annotation = tagged[0] if tagged else Any
    return path, annotation


def list_key_types(annotation: Any, key: str) -> list[Any]:
    """Return the types that a key's value may have: of the classes inside a type, then of its dicts."""
    field_types = [list_field_types(owner) for owner in list_model_classes(annotation)]
    types = [fields[key] for fields in field_types if key in fields]
    return types + [get_args(item)[1] for item in walk_annotation(annotation) if get_origin(item) is dict]


@cache
def list_field_types(model: type[BaseModel]) -> Mapping[str, Any]:
    """Return field name (its alias if it has one) -> type with its constraints, of a pydantic class."""
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata]
        if field.metadata
        else field.annotation
        for name, field in model.model_fields.items()
    }


def walk_annotation(annotation: Any) -> Iterator[Any]:
    """Yield a type and all types inside its unions, tuples and `Annotated`, but not in dicts or models."""
    yield annotation
    if get_origin(annotation) is Annotated:
        yield from walk_annotation(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType, tuple):
        for item in get_args(annotation):
            yield from walk_annotation(item)


def list_model_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic classes inside a type, as `walk_annotation` finds them."""
    return [
        item for item in walk_annotation(annotation) if isinstance(item, type) and issubclass(item, BaseModel)
    ]


def _list_literal_choices(annotation: Any) -> list[Any]:
    """Return the values of all `Literal`s inside a type, as `walk_annotation` finds them."""
    literals = (item for item in walk_annotation(annotation) if get_origin(item) is Literal)
    return [choice for literal in literals for choice in get_args(literal)]


def _list_constraints(annotation: Any) -> Iterator[Any]:
    """Yield the constraint objects in a type's `Annotated` parts; those of a `Field(...)` one by one."""
    for item in walk_annotation(annotation):
        if get_origin(item) is Annotated:
            for mark in get_args(item)[1:]:
                yield from getattr(mark, "metadata", [mark])


def _shorten_repr(value: Any) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
