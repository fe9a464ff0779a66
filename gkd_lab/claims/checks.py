"""What a check is: it picks models of a column of places and turns them into comparisons.

A column is what stays the same in a comparison: a task, a student, a decoding, a divergence, ... A
comparison is a weighted sum of scores that the claim says is above 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd_lab.claims.facts import SIZES, WHAT, Place
from gkd_lab.claims.place_names import said

Wanted = Mapping[str, Any]
"""Field of a place -> the value, a tuple of values, or a condition that it must meet."""


@dataclass(frozen=True)
class Cells:
    """Some models of a column, by what they were made with."""

    name: str
    wanted: Wanted

    def match(self, place: Place) -> bool:
        """Whether a place is one of them; cells are meant unless a role is named."""
        return fits(place, {"role": "cell", **self.wanted})


@dataclass(frozen=True)
class Term:
    """`weight` times the mean, largest or smallest score of some places."""

    weight: float
    places: tuple[int, ...]
    """Indices into the column's places."""
    reduce: Literal["mean", "max", "min"] = "mean"


@dataclass(frozen=True)
class Comparison:
    """Terms whose sum a claim says is above 0; with `over`, above `factor` times the sum of those.

    With `over` and no factor it is their ratio, to be measured.
    """

    label: str
    terms: tuple[Term, ...]
    over: tuple[Term, ...] = ()
    factor: float | None = None


@dataclass(frozen=True)
class Found:
    """The comparisons of a column, and which of the asked for models are not in it."""

    comparisons: list[Comparison]
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Check(ABC):
    """`where` limits the places; quality is meant unless a measure is named."""

    where: Wanted

    def selects(self, place: Place) -> bool:
        """Whether the check speaks of a place."""
        return fits(place, {"measure": "quality", **self.where})

    @abstractmethod
    def free(self) -> set[str]:
        """Fields that differ inside a column."""

    @abstractmethod
    def find(self, places: Sequence[Place]) -> Found:
        """The comparisons of one column."""


START = Cells("the SFT student", {"role": "start"})
TEACHER = Cells("the teacher", {"role": "teacher"})


def fits(place: Place, wanted: Wanted) -> bool:
    """Whether each field that is asked for has the value, one of the values, or meets the condition."""
    return all(_fits(place.get(name), value) for name, value in wanted.items())


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return any(_fits(value, one) for one in wanted)
    if callable(wanted):
        return value is not None and bool(wanted(value))
    if isinstance(wanted, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-3, abs_tol=1e-9)
    return bool(value == wanted)


def at_least(bound: float) -> Callable[[float], bool]:
    """A condition on a field."""
    return lambda value: value >= bound


def other_than(name: str) -> Callable[[str], bool]:
    """A condition on a field."""
    return lambda value: value != name


def span(places: Sequence[int], sign: int = 1) -> Iterator[Term]:
    """The largest minus the smallest score, as two terms."""
    yield Term(sign, tuple(places), "max")
    yield Term(-sign, tuple(places), "min")


_TWINS = {
    "temperature": {"evaluation"},
    "beta": {"loss"},
    "loss": {"beta"},
    "anchor": {"alpha", "loss", "beta"},
    "role": set(WHAT),
}
"""Fields that cannot stay the same where another one changes."""


def with_twins(fields: set[str]) -> set[str]:
    """These fields, and those that change with them."""
    return fields.union(*(_TWINS.get(name, set()) for name in fields))


def freed(*cells: Cells) -> set[str]:
    """The fields by which some models are told apart, which differ inside a column."""
    return with_twins({name for one in cells for name in one.wanted})


def matching(places: Sequence[Place], cells: Cells) -> list[int]:
    """Indices of the places that are some models."""
    return [n for n, place in enumerate(places) if cells.match(place)]


def levels(places: Sequence[Place], axis: str) -> dict[Any, list[int]]:
    """`levels_of` all cells."""
    return levels_of(places, Cells("", {}), axis)


def levels_of(places: Sequence[Place], cells: Cells, axis: str) -> dict[Any, list[int]]:
    """Value of an axis -> its places, in order; sizes of students are ordered by name."""
    found: dict[Any, list[int]] = {}
    for n in matching(places, cells):
        if places[n].get(axis) is not None:
            found.setdefault(places[n][axis], []).append(n)
    ordered = [one for one in SIZES if one in found] if axis == "student" else sorted(found)
    if axis == "student":
        ordered += [one for one in found if one not in SIZES] if len(found) == 1 else []
    return {value: found[value] for value in ordered}


def same_values(places: Sequence[Place], a: Sequence[int], b: Sequence[int], name: str) -> bool:
    """Spans compare only over the same values."""
    return {places[n].get(name) for n in a} == {places[n].get(name) for n in b}


def level(axis: str, value: Any) -> str:
    """A value of an axis in words."""
    return said(axis, value)
