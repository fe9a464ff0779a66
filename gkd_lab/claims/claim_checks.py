"""Checks: the comparisons that a claim asks for within one column.

A column is all that stays the same in a comparison: task, student, decoding, divergence, ... A check
selects models of a column and builds contrasts: weighted sums of scores that the claim says are above 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from gkd_lab.claims.figure_cells import (
    MODEL_FIELDS,
    STUDENT_SIZES,
    Conditions,
    FigureCell,
    format_distinction,
    format_field,
    meets_conditions,
)


@dataclass(frozen=True)
class ModelSelector:
    """Selects models of a column by the settings that they were made with."""

    name: str
    conditions: Conditions

    def matches(self, figure_cell: FigureCell) -> bool:
        """Return whether a figure cell meets the conditions; only trained cells do, if no role is named."""
        return meets_conditions(figure_cell, {"role": "cell", **self.conditions})


ALL_CELLS = ModelSelector("", {})
SFT_STUDENT = ModelSelector("the SFT student", {"role": "start"})
TEACHER = ModelSelector("the teacher", {"role": "teacher"})


@dataclass(frozen=True)
class WeightedScore:
    """`weight` times the mean, largest or smallest score of some figure cells."""

    weight: float
    cell_indices: tuple[int, ...]
    """Indices into the column's figure cells."""
    reduction: Literal["mean", "max", "min"] = "mean"


@dataclass(frozen=True)
class Contrast:
    """A sum of scores that a claim says is above 0.

    With a denominator the claim says that it is above `factor` times the denominator's sum; without a
    factor the ratio of both sums is measured.
    """

    label: str
    terms: tuple[WeightedScore, ...]
    denominator: tuple[WeightedScore, ...] = ()
    factor: float | None = None


@dataclass(frozen=True)
class ColumnContrasts:
    """The contrasts of one column, and the names of models that the column lacks."""

    contrasts: list[Contrast]
    missing_models: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Check(ABC):
    """One check of a claim, restricted to figure cells that meet `conditions`.

    Fields of its kinds are selectors of models, names of axes, and options.
    """

    conditions: Conditions

    def is_relevant(self, figure_cell: FigureCell) -> bool:
        """Return whether a figure cell meets the check's conditions (quality scores by default)."""
        return meets_conditions(figure_cell, {"measure": "quality", **self.conditions})

    def list_varying_fields(self) -> set[str]:
        """Return fields that may differ in a column: of selectors and axes, and what depends on them."""
        varying: set[str] = set()
        for value in vars(self).values():
            if isinstance(value, str):
                varying.add(value)
            for selector in value if isinstance(value, tuple) else (value,):
                if isinstance(selector, ModelSelector):
                    varying.update(selector.conditions)
        return add_dependent_fields(varying)

    @abstractmethod
    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build one column's contrasts and list the models it lacks; indices are of `figure_cells`."""


@dataclass(frozen=True)
class ScoresHigher(Check):
    """Each `better` model, or with `best_only` the best of them, scores above each `worse` one."""

    better: ModelSelector
    worse: tuple[ModelSelector, ...]
    best_only: bool = False

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build better minus worse for every pair; with `best_only` the best better one only."""
        better = find_matches(figure_cells, self.better)
        if not better:
            return ColumnContrasts([], [self.better.name])
        groups = [tuple(better)] if self.best_only else [(index,) for index in better]
        worse = [(selector, find_matches(figure_cells, selector)) for selector in self.worse]
        contrasts = [
            Contrast(
                _format_contrast_label(figure_cells, group[0], index, selector, is_ambiguous=len(groups) > 1),
                (WeightedScore(1, group, "max"), WeightedScore(-1, (index,))),
            )
            for group in groups
            for selector, indices in worse
            for index in indices
        ]
        return ColumnContrasts(contrasts, _list_missing(worse))


@dataclass(frozen=True)
class Ranking(Check):
    """Each of the models scores above the next one."""

    selectors: tuple[ModelSelector, ...]

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build mean of each model minus mean of the next; pairs that the column lacks are left out."""
        ranked = [(selector, find_matches(figure_cells, selector)) for selector in self.selectors]
        contrasts = [
            Contrast(f"{upper.name} against {lower.name}", _build_difference(upper_indices, lower_indices))
            for (upper, upper_indices), (lower, lower_indices) in pairwise(ranked)
            if upper_indices and lower_indices
        ]
        return ColumnContrasts(contrasts, _list_missing(ranked))


