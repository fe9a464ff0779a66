"""Verdicts: judge a claim's contrasts by intervals, or on the paper's numbers by sign.

A claim says that every contrast is above minus its margin, so it holds if every low end is
(intersection-union test, unadjusted). One contrast below makes it fail; among several, that one is
Holm-adjusted. One seed decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from gkd_lab.claims.contrasts import ColumnContrasts, Contrast, Contrasts
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.model_scores import ComparedModel, ModelScores
from gkd_lab.claims.model_settings import Settings
from gkd_lab.statistics.noise import (
    MIN_SEEDS_EXTREME,
    Array,
    EffectEstimate,
    ScoreSample,
    estimate_extreme,
    evaluate_extreme,
)
from gkd_lab.statistics.power import estimate_required_seeds

Outcome = Literal["holds", "fails", "undecided", "tie"]
LEVEL = 0.025
"""Share of errors on either side; intervals are two-sided at 95 %."""
_OUTCOMES_WORST_FIRST: tuple[Outcome, ...] = ("fails", "undecided", "tie", "holds")


@dataclass(frozen=True)
class JudgedContrast:
    """A contrast with its estimate and outcome."""

    label: str
    outcome: Outcome
    estimate: EffectEstimate
    margin: float
    """Points by which it may be below 0; 0 for the paper's numbers."""
    adjusted_level: float = LEVEL
    """Level of the upper end that decides `fails`: Bonferroni's or Holm's share of `LEVEL`."""
    ratio: float | None = None
    min_seeds: int = 2
    """Seeds below which it has no verdict."""

    @property
    def effect(self) -> float:
        """Mean over seeds and examples, in points; a measured ratio."""
        return self.estimate.effect

    @property
    def low(self) -> float | None:
        """Low end of the 95 % interval."""
        return self.estimate.low(LEVEL)

    @property
    def high(self) -> float | None:
        """High end of the 95 % interval, not adjusted."""
        return self.estimate.high(LEVEL)

    @property
    def can_fail(self) -> bool:
        """Whether it has an interval over two seeds or more."""
        return self.estimate.seeds > 1 and self.estimate.standard_error is not None

    @property
    def required_seeds(self) -> int | None:
        """Seeds that would probably decide it; None where it is decided or more seeds would not."""
        if self.outcome != "undecided":
            return None
        return estimate_required_seeds([self.estimate], [self.margin], self.adjusted_level)


