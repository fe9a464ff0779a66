"""Errors that a user can mend: each says what is wrong, why, and what the nearest valid choice is."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError


class SpecError(ValueError):
    """A request that cannot be fulfilled as written; the command line exits with status 2."""


def nearest(value: object, choices: Iterable[object]) -> str:
    """`did you mean 'x'? valid: ...`, for the end of an error message."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names)}"


def unknown(kind: str, value: object, choices: Iterable[object]) -> SpecError:
    """The error for a name that is not among its choices."""
    return SpecError(f"unknown {kind} {value!r}; {nearest(value, choices)}")


def explain(error: ValidationError, where: str, choices: Iterable[object] = ()) -> SpecError:
    """One line out of pydantic's report: place, value, reason; for an unknown field the nearest known one."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_union_tag(part))
    if first["type"] == "extra_forbidden":
        field = str(first["loc"][-1])
        return SpecError(f"{where}: unknown field {place!r}; {nearest(field, choices)}")
    return SpecError(f"{where}: {place}: {_shown(first['input'])} is not valid: {first['msg']}")


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (part in {"str", "int", "float"} or "[" in part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