@dataclass(frozen=True)
class MonotoneTrend(Check):
    """Scores rise, or fall, at each step along an axis."""

    axis: str
    is_falling: bool = False

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build mean score at an axis value minus that at the value before; negated if falling."""
        groups = group_by_axis(figure_cells, self.axis)
        sign = -1 if self.is_falling else 1
        contrasts = [
            Contrast(
                _format_step(self.axis, before, after), _build_difference(groups[after], groups[before], sign)
            )
            for before, after in pairwise(groups)
        ]
        return ColumnContrasts(contrasts, _list_missing_values(contrasts, self.axis))


@dataclass(frozen=True)
class ShrinkingSpan(Check):
    """The span of scores over `span_axis` shrinks along an axis, upwards or from its largest value down."""

    axis: str
    span_axis: str
    is_descending: bool = False

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build span at an axis value minus span at the next, if over equal `span_axis` values."""
        groups = group_by_axis(figure_cells, self.axis)
        spans = {value: indices for value, indices in groups.items() if len(indices) > 1}
        order = list(spans)[::-1] if self.is_descending else list(spans)
        contrasts = [
            Contrast(
                _format_step(self.axis, before, after),
                (*build_span_scores(spans[before]), *build_span_scores(spans[after], sign=-1)),
            )
            for before, after in pairwise(order)
            if have_equal_values(figure_cells, spans[before], spans[after], self.span_axis)
        ]
        missing = f"two values of {self.axis} over the same {self.span_axis}s"
        return ColumnContrasts(contrasts, [] if contrasts else [missing])


@dataclass(frozen=True)
class SpanBelowEffect(Check):
    """The span over `span_axis` among the `better` is below better minus worse at each of its values."""

    better: ModelSelector
    worse: ModelSelector
    span_axis: str

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build (better minus worse) minus the better's span, at each value of `span_axis`."""
        better = group_by_axis(figure_cells, self.span_axis, self.better)
        worse = group_by_axis(figure_cells, self.span_axis, self.worse)
        span = build_span_scores([index for indices in better.values() for index in indices], sign=-1)
        contrasts = [
            Contrast(
                f"the effect at {format_field(self.span_axis, value)}",
                (*_build_difference(better[value], worse[value]), *span),
            )
            for value in better
            if value in worse and len(better) > 1
        ]
        missing = _list_missing([(self.better, better), (self.worse, worse)])
        return ColumnContrasts(contrasts, missing or _list_missing_values(contrasts, self.span_axis))


@dataclass(frozen=True)
class GainRatio(Check):
    """The `better` model's gain over its start is `factor` times that of the baselines.

    Gains are averaged over `averaged_axis`. The baselines' gain is their mean, or with `best_only` that of
    the best baseline at each value of the axis.
    """

    better: ModelSelector
    baselines: tuple[ModelSelector, ...]
    factor: float
    averaged_axis: str
    best_only: bool = False
    start: ModelSelector = SFT_STUDENT

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build one contrast: gain over the start against `factor` times the baselines' gain."""
        selectors = (self.better, self.start, *self.baselines)
        groups = [group_by_axis(figure_cells, self.averaged_axis, selector) for selector in selectors]
        better, starts, *baselines = groups
        values = [value for value in better if all(value in group for group in groups)]
        if not values:
            missing = _list_missing(zip(selectors, groups, strict=True))
            return ColumnContrasts([], missing or [f"a common {self.averaged_axis}"])
        share = 1 / len(values)
        start = [WeightedScore(-share, tuple(starts[value])) for value in values]
        gain = [WeightedScore(share, tuple(better[value])) for value in values]
        reduction: Literal["max", "mean"] = "max" if self.best_only else "mean"
        baseline = [
            WeightedScore(share, tuple(index for group in baselines for index in group[value]), reduction)
            for value in values
        ]
        contrast = Contrast(self._format_label(), (*gain, *start), (*baseline, *start), factor=self.factor)
        return ColumnContrasts([contrast])

    def _format_label(self) -> str:
        """Format `said: 2.1`, or `said: 2.1 times ImitKD` where there is one baseline."""
        baseline = f" times {self.baselines[0].name}" if len(self.baselines) == 1 else ""
        return f"said: {self.factor:g}{baseline}"


