"""Judge claims on the paper's numbers or on a table.

In a column of a table the interval of the weakest contrast decides. The paper prints no intervals, so its
own numbers are judged by sign, and a difference within the reading error is a tie. One column that fails
makes the claim fail.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gkd_lab.claims.claim_checks import Check, Contrast, WeightedScore
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.figure_cells import FIGURE_CELL_FIELDS, FigureCell
from gkd_lab.claims.measurements import Measurement, load_paper_measurements
from gkd_lab.claims.verdicts import (
    ClaimVerdict,
    Column,
    ContrastOutcome,
    JudgedContrast,
    Verdict,
    explain_missing_data,
    format_columns,
    format_counts,
    format_unjudged,
    list_gaps,
)
from gkd_lab.statistics.bootstrap import compute_percentile_interval
from gkd_lab.statistics.effects import estimate_seed_effect
from gkd_lab.tables.example_statistics import Array

ResampleLookup = Callable[[Measurement], Array | None]
"""Measurement -> (R,) scores of its model on resampled examples, equal ones for all; None: not stored."""

SeedMeasurements = dict[int, Measurement]
"""Seed -> measurement of one figure cell, finished ones only."""


def judge_paper(claims: Iterable[Claim]) -> list[ClaimVerdict]:
    """Judge each claim on the paper's own numbers, by sign; one verdict per claim, in order.

    A claim without numbers in the paper is undecided.
    """
    unprinted = format_unjudged(["the paper prints no number of it"])
    return [
        _judge_claim(claim, load_paper_measurements(claim.figures), None)
        if claim.figures
        else ClaimVerdict(claim, "undecided", unprinted)
        for claim in claims
    ]


def judge(
    claims: Iterable[Claim],
    measurements: Sequence[Measurement],
    resample: ResampleLookup = lambda measurement: None,
) -> list[ClaimVerdict]:
    """Judge each claim on a table's measurements, by intervals; one verdict per claim, in order.

    Intervals are over seeds from two on, else over examples by `resample`.
    """
    return [_judge_claim(claim, measurements, resample) for claim in claims]


def _judge_claim(
    claim: Claim, measurements: Sequence[Measurement], resample: ResampleLookup | None
) -> ClaimVerdict:
    """Return a claim's verdict over all columns, with its detail text; `resample` None: by sign."""
    columns, reasons = _judge_columns(claim.checks, measurements, resample)
    judged = [column for column in columns if column.contrasts]
    unfinished = [figure_cell for column in columns for figure_cell in column.unfinished_cells]
    if not judged:
        return ClaimVerdict(claim, "undecided", format_unjudged(reasons, unfinished))
    missing_models = list(dict.fromkeys(name for column in judged for name in column.missing_models))
    gaps = list_gaps(missing_models, reasons, unfinished)
    details = [format_columns(judged, claim.is_measurement), *gaps]
    for label, checks in claim.variants.items():
        columns = [c for c in _judge_columns(checks, measurements, resample)[0] if c.contrasts]
        details += [f"besides, {label}: {format_counts(columns)}"] if columns else []
    effect, low, high = _summarize_columns(judged)
    return ClaimVerdict(
        claim, _combine_outcomes(claim, judged), "; ".join(details), effect, low, high, judged
    )


def _combine_outcomes(claim: Claim, columns: Sequence[Column]) -> Verdict:
    """Return `fails` if a column fails, else `undecided` if one is, else `holds`.

    A measurement is `undecided`. A tie does not keep a claim from holding.
    """
    outcomes = {column.outcome for column in columns}
    if claim.is_measurement:
        return "undecided"
    if "fails" in outcomes:
        return "fails"
    return "undecided" if "undecided" in outcomes else "holds"


# ---- columns ----

ColumnMeasurements = dict[tuple[Any, ...], list[Measurement]]
"""Values of a figure cell's fields -> its measurements, one per seed."""


def _judge_columns(
    checks: Iterable[Check], measurements: Sequence[Measurement], resample: ResampleLookup | None
) -> tuple[list[Column], list[str]]:
    """Return (judged columns of all checks, a reason per check without a column to judge)."""
    columns: list[Column] = []
    reasons: list[str] = []
    for check in checks:
        of_check = [
            _judge_column(check, shared_fields, group, resample)
            for shared_fields, group in _group_columns(check, measurements)
        ]
        columns += of_check
        if not of_check:
            reasons.append(explain_missing_data(check, measurements))
        elif not any(column.contrasts or column.unfinished_cells for column in of_check):
            missing = min((column.missing_models for column in of_check), key=len)
            reasons.append(f"no {' and no '.join(missing)}" if missing else "no seed in common")
    return columns, list(dict.fromkeys(reasons))


