"""In which fields of their specifications two records differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gkd_lab.store import Record
from gkd_lab.store.files import read_json


@dataclass(frozen=True)
class SpecDifference:
    """A field of the specification that differs; None where there is no such field."""

    name: str
    a: Any
    b: Any


def read_spec(record: Record) -> dict[str, Any]:
    """`spec.json`: fingerprint, role or labels, and the specification as `spec`."""
    return read_json(record.folder / "spec.json") or {}


def get_role(spec: Mapping[str, Any]) -> str:
    """`cell`, `start` or `teacher`; only artifacts say it."""
    return str(spec.get("role", "cell"))


def compare_specs(a: Record, b: Record) -> Iterator[SpecDifference]:
    """Field by field. A cell is held against a teacher or a start by the student that it started from."""
    ours, theirs = read_spec(a), read_spec(b)
    first, second = ours.get("spec", {}), theirs.get("spec", {})
    roles = get_role(ours), get_role(theirs)
    if roles[0] != roles[1]:
        yield SpecDifference("role", *roles)
    if (roles[0] == "cell") != (roles[1] == "cell"):
        first, second = first.get("start", first), second.get("start", second)
    flat = dict(_flatten_spec(first)), dict(_flatten_spec(second))
    for name in dict.fromkeys(chain(*flat)):
        if flat[0].get(name) != flat[1].get(name):
            yield SpecDifference(name, flat[0].get(name), flat[1].get(name))


def describe_relation(a: Record, b: Record) -> str | None:
    """That one of two records was made from, or taught by, the other."""
    ours, theirs = read_spec(a), read_spec(b)
    for cell, model, names in ((ours, theirs, "AB"), (theirs, ours, "BA")):
        role = get_role(model)
        if get_role(cell) == "cell" != role and cell.get("spec", {}).get(role) == model.get("spec"):
            said = "started from" if role == "start" else "learnt from the teacher"
            return f"{names[0]} {said} {names[1]}"
    return None


def _flatten_spec(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """`objectives[0].beta` and its value, for everything below."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten_spec(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _flatten_spec(item, f"{name}[{place}]")
    else:
        yield name, value
