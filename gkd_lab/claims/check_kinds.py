"""The kinds of check that claims are made of: one above another, an order, a trend, a span, a ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from gkd_lab.claims.checks import (
    SFT_STUDENT,
    Check,
    ColumnContrasts,
    Contrast,
    ModelSelector,
    WeightedScore,
    add_dependent_fields,
    build_span_scores,
    collect_varying_fields,
    find_matches,
    format_axis_value,
    group_by_axis,
    group_matches_by_axis,
    have_equal_values,
)
from gkd_lab.claims.facts import FigureCell
from gkd_lab.claims.place_names import format_distinction


@dataclass(frozen=True)
class ScoresHigher(Check):
    """Each of `a`, or with `best` the best of them, above each of `b`."""

    better: ModelSelector
    worse: tuple[ModelSelector, ...]
    best_only: bool = False

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(self.better, *self.worse)

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        upper = find_matches(places, self.better)
        if not upper:
            return ColumnContrasts([], [self.better.name])
        lower = [(cells, find_matches(places, cells)) for cells in self.worse]
        groups = [tuple(upper)] if self.best_only else [(n,) for n in upper]
        comparisons = [
            Contrast(
                _format_contrast_label(places, group[0], n, cells, len(groups) > 1),
                (WeightedScore(1, group, "max"), WeightedScore(-1, (n,))),
            )
            for group in groups
            for cells, found in lower
            for n in found
        ]
        return ColumnContrasts(comparisons, [cells.name for cells, found in lower if not found])


@dataclass(frozen=True)
class Ranking(Check):
    """Each of `cells` above the next one."""

    selectors: tuple[ModelSelector, ...]

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(*self.selectors)

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        found = [find_matches(places, cells) for cells in self.selectors]
        comparisons = [
            Contrast(
                f"{a.name} against {b.name}",
                (WeightedScore(1, tuple(above)), WeightedScore(-1, tuple(below))),
            )
            for (a, b), (above, below) in zip(pairwise(self.selectors), pairwise(found), strict=True)
            if above and below
        ]
        return ColumnContrasts(
            comparisons, [c.name for c, there in zip(self.selectors, found, strict=True) if not there]
        )


@dataclass(frozen=True)
class MonotoneTrend(Check):
    """Scores rise (or fall) along an axis, step by step."""

    axis: str
    is_falling: bool = False

    def list_varying_fields(self) -> set[str]:
        return add_dependent_fields({self.axis})

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        found = group_by_axis(places, self.axis)
        sign = -1 if self.is_falling else 1
        comparisons = [
            Contrast(
                f"from {format_axis_value(self.axis, a)} to {format_axis_value(self.axis, b)}",
                (WeightedScore(sign, tuple(found[b])), WeightedScore(-sign, tuple(found[a]))),
            )
            for a, b in pairwise(found)
        ]
        return ColumnContrasts(comparisons, [] if comparisons else [f"two values of {self.axis}"])


@dataclass(frozen=True)
class ShrinkingSpan(Check):
    """The span over `over` shrinks along an axis: upwards, or `downwards` from its largest value."""

    axis: str
    span_axis: str
    is_descending: bool = False

    def list_varying_fields(self) -> set[str]:
        return add_dependent_fields({self.axis, self.span_axis})

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        spans = {name: one for name, one in group_by_axis(places, self.axis).items() if len(one) > 1}
        order = list(spans)[::-1] if self.is_descending else list(spans)
        comparisons = [
            Contrast(
                f"from {format_axis_value(self.axis, a)} to {format_axis_value(self.axis, b)}",
                (*build_span_scores(spans[a]), *build_span_scores(spans[b], -1)),
            )
            for a, b in pairwise(order)
            if have_equal_values(places, spans[a], spans[b], self.span_axis)
        ]
        return ColumnContrasts(
            comparisons, [] if comparisons else [f"two values of {self.axis} over the same {self.span_axis}s"]
        )


@dataclass(frozen=True)
class SpanBelowEffect(Check):
    """The span over `over` among `a` is smaller than a minus b at each value of `over`."""

    better: ModelSelector
    worse: ModelSelector
    span_axis: str

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(self.better, self.worse) | add_dependent_fields({self.span_axis})

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        upper, lower = (
            group_matches_by_axis(places, cells, self.span_axis) for cells in (self.better, self.worse)
        )
        every = [n for found in upper.values() for n in found]
        comparisons = [
            Contrast(
                f"the effect at {format_axis_value(self.span_axis, value)}",
                (
                    WeightedScore(1, tuple(upper[value])),
                    WeightedScore(-1, tuple(lower[value])),
                    *build_span_scores(every, -1),
                ),
            )
            for value in upper
            if value in lower and len(upper) > 1
        ]
        absent = [c.name for c, found in ((self.better, upper), (self.worse, lower)) if not found]
        return ColumnContrasts(
            comparisons, absent or ([] if comparisons else [f"two values of {self.span_axis}"])
        )


@dataclass(frozen=True)
class GainRatio(Check):
    """The gain of `a` over the start, summed over `over`, is `factor` times that of `b`.

    `b` is the mean of the baselines, or with `best` the best one at each value of `over`.
    """

    better: ModelSelector
    baselines: tuple[ModelSelector, ...]
    factor: float
    averaged_axis: str
    best_only: bool = False

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(self.better, SFT_STUDENT, *self.baselines) | add_dependent_fields(
            {self.averaged_axis}
        )

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        ours, starts = (
            group_matches_by_axis(places, cells, self.averaged_axis) for cells in (self.better, SFT_STUDENT)
        )
        theirs = [group_matches_by_axis(places, cells, self.averaged_axis) for cells in self.baselines]
        at = [one for one in ours if one in starts and all(one in other for other in theirs)]
        pools = ((self.better, ours), (SFT_STUDENT, starts), *zip(self.baselines, theirs, strict=True))
        if not at:
            return ColumnContrasts(
                [], [cells.name for cells, found in pools if not found] or [f"a common {self.averaged_axis}"]
            )
        share = 1 / len(at)
        initial = [WeightedScore(-share, tuple(starts[one])) for one in at]
        gain = [WeightedScore(share, tuple(ours[one])) for one in at]
        kind: Literal["max", "mean"] = "max" if self.best_only else "mean"
        other = [WeightedScore(share, tuple(n for by in theirs for n in by[one]), kind) for one in at]
        sums = (*gain, *initial), (*other, *initial)
        return ColumnContrasts([Contrast(self._format_label(), *sums, factor=self.factor)])

    def _format_label(self) -> str:
        of_one = f" times {self.baselines[0].name}" if len(self.baselines) == 1 else ""
        return f"said: {self.factor:g}{of_one}"


@dataclass(frozen=True)
class MeasuredDifference(Check):
    """How far `a` is above `b`, or how many times `b` it is; no verdict."""

    first: ModelSelector
    second: ModelSelector
    is_ratio: bool = False

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(self.first, self.second)

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        upper, lower = (tuple(find_matches(places, cells)) for cells in (self.first, self.second))
        absent = [c.name for c, found in ((self.first, upper), (self.second, lower)) if not found]
        if absent:
            return ColumnContrasts([], absent)
        if self.is_ratio:
            return ColumnContrasts(
                [Contrast("ratio", (WeightedScore(1, upper),), (WeightedScore(1, lower),))]
            )
        return ColumnContrasts([Contrast("difference", (WeightedScore(1, upper), WeightedScore(-1, lower)))])


@dataclass(frozen=True)
class DifferenceOfChanges(Check):
    """How much more `a` changes than `b` between the two largest values of an axis; no verdict."""

    first: ModelSelector
    second: ModelSelector
    axis: str

    def list_varying_fields(self) -> set[str]:
        return collect_varying_fields(self.first, self.second) | add_dependent_fields({self.axis})

    def build_contrasts(self, places: Sequence[FigureCell]) -> ColumnContrasts:
        upper, lower = (
            group_matches_by_axis(places, cells, self.axis) for cells in (self.first, self.second)
        )
        at = [one for one in upper if one in lower]
        absent = [c.name for c, found in ((self.first, upper), (self.second, lower)) if not found]
        if len(at) < 2:
            return ColumnContrasts([], absent or [f"two values of {self.axis}"])
        signs = ((1, upper[at[-1]]), (-1, upper[at[-2]]), (-1, lower[at[-1]]), (1, lower[at[-2]]))
        return ColumnContrasts(
            [Contrast("change", tuple(WeightedScore(sign, tuple(found)) for sign, found in signs))]
        )


def _format_contrast_label(
    places: Sequence[FigureCell], one: int, other: int, cells: ModelSelector, is_ambiguous: bool
) -> str:
    against = f"against {cells.name}"
    return f"{format_distinction(places[one], places[other])} {against}" if is_ambiguous else against
