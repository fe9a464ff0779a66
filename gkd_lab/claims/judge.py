"""Verdicts: a claim, the facts that it speaks of, and how sure each column of them is.

Per column the interval decides; the paper's own numbers, which have none, are decided by their sign, and
what lies within the error of reading is a tie. Over columns: one that fails makes the claim fail.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gkd_lab.claims.checks import Check, Comparison, Term
from gkd_lab.claims.columns import Column, Judged, Outcome, counted, told
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.facts import FACTORS, Fact, Place, of_paper
from gkd_lab.claims.missing import lacking, not_there, why_not
from gkd_lab.statistics.bootstrap import Array, middle
from gkd_lab.statistics.effects import over_seeds

Verdict = Literal["holds", "fails", "undecided"]
Drawn = Callable[[Fact], Array | None]
"""Scores of a fact's model on resampled examples, (R,), the same examples for all; None: not kept."""


@dataclass(frozen=True)
class Finding:
    """A claim's verdict over all of its columns."""

    claim: Claim
    verdict: Verdict
    effect: float | None
    """Mean over columns of the least comparison, in points; of C26 a ratio."""
    low: float | None
    high: float | None
    n: int
    """Columns that were judged."""
    detail: str
    columns: list[Column] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether there was anything to judge it on."""
        return self.n > 0


def judge_paper(claims: Iterable[Claim]) -> list[Finding]:
    """Verdicts on the paper's own numbers."""
    return [_judge(claim, of_paper(claim.figures), None, exact=True) for claim in claims]


def judge(claims: Iterable[Claim], facts: Sequence[Fact], drawn: Drawn = lambda fact: None) -> list[Finding]:
    """Verdicts on a table's facts: over seeds where there are two or more, else over examples."""
    return [_judge(claim, facts, drawn, exact=False) for claim in claims]


def _judge(claim: Claim, facts: Sequence[Fact], drawn: Drawn | None, *, exact: bool) -> Finding:
    if exact and not claim.figures:
        return Finding(
            claim, "undecided", None, None, None, 0, why_not(["the paper prints no number of it"], [])
        )
    columns, why = _columns(claim.checks, facts, drawn, exact)
    judged = [column for column in columns if column.comparisons]
    absent = list(dict.fromkeys(name for column in judged for name in column.absent))
    undone = [place for column in columns for place in column.undone]
    detail = (
        [told(judged, claim.measured), *not_there(absent, why, undone)] if judged else [why_not(why, undone)]
    )
    for label, checks in claim.also if judged else ():
        besides = [one for one in _columns(checks, facts, drawn, exact)[0] if one.comparisons]
        detail += [f"besides, {label}: {counted(besides)}"] if besides else []
    return Finding(claim, _verdict(claim, judged), *_overall(judged), len(judged), "; ".join(detail), judged)


def _verdict(claim: Claim, columns: Sequence[Column]) -> Verdict:
    outcomes = {column.outcome for column in columns}
    if claim.measured or not columns:
        return "undecided"
    if "fails" in outcomes:
        return "fails"
    return "undecided" if "undecided" in outcomes else "holds"


# ---- columns ----


def _columns(
    checks: Iterable[Check], facts: Sequence[Fact], drawn: Drawn | None, exact: bool
) -> tuple[list[Column], list[str]]:
    """The columns of all checks, and why there are none of some."""
    columns: list[Column] = []
    why: list[str] = []
    for check in checks:
        found = [_column(check, place, group, drawn, exact) for place, group in _grouped(check, facts)]
        columns += found
        if not found:
            why.append(lacking(check, facts))
        elif not any(one.comparisons or one.undone for one in found):
            fewest = min(found, key=lambda one: len(one.absent))
            why.append(f"no {' and no '.join(fewest.absent)}" if fewest.absent else "no seed in common")
    return columns, list(dict.fromkeys(why))


Group = dict[tuple[Any, ...], list[Fact]]
"""Place inside the column -> its facts, one a seed."""


def _grouped(check: Check, facts: Sequence[Fact]) -> list[tuple[Place, Group]]:
    free = check.free()
    kept = [name for name in FACTORS if name not in free]
    found: dict[tuple[Any, ...], Group] = {}
    for fact in facts:
        if check.selects(fact.place) and ("role" in free or fact.place["role"] == "cell"):
            column = found.setdefault(tuple(fact.place.get(name) for name in kept), {})
            column.setdefault(tuple(fact.place.get(name) for name in FACTORS), []).append(fact)
    return [(dict(zip(kept, key, strict=True)), group) for key, group in found.items()]


def _column(check: Check, place: Place, group: Group, drawn: Drawn | None, exact: bool) -> Column:
    """Judged on the places that have a score; what is asked for besides is named."""
    everywhere = list(group.values())
    planned = check.find([facts[0].place for facts in everywhere])
    done = [facts for facts in everywhere if any(fact.value is not None for fact in facts)]
    found = check.find([facts[0].place for facts in done]).comparisons
    judged = [one for each in found if (one := _compared(each, done, drawn, exact)) is not None]
    needed = {n for one in planned.comparisons for t in (*one.terms, *one.over) for n in t.places}
    undone = [everywhere[n][0].place for n in sorted(needed) if everywhere[n] not in done]
    return Column(place, judged, planned.absent, undone)