def _group_columns(
    check: Check, measurements: Sequence[Measurement]
) -> list[tuple[FigureCell, ColumnMeasurements]]:
    """Return per column that a check reads (its shared fields, cell values -> list over seeds)."""
    varying = check.list_varying_fields()
    shared = [name for name in FIGURE_CELL_FIELDS if name not in varying]
    columns: dict[tuple[Any, ...], ColumnMeasurements] = {}
    for measurement in measurements:
        cell = measurement.figure_cell
        if check.is_relevant(cell) and ("role" in varying or cell["role"] == "cell"):
            column = columns.setdefault(tuple(cell.get(name) for name in shared), {})
            column.setdefault(tuple(cell.get(name) for name in FIGURE_CELL_FIELDS), []).append(measurement)
    return [(dict(zip(shared, key, strict=True)), group) for key, group in columns.items()]


def _judge_column(
    check: Check, shared_fields: FigureCell, group: ColumnMeasurements, resample: ResampleLookup | None
) -> Column:
    """Return a judged column: contrasts over scored figure cells; missing models, unfinished cells."""
    planned = list(group.values())
    finished = [seeds for seeds in planned if any(measurement.value is not None for measurement in seeds)]
    plan = check.build_contrasts([seeds[0].figure_cell for seeds in planned])
    needed = {index for contrast in plan.contrasts for index in _list_cell_indices(contrast)}
    unfinished = [planned[n][0].figure_cell for n in sorted(needed) if planned[n] not in finished]
    judged = []
    for contrast in check.build_contrasts([seeds[0].figure_cell for seeds in finished]).contrasts:
        by_cell = {
            index: {m.seed: m for m in finished[index] if m.value is not None}
            for index in _list_cell_indices(contrast)
        }
        judged.append(_judge_contrast(contrast, by_cell, resample))
    contrasts = [contrast for contrast in judged if contrast is not None]
    return Column(shared_fields, contrasts, plan.missing_models, unfinished)


def _list_cell_indices(contrast: Contrast) -> set[int]:
    """Return the indices of all figure cells in a contrast's terms and denominator."""
    return {index for term in (*contrast.terms, *contrast.denominator) for index in term.cell_indices}


def _summarize_columns(columns: Sequence[Column]) -> tuple[float, float | None, float | None]:
    """Return (mean over columns of the weakest effect, low, high); bounds None if not known."""
    weakest = [column.weakest for column in columns]
    effect = float(np.mean([contrast.effect for contrast in weakest]))
    if len(weakest) == 1:
        return effect, weakest[0].low, weakest[0].high
    seeds = sorted(set.intersection(*(set(contrast.seed_effects) for contrast in weakest)))
    if any(contrast.low is None for contrast in weakest):
        return effect, None, None
    if len(seeds) >= 2:
        means = [float(np.mean([contrast.seed_effects[seed] for contrast in weakest])) for seed in seeds]
        estimate = estimate_seed_effect(means, len(seeds))
        return effect, estimate.low, estimate.high
    resampled = [c.resampled_effects for c in weakest if c.resampled_effects is not None]
    if len(resampled) < len(weakest):
        return effect, None, None
    return effect, *compute_percentile_interval(np.mean(resampled, axis=0))


# ---- contrasts ----


def _judge_contrast(
    contrast: Contrast, by_cell: Mapping[int, SeedMeasurements], resample: ResampleLookup | None
) -> JudgedContrast | None:
    """Judge one contrast by interval, or by sign if `resample` is None; None without a common seed.

    `by_cell` is index of a figure cell -> its measurements.
    """
    seed_effects, ratio = _compute_effects(contrast, by_cell)
    if not seed_effects:
        return None
    effect = float(np.mean(list(seed_effects.values())))
    if resample is None:
        outcome = _classify_sign(effect, _compute_reading_error(contrast, by_cell))
        return JudgedContrast(contrast.label, outcome, effect, None, None, seed_effects, None, ratio)
    low, high, resampled = _compute_interval(contrast, by_cell, seed_effects, resample)
    outcome = _classify_interval(low, high)
    return JudgedContrast(contrast.label, outcome, effect, low, high, seed_effects, resampled, ratio)