@dataclass(frozen=True)
class MeasuredDifference(Check):
    """The mean of `first` minus that of `second`, or their ratio: a measurement without a verdict."""

    first: ModelSelector
    second: ModelSelector
    is_ratio: bool = False

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build one contrast: mean of first minus mean of second, or the ratio of both means."""
        selectors = (self.first, self.second)
        first, second = (tuple(find_matches(figure_cells, selector)) for selector in selectors)
        missing = _list_missing([(self.first, first), (self.second, second)])
        if missing:
            return ColumnContrasts([], missing)
        if self.is_ratio:
            ratio = Contrast("ratio", (WeightedScore(1, first),), (WeightedScore(1, second),))
            return ColumnContrasts([ratio])
        return ColumnContrasts([Contrast("difference", _build_difference(first, second))])


@dataclass(frozen=True)
class DifferenceOfChanges(Check):
    """The change of `first` minus that of `second` between an axis's two largest values; no verdict."""

    first: ModelSelector
    second: ModelSelector
    axis: str

    def build_contrasts(self, figure_cells: Sequence[FigureCell]) -> ColumnContrasts:
        """Build one contrast: change of first minus that of second, last two axis values."""
        first = group_by_axis(figure_cells, self.axis, self.first)
        second = group_by_axis(figure_cells, self.axis, self.second)
        values = [value for value in first if value in second]
        if len(values) < 2:
            missing = _list_missing([(self.first, first), (self.second, second)])
            return ColumnContrasts([], missing or [f"two values of {self.axis}"])
        before, after = values[-2:]
        changes = (
            *_build_difference(first[after], first[before]),
            *_build_difference(second[after], second[before], sign=-1),
        )
        return ColumnContrasts([Contrast("change", changes)])


# ---- fields that vary, groups along an axis ----

_DEPENDENT_FIELDS = {
    "temperature": {"evaluation"},
    "beta": {"loss"},
    "loss": {"beta"},
    "anchor": {"alpha", "loss", "beta"},
    "role": set(MODEL_FIELDS),
}
"""Field -> fields that cannot stay the same where it changes."""


def add_dependent_fields(fields: set[str]) -> set[str]:
    """Return a set of the fields and those that change with them, such as beta with loss."""
    return fields.union(*(_DEPENDENT_FIELDS.get(name, set()) for name in fields))


def find_matches(figure_cells: Sequence[FigureCell], selector: ModelSelector) -> list[int]:
    """Return the indices of the figure cells that a selector matches, in order."""
    return [index for index, cell in enumerate(figure_cells) if selector.matches(cell)]


def group_by_axis(
    figure_cells: Sequence[FigureCell], axis: str, selector: ModelSelector = ALL_CELLS
) -> dict[Any, list[int]]:
    """Map each value of an axis, sorted, to the indices of the selected figure cells that have it."""
    groups: dict[Any, list[int]] = {}
    for index in find_matches(figure_cells, selector):
        if figure_cells[index].get(axis) is not None:
            groups.setdefault(figure_cells[index][axis], []).append(index)
    return {value: groups[value] for value in _sort_axis_values(axis, groups)}


def _sort_axis_values(axis: str, values: Collection[Any]) -> list[Any]:
    """Sort values; students small to large, where an unknown size is dropped unless it is alone."""
    if axis != "student":
        return sorted(values)
    return [size for size in STUDENT_SIZES if size in values] if len(values) > 1 else list(values)


def have_equal_values(
    figure_cells: Sequence[FigureCell], first: Sequence[int], second: Sequence[int], field_name: str
) -> bool:
    """Return whether two groups of indices have the same set of values of a field."""
    values = [{figure_cells[index].get(field_name) for index in indices} for indices in (first, second)]
    return values[0] == values[1]


# ---- parts of contrasts ----


def build_span_scores(cell_indices: Sequence[int], sign: int = 1) -> tuple[WeightedScore, WeightedScore]:
    """Build two terms that sum to largest minus smallest score, times `sign`."""
    indices = tuple(cell_indices)
    return WeightedScore(sign, indices, "max"), WeightedScore(-sign, indices, "min")


def _build_difference(
    upper: Sequence[int], lower: Sequence[int], sign: int = 1
) -> tuple[WeightedScore, WeightedScore]:
    """Build two terms that sum to mean of upper minus mean of lower, times `sign`; given by index."""
    return WeightedScore(sign, tuple(upper)), WeightedScore(-sign, tuple(lower))


def _list_missing(matches: Iterable[tuple[ModelSelector, Collection[Any]]]) -> list[str]:
    """Return the names of the selectors that matched nothing."""
    return [selector.name for selector, matched in matches if not matched]


def _list_missing_values(contrasts: Sequence[Contrast], axis: str) -> list[str]:
    """Return `["two values of <axis>"]` if there are no contrasts, else an empty list."""
    return [] if contrasts else [f"two values of {axis}"]


def _format_step(axis: str, before: Any, after: Any) -> str:
    """Format two values of an axis: `from forward KL to JSD(0.1)`."""
    return f"from {format_field(axis, before)} to {format_field(axis, after)}"


def _format_contrast_label(
    figure_cells: Sequence[FigureCell],
    better: int,
    worse: int,
    selector: ModelSelector,
    *,
    is_ambiguous: bool,
) -> str:
    """Format `against ImitKD`; if ambiguous, `<fields of the better cell> against ImitKD`."""
    label = f"against {selector.name}"
    if not is_ambiguous:
        return label
    return f"{format_distinction(figure_cells[better], figure_cells[worse])} {label}"