@dataclass(frozen=True)
class JudgedColumn:
    """All contrasts of one column."""

    shared: Settings
    contrasts: list[JudgedContrast]

    @property
    def outcome(self) -> Outcome:
        """Worst outcome of the contrasts; worst first: fails, undecided, tie, holds."""
        return min((c.outcome for c in self.contrasts), key=_OUTCOMES_WORST_FIRST.index)

    @property
    def weakest(self) -> JudgedContrast:
        """The contrast that decides the column, as `find_weakest` finds it."""
        return find_weakest(self.contrasts)

    @property
    def measured_ratio(self) -> JudgedContrast | None:
        """The contrast that reports a ratio; None without one."""
        return next((contrast for contrast in self.contrasts if contrast.ratio is not None), None)


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim's verdict over all of its columns."""

    claim: Claim
    verdict: Literal["holds", "fails", "undecided"]
    columns: list[JudgedColumn] = field(default_factory=list)
    """Columns that were judged; none if nothing could be judged."""
    besides: dict[str, list[JudgedColumn]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    """Why rules of the claim compare nothing."""
    missing: list[str] = field(default_factory=list)
    """Names of models that the claim names and the table lacks."""
    unfinished: list[ComparedModel] = field(default_factory=list)
    problems: tuple[str, ...] = ()
    """What of the table was left out."""

    @property
    def contrasts(self) -> list[JudgedContrast]:
        """All contrasts of all columns."""
        return [contrast for column in self.columns for contrast in column.contrasts]

    @property
    def weakest(self) -> JudgedContrast:
        """The contrast that decides the claim."""
        return find_weakest(self.contrasts)

    @property
    def effect(self) -> float | None:
        """The least effect, relative to the margins; of a measurement, the mean over columns."""
        if not self.columns or self.claim.is_measurement:
            return self.mean_effect
        return min(c.effect + c.margin for c in self.contrasts) - self.weakest.margin

    @property
    def mean_effect(self) -> float | None:
        """Mean of all contrasts' effects."""
        return float(np.mean([c.effect for c in self.contrasts])) if self.columns else None

    @property
    def low(self) -> float | None:
        """Low end of the 95 % interval of the least effect: the least of all low ends.

        Where margins differ, relative to that of the weakest contrast; so is the high end.
        """
        ends = [(contrast.low, contrast.margin) for contrast in self.contrasts]
        lows = [low + margin for low, margin in ends if low is not None]
        if not lows or len(lows) < len(ends) or (self.claim.is_measurement and len(ends) > 1):
            return None
        return min(lows) - self.weakest.margin

    @property
    def high(self) -> float | None:
        """High end of the interval of the least effect: the least high end of those that can fail.

        It is Bonferroni-adjusted for their number.
        """
        if not self.contrasts or (self.claim.is_measurement and len(self.contrasts) > 1):
            return None
        contrasts = [contrast for contrast in self.contrasts if contrast.can_fail] or self.contrasts
        ends = [(c.estimate.high(LEVEL / len(contrasts)), c.margin) for c in contrasts]
        highs = [high + margin for high, margin in ends if high is not None]
        return min(highs) - self.weakest.margin if highs else None

    @property
    def required_seeds(self) -> int | None:
        """Seeds that would probably decide an undecided claim; None where more seeds would not."""
        if self.verdict != "undecided" or self.claim.is_measurement or not self.columns:
            return None
        contrasts = self.contrasts
        return estimate_required_seeds(
            [contrast.estimate for contrast in contrasts],
            [contrast.margin for contrast in contrasts],
            LEVEL / len(contrasts),
        )


def find_weakest(contrasts: Sequence[JudgedContrast]) -> JudgedContrast:
    """Return the contrast that decides: of the worst outcome, one seed before more, the least low end."""

    def rank(contrast: JudgedContrast) -> tuple[int, bool, bool, float]:
        end = contrast.effect if contrast.low is None else contrast.low
        outcome = _OUTCOMES_WORST_FIRST.index(contrast.outcome)
        return outcome, contrast.estimate.seeds > 1, contrast.low is not None, end + contrast.margin

    return min(contrasts, key=rank)


# ---- judging ----


def judge_claim(claim: Claim, scores: ModelScores, *, by_sign: bool = False) -> ClaimVerdict:
    """Judge one claim; `by_sign` for the paper's numbers, which have no intervals and take no margins."""
    compared = claim.rule(scores)
    columns = _judge_columns(compared, scores, by_sign)
    reasons = list(dict.fromkeys(compared.reasons))
    if not columns and not reasons:
        reasons = [] if any(column.unfinished for column in compared.columns) else ["no seed in common"]
    besides = {
        label: judged
        for label, rule in claim.besides.items()
        if (judged := _judge_columns(rule(scores), scores, by_sign))
    }
    judged_columns = [column for column in compared.columns if column.contrasts]
    missing = dict.fromkeys(name for column in judged_columns for name in column.missing)
    return ClaimVerdict(
        claim, _combine_outcomes(claim, columns), columns, besides if columns else {}, reasons, list(missing),
        [model for column in compared.columns for model in column.unfinished], scores.problems,
    )  # fmt: skip


def _combine_outcomes(
    claim: Claim, columns: Sequence[JudgedColumn]
) -> Literal["holds", "fails", "undecided"]:
    """Return `fails` if a column fails, else `undecided` if one is, else `holds`; ties hold.

    A measurement is `undecided`, and so is a claim without columns.
    """
    outcomes = {column.outcome for column in columns}
    if claim.is_measurement or not outcomes:
        return "undecided"
    if "fails" in outcomes:
        return "fails"
    return "undecided" if "undecided" in outcomes else "holds"


def _judge_columns(compared: Contrasts, scores: ModelScores, by_sign: bool) -> list[JudgedColumn]:
    """Judge all contrasts, adjust failures for their number, and return the columns that have any."""
    judged = [
        (column, [_judge_contrast(contrast, scores, by_sign) for contrast in column.contrasts])
        for column in compared.columns
    ]
    columns = [_drop_unpaired(column, contrasts) for column, contrasts in judged]
    columns = [column for column in columns if column.contrasts]
    return columns if by_sign else _adjust_failures(columns)


def _drop_unpaired(column: ColumnContrasts, contrasts: Sequence[JudgedContrast | None]) -> JudgedColumn:
    """Return a column without the contrasts whose models have no seed in common."""
    return JudgedColumn(column.shared, [contrast for contrast in contrasts if contrast is not None])


def _judge_contrast(contrast: Contrast, scores: ModelScores, by_sign: bool) -> JudgedContrast | None:
    """Judge one contrast, before any adjustment; None without a seed that all models have."""
    sample, notes = scores.collect_sample(contrast.models)
    if sample is None:
        return None
    ratio = _compute_ratio(contrast, sample)
    if by_sign:
        effect = float(evaluate_extreme(contrast.parts, sample.seed_scores.mean(axis=1)))
        effect = ratio if contrast.measures_ratio and ratio is not None else effect
        estimate = EffectEstimate(effect, effect, effect, None, 1.0, sample.seeds, None, "sign")
        outcome = _classify_sign(effect, _compute_reading_error(contrast))
        return JudgedContrast(contrast.label, outcome, estimate, 0.0, ratio=ratio)
    estimate = _estimate(contrast, sample)
    estimate = replace(estimate, method="; ".join([estimate.method, *notes]))
    outcome = _classify_interval(estimate, contrast.margin)
    min_seeds = 2 if contrast.is_linear else MIN_SEEDS_EXTREME
    return JudgedContrast(
        contrast.label, outcome, estimate, contrast.margin, ratio=ratio, min_seeds=min_seeds
    )


def _estimate(contrast: Contrast, sample: ScoreSample) -> EffectEstimate:
    """Estimate a contrast's effect, or the mean over seeds of the ratio that it measures."""
    if contrast.measures_ratio and contrast.ratio is not None:
        upper, lower = (weights @ sample.seed_scores for weights in contrast.ratio)
        sample = ScoreSample((upper / lower)[None])
        return estimate_extreme(sample, [type(contrast.parts[0])(1, np.ones((1, 1)))])
    return estimate_extreme(sample, contrast.parts)


def _classify_interval(estimate: EffectEstimate, margin: float) -> Outcome:
    """Return `holds` if the interval lies above minus the margin, else `undecided`; never for one seed."""
    low = estimate.low(LEVEL)
    return "holds" if low is not None and low > -margin and estimate.seeds > 1 else "undecided"


def _adjust_failures(columns: Sequence[JudgedColumn]) -> list[JudgedColumn]:
    """Mark the contrasts that fail, by Holm's step-down procedure over all of a claim."""
    failed: set[int] = set()
    contrasts = [contrast for column in columns for contrast in column.contrasts]
    testable = sum(contrast.can_fail for contrast in contrasts)
    while True:
        level = LEVEL / max(1, testable - len(failed))
        rejected = {n for n, c in enumerate(contrasts) if n not in failed and _lies_below(c, level)}
        if not rejected:
            break
        failed |= rejected
    judged = iter(
        replace(c, outcome="fails" if n in failed else c.outcome, adjusted_level=level)
        for n, c in enumerate(contrasts)
    )
    return [JudgedColumn(column.shared, [next(judged) for _ in column.contrasts]) for column in columns]


def _lies_below(contrast: JudgedContrast, level: float) -> bool:
    """Return whether a contrast of two seeds or more lies below minus its margin at a level."""
    high = contrast.estimate.high(level)
    return contrast.can_fail and high is not None and high < -contrast.margin


def _classify_sign(effect: float, reading_error: float) -> Outcome:
    """Return `tie` if |effect| is below the reading error, else `holds` above 0 and `fails` below.

    Rounding cannot turn the order of two printed numbers: a difference as large as the error is no tie.
    """
    if abs(effect) < max(reading_error - 1e-9, 1e-9):
        return "tie"
    return "holds" if effect > 0 else "fails"


def _compute_ratio(contrast: Contrast, sample: ScoreSample) -> float | None:
    """Return the mean over seeds of a contrast's ratio; None without one, NaN for a denominator of 0."""
    if contrast.ratio is None:
        return None
    upper, lower = (weights @ sample.seed_scores for weights in contrast.ratio)
    safe = np.where(lower == 0, np.nan, lower)
    return float(np.mean(upper / safe))


def _compute_reading_error(contrast: Contrast) -> float:
    """Return the largest shift of a contrast by the errors of the numbers that were read off."""
    errors: Array = np.array(
        [max((score.reading_error for score in m.scores.values()), default=0.0) for m in contrast.models]
    )
    return sum(float((np.abs(part.matrix) @ errors).max()) for part in contrast.parts)