def _classify_sign(effect: float, reading_error: float) -> ContrastOutcome:
    """Return `tie` if |effect| is below the reading error, else `holds` above 0 and `fails` below.

    Rounding cannot turn the order of two printed numbers: a difference as large as the error is no tie.
    """
    if abs(effect) < max(reading_error - 1e-9, 1e-9):
        return "tie"
    return "holds" if effect > 0 else "fails"


def _classify_interval(low: float | None, high: float | None) -> ContrastOutcome:
    """Return `holds` for an interval above 0, `fails` for one below; else, or without, `undecided`."""
    if low is None or high is None:
        return "undecided"
    if low > 0:
        return "holds"
    return "fails" if high < 0 else "undecided"


def _compute_effects(
    contrast: Contrast, by_cell: Mapping[int, SeedMeasurements]
) -> tuple[dict[int, float], float | None]:
    """Return (seed -> effect, mean ratio or None) over the seeds that all figure cells have."""
    seed_effects, ratios = {}, []
    for seed in sorted(set.intersection(*(set(seeds) for seeds in by_cell.values()))):
        scores = {index: np.array([seeds[seed].value]) for index, seeds in by_cell.items()}
        seed_effects[seed] = float(_evaluate_contrast(contrast, scores)[0])
        if contrast.denominator:
            ratios.append(_compute_ratio(contrast, scores))
    return seed_effects, float(np.mean(ratios)) if ratios else None


def _compute_interval(
    contrast: Contrast,
    by_cell: Mapping[int, SeedMeasurements],
    seed_effects: Mapping[int, float],
    resample: ResampleLookup,
) -> tuple[float | None, float | None, Array | None]:
    """Return (low, high, None) over seeds; for one seed (low, high, (R,) resampled effects).

    All are None where an example bootstrap is not possible.
    """
    if len(seed_effects) >= 2:
        estimate = estimate_seed_effect(list(seed_effects.values()), len(seed_effects))
        return estimate.low, estimate.high, None
    (seed,) = seed_effects
    resampled = {index: resample(measurements[seed]) for index, measurements in by_cell.items()}
    scores = {index: array for index, array in resampled.items() if array is not None}
    if len(scores) < len(resampled) or len({len(array) for array in scores.values()}) > 1:
        return None, None, None
    effects = _evaluate_contrast(contrast, scores)
    return *compute_percentile_interval(effects), effects


def _evaluate_contrast(contrast: Contrast, scores: Mapping[int, Array]) -> Array:
    """Return (R,) terms minus factor times denominator, or their ratio if there is no factor."""
    total = _sum_scores(contrast.terms, scores)
    if not contrast.denominator:
        return total
    denominator = _sum_scores(contrast.denominator, scores)
    if contrast.factor is not None:
        return total - contrast.factor * denominator
    ratio: Array = total / denominator
    return ratio


def _compute_ratio(contrast: Contrast, scores: Mapping[int, Array]) -> float:
    """Return the terms' sum divided by the denominator's, of the first score; NaN for a denominator of 0."""
    denominator = float(_sum_scores(contrast.denominator, scores)[0])
    return float(_sum_scores(contrast.terms, scores)[0]) / denominator if denominator else float("nan")


_REDUCTIONS: Mapping[str, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "min": np.min}


def _sum_scores(terms: Iterable[WeightedScore], scores: Mapping[int, Array]) -> Array:
    """Return the (R,) weighted sum of each term's mean, max or min over its cells; index -> (R,) scores."""
    parts = []
    for term in terms:
        stacked = np.stack([scores[index] for index in term.cell_indices])
        parts.append(term.weight * _REDUCTIONS[term.reduction](stacked, axis=0))
    total: Array = np.sum(parts, axis=0)
    return total


def _compute_reading_error(contrast: Contrast, by_cell: Mapping[int, SeedMeasurements]) -> float:
    """Return the largest shift of a contrast by the errors of the numbers that were read off."""

    def sum_errors(terms: Iterable[WeightedScore]) -> float:
        """Sum |weight| times the largest reading error among the term's cells."""
        return sum(
            abs(term.weight) * max(m.reading_error for n in term.cell_indices for m in by_cell[n].values())
            for term in terms
        )

    return sum_errors(contrast.terms) + abs(contrast.factor or 0.0) * sum_errors(contrast.denominator)
