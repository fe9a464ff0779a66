"""In which fields of their specifications two records differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gkd_lab.store import Record
from gkd_lab.store.files import read_json


@dataclass(frozen=True)
class Field:
    """A field of the specification that differs; None where there is no such field."""

    name: str
    a: Any
    b: Any


def described(record: Record) -> dict[str, Any]:
    """`spec.json`: fingerprint, role or labels, and the specification as `spec`."""
    return read_json(record.folder / "spec.json") or {}


def role_of(facts: Mapping[str, Any]) -> str:
    """`cell`, `start` or `teacher`; only artifacts say it."""
    return str(facts.get("role", "cell"))


def differences(a: Record, b: Record) -> Iterator[Field]:
    """Field by field. A cell is held against a teacher or a start by the student that it started from."""
    ours, theirs = described(a), described(b)
    first, second = ours.get("spec", {}), theirs.get("spec", {})
    roles = role_of(ours), role_of(theirs)
    if roles[0] != roles[1]:
        yield Field("role", *roles)
    if (roles[0] == "cell") != (roles[1] == "cell"):
        first, second = first.get("start", first), second.get("start", second)
    flat = dict(_flat(first)), dict(_flat(second))
    for name in dict.fromkeys(chain(*flat)):
        if flat[0].get(name) != flat[1].get(name):
            yield Field(name, flat[0].get(name), flat[1].get(name))


def relation(a: Record, b: Record) -> str | None:
    """That one of two records was made from, or taught by, the other."""
    ours, theirs = described(a), described(b)
    for cell, model, names in ((ours, theirs, "AB"), (theirs, ours, "BA")):
        role = role_of(model)
        if role_of(cell) == "cell" != role and cell.get("spec", {}).get(role) == model.get("spec"):
            said = "started from" if role == "start" else "learnt from the teacher"
            return f"{names[0]} {said} {names[1]}"
    return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """`objectives[0].beta` and its value, for everything below."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _flat(item, f"{name}[{place}]")
    else:
        yield name, value
