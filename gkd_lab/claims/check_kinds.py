"""The kinds of check that claims are made of: one above another, an order, a trend, a span, a ratio."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from gkd_lab.claims.checks import (
    START,
    Cells,
    Check,
    Comparison,
    Found,
    Term,
    freed,
    level,
    levels,
    levels_of,
    matching,
    same_values,
    span,
    with_twins,
)
from gkd_lab.claims.facts import Place
from gkd_lab.claims.place_names import apart


@dataclass(frozen=True)
class Above(Check):
    """Each of `a`, or with `best` the best of them, above each of `b`."""

    a: Cells
    b: tuple[Cells, ...]
    best: bool = False

    def free(self) -> set[str]:
        return freed(self.a, *self.b)

    def find(self, places: Sequence[Place]) -> Found:
        upper = matching(places, self.a)
        if not upper:
            return Found([], [self.a.name])
        lower = [(cells, matching(places, cells)) for cells in self.b]
        groups = [tuple(upper)] if self.best else [(n,) for n in upper]
        comparisons = [
            Comparison(
                _versus(places, group[0], n, cells, len(groups) > 1), (Term(1, group, "max"), Term(-1, (n,)))
            )
            for group in groups
            for cells, found in lower
            for n in found
        ]
        return Found(comparisons, [cells.name for cells, found in lower if not found])


@dataclass(frozen=True)
class Order(Check):
    """Each of `cells` above the next one."""

    cells: tuple[Cells, ...]

    def free(self) -> set[str]:
        return freed(*self.cells)

    def find(self, places: Sequence[Place]) -> Found:
        found = [matching(places, cells) for cells in self.cells]
        comparisons = [
            Comparison(f"{a.name} against {b.name}", (Term(1, tuple(above)), Term(-1, tuple(below))))
            for (a, b), (above, below) in zip(pairwise(self.cells), pairwise(found), strict=True)
            if above and below
        ]
        return Found(comparisons, [c.name for c, there in zip(self.cells, found, strict=True) if not there])


@dataclass(frozen=True)
class Monotone(Check):
    """Scores rise (or fall) along an axis, step by step."""

    axis: str
    falling: bool = False

    def free(self) -> set[str]:
        return with_twins({self.axis})

    def find(self, places: Sequence[Place]) -> Found:
        found = levels(places, self.axis)
        sign = -1 if self.falling else 1
        comparisons = [
            Comparison(
                f"from {level(self.axis, a)} to {level(self.axis, b)}",
                (Term(sign, tuple(found[b])), Term(-sign, tuple(found[a]))),
            )
            for a, b in pairwise(found)
        ]
        return Found(comparisons, [] if comparisons else [f"two values of {self.axis}"])


@dataclass(frozen=True)
class Narrowing(Check):
    """The span over `over` shrinks along an axis: upwards, or `downwards` from its largest value."""

    axis: str
    over: str
    downwards: bool = False

    def free(self) -> set[str]:
        return with_twins({self.axis, self.over})

    def find(self, places: Sequence[Place]) -> Found:
        spans = {name: one for name, one in levels(places, self.axis).items() if len(one) > 1}
        order = list(spans)[::-1] if self.downwards else list(spans)
        comparisons = [
            Comparison(
                f"from {level(self.axis, a)} to {level(self.axis, b)}",
                (*span(spans[a]), *span(spans[b], -1)),
            )
            for a, b in pairwise(order)
            if same_values(places, spans[a], spans[b], self.over)
        ]
        return Found(
            comparisons, [] if comparisons else [f"two values of {self.axis} over the same {self.over}s"]
        )


@dataclass(frozen=True)
class SpanBelowEffect(Check):
    """The span over `over` among `a` is smaller than a minus b at each value of `over`."""

    a: Cells
    b: Cells
    over: str

    def free(self) -> set[str]:
        return freed(self.a, self.b) | with_twins({self.over})

    def find(self, places: Sequence[Place]) -> Found:
        upper, lower = (levels_of(places, cells, self.over) for cells in (self.a, self.b))
        every = [n for found in upper.values() for n in found]
        comparisons = [
            Comparison(
                f"the effect at {level(self.over, value)}",
                (Term(1, tuple(upper[value])), Term(-1, tuple(lower[value])), *span(every, -1)),
            )
            for value in upper
            if value in lower and len(upper) > 1
        ]
        absent = [c.name for c, found in ((self.a, upper), (self.b, lower)) if not found]
        return Found(comparisons, absent or ([] if comparisons else [f"two values of {self.over}"]))


@dataclass(frozen=True)
class GainTimes(Check):
    """The gain of `a` over the start, summed over `over`, is `factor` times that of `b`.

    `b` is the mean of the baselines, or with `best` the best one at each value of `over`.
    """

    a: Cells
    b: tuple[Cells, ...]
    factor: float
    over: str
    best: bool = False

    def free(self) -> set[str]:
        return freed(self.a, START, *self.b) | with_twins({self.over})

    def find(self, places: Sequence[Place]) -> Found:
        ours, starts = (levels_of(places, cells, self.over) for cells in (self.a, START))
        theirs = [levels_of(places, cells, self.over) for cells in self.b]
        at = [one for one in ours if one in starts and all(one in other for other in theirs)]
        pools = ((self.a, ours), (START, starts), *zip(self.b, theirs, strict=True))
        if not at:
            return Found([], [cells.name for cells, found in pools if not found] or [f"a common {self.over}"])
        share = 1 / len(at)
        initial = [Term(-share, tuple(starts[one])) for one in at]
        gain = [Term(share, tuple(ours[one])) for one in at]
        kind: Literal["max", "mean"] = "max" if self.best else "mean"
        other = [Term(share, tuple(n for by in theirs for n in by[one]), kind) for one in at]
        sums = (*gain, *initial), (*other, *initial)
        return Found([Comparison(self._label(), *sums, factor=self.factor)])

    def _label(self) -> str:
        of_one = f" times {self.b[0].name}" if len(self.b) == 1 else ""
        return f"said: {self.factor:g}{of_one}"


@dataclass(frozen=True)
class Measured(Check):
    """How far `a` is above `b`, or how many times `b` it is; no verdict."""

    a: Cells
    b: Cells
    ratio: bool = False

    def free(self) -> set[str]:
        return freed(self.a, self.b)

    def find(self, places: Sequence[Place]) -> Found:
        upper, lower = (tuple(matching(places, cells)) for cells in (self.a, self.b))
        absent = [c.name for c, found in ((self.a, upper), (self.b, lower)) if not found]
        if absent:
            return Found([], absent)
        if self.ratio:
            return Found([Comparison("ratio", (Term(1, upper),), (Term(1, lower),))])
        return Found([Comparison("difference", (Term(1, upper), Term(-1, lower)))])


@dataclass(frozen=True)
class ChangeAlong(Check):
    """How much more `a` changes than `b` between the two largest values of an axis; no verdict."""

    a: Cells
    b: Cells
    axis: str

    def free(self) -> set[str]:
        return freed(self.a, self.b) | with_twins({self.axis})

    def find(self, places: Sequence[Place]) -> Found:
        upper, lower = (levels_of(places, cells, self.axis) for cells in (self.a, self.b))
        at = [one for one in upper if one in lower]
        absent = [c.name for c, found in ((self.a, upper), (self.b, lower)) if not found]
        if len(at) < 2:
            return Found([], absent or [f"two values of {self.axis}"])
        signs = ((1, upper[at[-1]]), (-1, upper[at[-2]]), (-1, lower[at[-1]]), (1, lower[at[-2]]))
        return Found([Comparison("change", tuple(Term(sign, tuple(found)) for sign, found in signs))])


def _versus(places: Sequence[Place], one: int, other: int, cells: Cells, several: bool) -> str:
    against = f"against {cells.name}"
    return f"{apart(places[one], places[other])} {against}" if several else against
