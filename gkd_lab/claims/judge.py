"""Verdicts: a claim, the facts that it speaks of, and how sure each column of them is.

Per column the interval decides; the paper's own numbers, which have none, are decided by their sign, and
what lies within the error of reading is a tie. Over columns: one that fails makes the claim fail.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gkd_lab.claims.checks import Check, Contrast, WeightedScore
from gkd_lab.claims.columns import Column, ContrastOutcome, JudgedContrast, format_columns, format_counts
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.facts import FIGURE_CELL_FIELDS, FigureCell, Measurement, load_paper_measurements
from gkd_lab.claims.missing import explain_missing_data, format_unjudged, list_gaps
from gkd_lab.statistics.bootstrap import Array, compute_percentile_interval
from gkd_lab.statistics.effects import estimate_seed_effect

Verdict = Literal["holds", "fails", "undecided"]
ResampleLookup = Callable[[Measurement], Array | None]
"""Scores of a fact's model on resampled examples, (R,), the same examples for all; None: not kept."""


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's verdict over all of its columns."""

    claim: Claim
    verdict: Verdict
    effect: float | None
    """Mean over columns of the least comparison, in points; of C26 a ratio."""
    low: float | None
    high: float | None
    column_count: int
    """Columns that were judged."""
    detail: str
    columns: list[Column] = field(default_factory=list)

    @property
    def is_judged(self) -> bool:
        """Whether there was anything to judge it on."""
        return self.column_count > 0


def judge_paper(claims: Iterable[Claim]) -> list[ClaimVerdict]:
    """Verdicts on the paper's own numbers."""
    return [
        _judge_claim(claim, load_paper_measurements(claim.figures), None, is_paper=True) for claim in claims
    ]


def judge(
    claims: Iterable[Claim], measurements: Sequence[Measurement], resample: ResampleLookup = lambda fact: None
) -> list[ClaimVerdict]:
    """Verdicts on a table's facts: over seeds where there are two or more, else over examples."""
    return [_judge_claim(claim, measurements, resample, is_paper=False) for claim in claims]


def _judge_claim(
    claim: Claim, measurements: Sequence[Measurement], resample: ResampleLookup | None, *, is_paper: bool
) -> ClaimVerdict:
    if is_paper and not claim.figures:
        return ClaimVerdict(
            claim, "undecided", None, None, None, 0, format_unjudged(["the paper prints no number of it"], [])
        )
    columns, why = _judge_columns(claim.checks, measurements, resample, is_paper)
    judged = [column for column in columns if column.contrasts]
    absent = list(dict.fromkeys(name for column in judged for name in column.missing_models))
    undone = [place for column in columns for place in column.unfinished_cells]
    detail = (
        [format_columns(judged, claim.is_measurement), *list_gaps(absent, why, undone)]
        if judged
        else [format_unjudged(why, undone)]
    )
    for label, checks in claim.variants if judged else ():
        besides = [
            one for one in _judge_columns(checks, measurements, resample, is_paper)[0] if one.contrasts
        ]
        detail += [f"besides, {label}: {format_counts(besides)}"] if besides else []
    return ClaimVerdict(
        claim,
        _combine_outcomes(claim, judged),
        *_summarize_columns(judged),
        len(judged),
        "; ".join(detail),
        judged,
    )


def _combine_outcomes(claim: Claim, columns: Sequence[Column]) -> Verdict:
    outcomes = {column.outcome for column in columns}
    if claim.is_measurement or not columns:
        return "undecided"
    if "fails" in outcomes:
        return "fails"
    return "undecided" if "undecided" in outcomes else "holds"


# ---- columns ----


def _judge_columns(
    checks: Iterable[Check],
    measurements: Sequence[Measurement],
    resample: ResampleLookup | None,
    is_paper: bool,
) -> tuple[list[Column], list[str]]:
    """The columns of all checks, and why there are none of some."""
    columns: list[Column] = []
    why: list[str] = []
    for check in checks:
        found = [
            _judge_column(check, place, group, resample, is_paper)
            for place, group in _group_columns(check, measurements)
        ]
        columns += found
        if not found:
            why.append(explain_missing_data(check, measurements))
        elif not any(one.contrasts or one.unfinished_cells for one in found):
            fewest = min(found, key=lambda one: len(one.missing_models))
            why.append(
                f"no {' and no '.join(fewest.missing_models)}"
                if fewest.missing_models
                else "no seed in common"
            )
    return columns, list(dict.fromkeys(why))


ColumnMeasurements = dict[tuple[Any, ...], list[Measurement]]
"""Place inside the column -> its facts, one a seed."""


def _group_columns(
    check: Check, measurements: Sequence[Measurement]
) -> list[tuple[FigureCell, ColumnMeasurements]]:
    free = check.list_varying_fields()
    kept = [name for name in FIGURE_CELL_FIELDS if name not in free]
    found: dict[tuple[Any, ...], ColumnMeasurements] = {}
    for fact in measurements:
        if check.is_relevant(fact.figure_cell) and ("role" in free or fact.figure_cell["role"] == "cell"):
            column = found.setdefault(tuple(fact.figure_cell.get(name) for name in kept), {})
            column.setdefault(tuple(fact.figure_cell.get(name) for name in FIGURE_CELL_FIELDS), []).append(
                fact
            )
    return [(dict(zip(kept, key, strict=True)), group) for key, group in found.items()]