# ---- comparisons ----


def _compared(
    comparison: Comparison, done: Sequence[Sequence[Fact]], drawn: Drawn | None, exact: bool
) -> Judged | None:
    used = {n for term in (*comparison.terms, *comparison.over) for n in term.places}
    by_place = {n: {f.seed: f for f in done[n] if f.value is not None} for n in used}
    seeds = sorted(set.intersection(*(set(found) for found in by_place.values())))
    if not seeds:
        return None
    by_seed, ratios = {}, []
    for seed in seeds:
        scores = {n: np.array([found[seed].value]) for n, found in by_place.items()}
        by_seed[seed] = float(_value(comparison, scores)[0])
        if comparison.over:
            ratios.append(_ratio(comparison, scores))
    effect = float(np.mean(list(by_seed.values())))
    ratio = float(np.mean(ratios)) if comparison.over else None
    if exact:
        outcome = _by_sign(effect, _tolerance(comparison, by_place))
        return Judged(comparison.label, outcome, effect, None, None, by_seed, None, ratio)
    low, high, resampled = _interval(comparison, by_place, by_seed, drawn)
    return Judged(comparison.label, _by_interval(low, high), effect, low, high, by_seed, resampled, ratio)


def _interval(
    comparison: Comparison,
    by_place: Mapping[int, Mapping[int, Fact]],
    by_seed: Mapping[int, float],
    drawn: Drawn | None,
) -> tuple[float | None, float | None, Array | None]:
    if len(by_seed) >= 2:
        effect = over_seeds(list(by_seed.values()), len(by_seed))
        return effect.low, effect.high, None
    (seed,) = by_seed
    found = {n: drawn(facts[seed]) if drawn else None for n, facts in by_place.items()}
    scores = {n: one for n, one in found.items() if one is not None}
    if len(scores) < len(found) or len({len(one) for one in scores.values()}) > 1:
        return None, None, None
    resampled = _value(comparison, scores)
    return *middle(resampled), resampled


def _value(comparison: Comparison, scores: Mapping[int, Array]) -> Array:
    above = _sum(comparison.terms, scores)
    if not comparison.over:
        return above
    below = _sum(comparison.over, scores)
    if comparison.factor is not None:
        return above - comparison.factor * below
    ratio: Array = above / below
    return ratio


def _ratio(comparison: Comparison, scores: Mapping[int, Array]) -> float:
    below = float(_sum(comparison.over, scores)[0])
    return float(_sum(comparison.terms, scores)[0]) / below if below else float("nan")


_REDUCE: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}


def _sum(terms: Iterable[Term], scores: Mapping[int, Array]) -> Array:
    parts = [t.weight * _REDUCE[t.reduce](np.stack([scores[n] for n in t.places]), axis=0) for t in terms]
    total: Array = np.sum(parts, axis=0)
    return total


def _tolerance(comparison: Comparison, by_place: Mapping[int, Mapping[int, Fact]]) -> float:
    """The most by which errors of reading may move the sum; a mean or an extreme moves as its parts."""

    def error(terms: Iterable[Term]) -> float:
        return sum(
            abs(t.weight) * max(fact.error for n in t.places for fact in by_place[n].values()) for t in terms
        )

    return error(comparison.terms) + abs(comparison.factor or 0.0) * error(comparison.over)


def _by_sign(effect: float, tolerance: float) -> Outcome:
    """Rounding cannot turn the order of two printed numbers, so a difference as large as it is no tie."""
    if abs(effect) < max(tolerance - 1e-9, 1e-9):
        return "tie"
    return "holds" if effect > 0 else "fails"


def _by_interval(low: float | None, high: float | None) -> Outcome:
    if low is None or high is None:
        return "undecided"
    if low > 0:
        return "holds"
    return "fails" if high < 0 else "undecided"


def _overall(columns: Sequence[Column]) -> tuple[float | None, float | None, float | None]:
    """Mean over columns, with the interval of that mean where seeds or examples give one."""
    if not columns:
        return None, None, None
    least = [column.least for column in columns]
    effect = float(np.mean([one.effect for one in least]))
    if len(least) == 1:
        return effect, least[0].low, least[0].high
    seeds = sorted(set.intersection(*(set(one.by_seed) for one in least)))
    if any(one.low is None for one in least):
        return effect, None, None
    if len(seeds) >= 2:
        found = over_seeds([float(np.mean([one.by_seed[s] for one in least])) for s in seeds], len(seeds))
        return effect, found.low, found.high
    drawn = [one.resampled for one in least if one.resampled is not None]
    if len(drawn) < len(least):
        return effect, None, None
    return effect, *middle(np.mean(drawn, axis=0))
