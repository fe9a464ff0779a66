"""What a check is: it picks models of a column of places and turns them into comparisons.

A column is what stays the same in a comparison: a task, a student, a decoding, a divergence, ... A
comparison is a weighted sum of scores that the claim says is above 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gkd_lab.claims.facts import MODEL_FIELDS, STUDENT_SIZES, FigureCell
from gkd_lab.claims.place_names import format_field

Conditions = Mapping[str, Any]
"""Field of a place -> the value, a tuple of values, or a condition that it must meet."""


@dataclass(frozen=True)
class ModelSelector:
    """Some models of a column, by what they were made with."""

    name: str
    conditions: Conditions

    def matches(self, place: FigureCell) -> bool:
        """Whether a place is one of them; cells are meant unless a role is named."""
        return meets_conditions(place, {"role": "cell", **self.conditions})


@dataclass(frozen=True)
class WeightedScore:
    """`weight` times the mean, largest or smallest score of some places."""

    weight: float
    cell_indices: tuple[int, ...]
    """Indices into the column's places."""
    reduction: Literal["mean", "max", "min"] = "mean"


@dataclass(frozen=True)
class Contrast:
    """Terms whose sum a claim says is above 0; with `over`, above `factor` times the sum of those.

    With `over` and no factor it is their ratio, to be measured.
    """

    label: str
    terms: tuple[WeightedScore, ...]
    denominator: tuple[WeightedScore, ...] = ()
    factor: float | None = None


@dataclass(frozen=True)
class ColumnContrasts:
    """The comparisons of a column, and which of the asked for models are not in it."""

    contrasts: list[Contrast]
    missing_models: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Check(ABC):
    """`where` limits the places; quality is meant unless a measure is named."""

    conditions: Conditions

    def is_relevant(self, figure_cell: FigureCell) -> bool:
        """Whether the check speaks of a place."""
        return meets_conditions(figure_cell, {"measure": "quality", **self.conditions})

    @abstractmethod
    def list_varying_fields(self) -> set[str]:
        """Fields that differ inside a column."""

    @abstractmethod
    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        """The comparisons of one column."""


SFT_STUDENT = ModelSelector("the SFT student", {"role": "start"})
TEACHER = ModelSelector("the teacher", {"role": "teacher"})


def meets_conditions(figure_cell: FigureCell, conditions: Conditions) -> bool:
    """Whether each field that is asked for has the value, one of the values, or meets the condition."""
    return all(_meets_condition(figure_cell.get(name), value) for name, value in conditions.items())


def _meets_condition(value: Any, condition: Any) -> bool:
    if isinstance(condition, tuple):
        return any(_meets_condition(value, one) for one in condition)
    if callable(condition):
        return value is not None and bool(condition(value))
    if isinstance(condition, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(value, condition, rel_tol=1e-3, abs_tol=1e-9)
    return bool(value == condition)


def require_minimum(bound: float) -> Callable[[float], bool]:
    """A condition on a field."""
    return lambda value: value >= bound


def require_other(name: str) -> Callable[[str], bool]:
    """A condition on a field."""
    return lambda value: value != name


def build_span_scores(places: Sequence[int], sign: int = 1) -> Iterator[WeightedScore]:
    """The largest minus the smallest score, as two terms."""
    yield WeightedScore(sign, tuple(places), "max")
    yield WeightedScore(-sign, tuple(places), "min")


_DEPENDENT_FIELDS = {
    "temperature": {"evaluation"},
    "beta": {"loss"},
    "loss": {"beta"},
    "anchor": {"alpha", "loss", "beta"},
    "role": set(MODEL_FIELDS),
}
"""Fields that cannot stay the same where another one changes."""


def add_dependent_fields(fields: set[str]) -> set[str]:
    """These fields, and those that change with them."""
    return fields.union(*(_DEPENDENT_FIELDS.get(name, set()) for name in fields))


def collect_varying_fields(*selectors: ModelSelector) -> set[str]:
    """The fields by which some models are told apart, which differ inside a column."""
    return add_dependent_fields({name for one in selectors for name in one.conditions})


def find_matches(places: Sequence[FigureCell], selector: ModelSelector) -> list[int]:
    """Indices of the places that are some models."""
    return [n for n, place in enumerate(places) if selector.matches(place)]


def group_by_axis(places: Sequence[FigureCell], axis: str) -> dict[Any, list[int]]:
    """`levels_of` all cells."""
    return group_matches_by_axis(places, ModelSelector("", {}), axis)


def group_matches_by_axis(
    places: Sequence[FigureCell], selector: ModelSelector, axis: str
) -> dict[Any, list[int]]:
    """Value of an axis -> its places, in order; sizes of students are ordered by name."""
    found: dict[Any, list[int]] = {}
    for n in find_matches(places, selector):
        if places[n].get(axis) is not None:
            found.setdefault(places[n][axis], []).append(n)
    ordered = [one for one in STUDENT_SIZES if one in found] if axis == "student" else sorted(found)
    if axis == "student":
        ordered += [one for one in found if one not in STUDENT_SIZES] if len(found) == 1 else []
    return {value: found[value] for value in ordered}


def have_equal_values(
    places: Sequence[FigureCell], a: Sequence[int], b: Sequence[int], field_name: str
) -> bool:
    """Spans compare only over the same values."""
    return {places[n].get(field_name) for n in a} == {places[n].get(field_name) for n in b}


def format_axis_value(axis: str, value: Any) -> str:
    """A value of an axis in words."""
    return format_field(axis, value)