def _judge_column(
    check: Check,
    place: FigureCell,
    group: ColumnMeasurements,
    resample: ResampleLookup | None,
    is_paper: bool,
) -> Column:
    """Judged on the places that have a score; what is asked for besides is named."""
    everywhere = list(group.values())
    planned = check.build_contrasts([facts[0].figure_cell for facts in everywhere])
    done = [facts for facts in everywhere if any(fact.value is not None for fact in facts)]
    found = check.build_contrasts([facts[0].figure_cell for facts in done]).contrasts
    judged = [one for each in found if (one := _judge_contrast(each, done, resample, is_paper)) is not None]
    needed = {n for one in planned.contrasts for t in (*one.terms, *one.denominator) for n in t.cell_indices}
    undone = [everywhere[n][0].figure_cell for n in sorted(needed) if everywhere[n] not in done]
    return Column(place, judged, planned.missing_models, undone)


# ---- comparisons ----


def _judge_contrast(
    comparison: Contrast,
    done: Sequence[Sequence[Measurement]],
    resample: ResampleLookup | None,
    is_paper: bool,
) -> JudgedContrast | None:
    used = {n for term in (*comparison.terms, *comparison.denominator) for n in term.cell_indices}
    by_place = {n: {f.seed: f for f in done[n] if f.value is not None} for n in used}
    seeds = sorted(set.intersection(*(set(found) for found in by_place.values())))
    if not seeds:
        return None
    by_seed, ratios = {}, []
    for seed in seeds:
        scores = {n: np.array([found[seed].value]) for n, found in by_place.items()}
        by_seed[seed] = float(_evaluate_contrast(comparison, scores)[0])
        if comparison.denominator:
            ratios.append(_compute_ratio(comparison, scores))
    effect = float(np.mean(list(by_seed.values())))
    ratio = float(np.mean(ratios)) if comparison.denominator else None
    if is_paper:
        outcome = _classify_sign(effect, _compute_reading_error(comparison, by_place))
        return JudgedContrast(comparison.label, outcome, effect, None, None, by_seed, None, ratio)
    low, high, resampled = _compute_interval(comparison, by_place, by_seed, resample)
    return JudgedContrast(
        comparison.label, _classify_interval(low, high), effect, low, high, by_seed, resampled, ratio
    )


def _compute_interval(
    comparison: Contrast,
    by_place: Mapping[int, Mapping[int, Measurement]],
    by_seed: Mapping[int, float],
    resample: ResampleLookup | None,
) -> tuple[float | None, float | None, Array | None]:
    if len(by_seed) >= 2:
        effect = estimate_seed_effect(list(by_seed.values()), len(by_seed))
        return effect.low, effect.high, None
    (seed,) = by_seed
    found = {n: resample(facts[seed]) if resample else None for n, facts in by_place.items()}
    scores = {n: one for n, one in found.items() if one is not None}
    if len(scores) < len(found) or len({len(one) for one in scores.values()}) > 1:
        return None, None, None
    resampled = _evaluate_contrast(comparison, scores)
    return *compute_percentile_interval(resampled), resampled


def _evaluate_contrast(comparison: Contrast, scores: Mapping[int, Array]) -> Array:
    above = _sum_scores(comparison.terms, scores)
    if not comparison.denominator:
        return above
    below = _sum_scores(comparison.denominator, scores)
    if comparison.factor is not None:
        return above - comparison.factor * below
    ratio: Array = above / below
    return ratio


def _compute_ratio(comparison: Contrast, scores: Mapping[int, Array]) -> float:
    below = float(_sum_scores(comparison.denominator, scores)[0])
    return float(_sum_scores(comparison.terms, scores)[0]) / below if below else float("nan")


_REDUCTIONS: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}


def _sum_scores(terms: Iterable[WeightedScore], scores: Mapping[int, Array]) -> Array:
    parts = [
        t.weight * _REDUCTIONS[t.reduction](np.stack([scores[n] for n in t.cell_indices]), axis=0)
        for t in terms
    ]
    total: Array = np.sum(parts, axis=0)
    return total


def _compute_reading_error(comparison: Contrast, by_place: Mapping[int, Mapping[int, Measurement]]) -> float:
    """The most by which errors of reading may move the sum; a mean or an extreme moves as its parts."""

    def error(terms: Iterable[WeightedScore]) -> float:
        return sum(
            abs(t.weight) * max(fact.reading_error for n in t.cell_indices for fact in by_place[n].values())
            for t in terms
        )

    return error(comparison.terms) + abs(comparison.factor or 0.0) * error(comparison.denominator)


def _classify_sign(effect: float, tolerance: float) -> ContrastOutcome:
    """Rounding cannot turn the order of two printed numbers, so a difference as large as it is no tie."""
    if abs(effect) < max(tolerance - 1e-9, 1e-9):
        return "tie"
    return "holds" if effect > 0 else "fails"


def _classify_interval(low: float | None, high: float | None) -> ContrastOutcome:
    if low is None or high is None:
        return "undecided"
    if low > 0:
        return "holds"
    return "fails" if high < 0 else "undecided"


def _summarize_columns(columns: Sequence[Column]) -> tuple[float | None, float | None, float | None]:
    """Mean over columns, with the interval of that mean where seeds or examples give one."""
    if not columns:
        return None, None, None
    least = [column.weakest for column in columns]
    effect = float(np.mean([one.effect for one in least]))
    if len(least) == 1:
        return effect, least[0].low, least[0].high
    seeds = sorted(set.intersection(*(set(one.seed_effects) for one in least)))
    if any(one.low is None for one in least):
        return effect, None, None
    if len(seeds) >= 2:
        found = estimate_seed_effect(
            [float(np.mean([one.seed_effects[s] for one in least])) for s in seeds], len(seeds)
        )
        return effect, found.low, found.high
    drawn = [one.resampled_effects for one in least if one.resampled_effects is not None]
    if len(drawn) < len(least):
        return effect, None, None
    return effect, *compute_percentile_interval(np.mean(drawn, axis=0))
