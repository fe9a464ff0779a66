"""Power of a planned grid: which true differences its claims would show, before anything is run."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from gkd_lab.claims.contrasts import Contrast
from gkd_lab.claims.definitions import Claim
from gkd_lab.claims.judge import judge_paper, select_claims
from gkd_lab.claims.model_scores import ComparedModel, ModelScores
from gkd_lab.claims.table_noise import NoiseKey, NoiseSource, ScoreNoise, get_evaluation_key
from gkd_lab.claims.table_scores import load_table_scores
from gkd_lab.config import ConfigError, Evaluation, Grid
from gkd_lab.statistics.noise import Array, ExtremePart
from gkd_lab.statistics.planned_power import (
    ModelNoise,
    PlannedContrast,
    find_failing_difference,
    find_holding_difference,
    find_min_seeds,
    shows_difference,
)
from gkd_lab.statistics.power import find_least_seeds
from gkd_lab.store import Store
from gkd_lab.tables.long_table import build_long_table
from gkd_lab.tables.results import name_evaluations

PLANNED_SCORE = 50.0
"""Points that every planned score is set to, so that claims' rules find the models; no result uses it."""


@dataclass(frozen=True)
class PaperEffect:
    """A claim's comparisons in the paper, of the same tasks and metrics, in points."""

    mean: float
    least: float
    largest: float


@dataclass(frozen=True)
class ClaimPower:
    """Power analysis of one claim: the least true differences that a planned grid detects in 80 % of runs."""

    claim: Claim
    comparisons: int = 0
    seeds: int = 0
    """The least number that a comparison has."""
    examples: int | None = None
    """The least number of a score; None: not known before the data is read."""
    margins: tuple[float, ...] = ()
    """Distinct margins of the comparisons, in points."""
    holds_from: float | None = None
    """Least true difference of all comparisons, in points, at which the claim `holds`."""
    fails_from: float | None = None
    """True difference of one comparison, below 0, at which the claim `fails`."""
    paper: PaperEffect | None = None
    paper_seeds: int | None = None
    """Seeds at which the paper's mean effect, as that of all comparisons, is shown; None: above 200."""
    is_noise_known: bool = False
    note: str = ""
    """Why numbers are missing."""


@dataclass(frozen=True)
class GridPower:
    """The power of each claim of a planned grid, and the noise that it was computed with."""

    claims: list[ClaimPower]
    source: NoiseSource
    noises: dict[NoiseKey, ScoreNoise]
    """(task, metric, decoding, temperature) -> noise, of the scores that claims compare."""


def plan_power(grid: Grid, source: NoiseSource) -> GridPower:
    """Return the power of each claim that a grid's experiment names, or else of all that it can judge.

    Raises ConfigError where no claim has comparisons, or the noise of none is known.
    """
    scores = load_planned_scores(grid)
    names = grid.experiment.paper.claims
    power = GridPower([], source, {})
    for claim in select_claims(names or None):
        planned = _plan_claim(claim, scores, power)
        if names or planned.comparisons:
            power.claims.append(planned)
    if not any(planned.comparisons for planned in power.claims):
        reason = "; ".join(describe_notes(power.claims))
        reason = reason or "it names no claim of the paper, and its cells can judge none"
        raise ConfigError(f"--power needs comparisons with a verdict, and {grid.name} has none: {reason}")
    if not power.noises:
        measured = ", ".join(sorted({f"{task} {metric}" for task, metric in source.by_metric}))
        needs = "; ".join(describe_notes([planned for planned in power.claims if planned.comparisons]))
        raise ConfigError(
            f"the noise from {source.text} is of {measured}, not of what {grid.name} compares: {needs}"
        )
    return power


def describe_notes(claims: Sequence[ClaimPower]) -> list[str]:
    """Return a text per distinct note, after the claims that have it: `C1, C2: one seed: ...`."""
    ids_by_note: dict[str, list[str]] = {}
    for planned in claims:
        if planned.note:
            ids_by_note.setdefault(planned.note, []).append(planned.claim.id)
    return [f"{', '.join(ids)}: {note}" for note, ids in ids_by_note.items()]


def load_planned_scores(grid: Grid) -> ModelScores:
    """Return the models of a grid's claims as if all were done; their scores mean nothing."""
    with tempfile.TemporaryDirectory() as folder:
        table = build_long_table(grid, Store(Path(folder)))
    counts = {
        (cell.task, name_evaluations(cell.evaluations)[evaluation.folder]): evaluation.examples
        if isinstance(evaluation, Evaluation)
        else evaluation.limit
        for cell in grid.cells
        for evaluation in cell.evaluations
    }
    keys = zip(table["task"], table["evaluation"], strict=True)
    table["n_examples"] = pd.array([counts.get(key) for key in keys], dtype="Int64")
    return load_table_scores(table.assign(value=PLANNED_SCORE))


def _plan_claim(claim: Claim, scores: ModelScores, power: GridPower) -> ClaimPower:
    """Return the power of one claim, and add the noise of its scores to `power.noises`."""
    if claim.is_measurement:
        return ClaimPower(claim, note="is measured, without a verdict")
    compared = claim.rule(scores)
    contrasts = [
        contrast for column in compared.columns for contrast in column.contrasts if _list_seeds(contrast)
    ]
    if not contrasts:
        reasons = list(dict.fromkeys(compared.reasons)) or ["no seed in common"]
        return ClaimPower(claim, note=f"cannot be judged by this grid: {'; '.join(reasons)}")
    models = list({id(model): model for contrast in contrasts for model in contrast.models}.values())
    counts = [score.example_count for model in models for score in model.scores.values()]
    planned = ClaimPower(
        claim, len(contrasts),
        seeds=min(len(_list_seeds(contrast)) for contrast in contrasts),
        examples=None if None in counts else min(count for count in counts if count is not None),
        margins=tuple(sorted({contrast.margin for contrast in contrasts})),
        paper=_find_paper_effect(claim, models),
    )  # fmt: skip
    noises = {get_evaluation_key(model.settings): power.source.find(model.settings) for model in models}
    unknown = {f"{key[0]} {key[1]}" for key, noise in noises.items() if noise is None}
    if unknown:
        return replace(planned, note=f"needs the noise of {' and '.join(sorted(unknown))}")
    power.noises.update({key: noise for key, noise in noises.items() if noise is not None})
    noise = _build_model_noise(models, power.source, planned.examples)
    return _compute_differences(planned, [_map_contrast(c, models) for c in contrasts], noise)


def _compute_differences(
    planned: ClaimPower, contrasts: Sequence[PlannedContrast], noise: ModelNoise
) -> ClaimPower:
    """Return the claim's power with the differences that it would show, and the seeds for the paper's."""
    least = find_min_seeds(contrasts)
    note = ""
    if planned.seeds < least:
        count = "one seed" if planned.seeds == 1 else f"{planned.seeds} seeds"
        note = f"{count}: no verdict is possible, it needs {least} or more"
    return replace(
        planned,
        holds_from=find_holding_difference(contrasts, noise, planned.seeds),
        fails_from=find_failing_difference(contrasts, noise, planned.seeds),
        paper_seeds=_find_paper_seeds(planned, contrasts, noise),
        is_noise_known=True,
        note=note,
    )


def _find_paper_seeds(
    planned: ClaimPower, contrasts: Sequence[PlannedContrast], noise: ModelNoise
) -> int | None:
    """Return the seeds at which the paper's mean effect makes the claim hold, or fail if it is below."""
    if planned.paper is None:
        return None
    effect = planned.paper.mean
    return find_least_seeds(lambda seeds: shows_difference(contrasts, noise, seeds, effect))


# ---- models ----


def _list_seeds(contrast: Contrast) -> list[int]:
    """Return the seeds that all models of a contrast have."""
    return sorted(set.intersection(*(set(model.scores) for model in contrast.models)))


def _map_contrast(contrast: Contrast, models: Sequence[ComparedModel]) -> PlannedContrast:
    """Return a contrast with weights on all models of its claim."""
    places = {id(model): place for place, model in enumerate(models)}
    columns = [places[id(model)] for model in contrast.models]
    parts = []
    for part in contrast.parts:
        matrix = np.zeros((len(part.matrix), len(models)))
        matrix[:, columns] = part.matrix
        parts.append(ExtremePart(part.sign, matrix))
    return PlannedContrast(tuple(parts), contrast.margin)


def _build_model_noise(
    models: Sequence[ComparedModel], source: NoiseSource, examples: int | None
) -> ModelNoise:
    """Return the noise of each model; one that all seeds share has none between seeds."""
    noises = [noise for model in models if (noise := source.find(model.settings)) is not None]
    is_trained = np.array([_has_own_seeds(model) for model in models], dtype=float)

    def take_roots(variances: Sequence[float]) -> Array:
        return np.sqrt(np.array(variances))

    return ModelNoise(
        seed=is_trained * take_roots([noise.compute_seed_variance(examples) for noise in noises]),
        shared=is_trained * take_roots([noise.shared_variance for noise in noises]),
        example=take_roots([noise.compute_example_variance(examples) for noise in noises]),
    )


def _has_own_seeds(model: ComparedModel) -> bool:
    """Return whether a model is trained anew for each seed, unlike a start or teacher that all share."""
    cells = {score.key[0] for score in model.scores.values() if score.key is not None}
    return model["role"] == "cell" or len(cells) > 1


# ---- the paper ----


def _find_paper_effect(claim: Claim, models: Sequence[ComparedModel]) -> PaperEffect | None:
    """Return the effects of a claim's comparisons in the paper on the models' tasks and metrics, if any."""
    (verdict,) = judge_paper([claim.id])
    keys = {get_evaluation_key(model.settings) for model in models}
    for length in (4, 2):
        wanted = {key[:length] for key in keys}
        effects = [
            contrast.effect
            for column in verdict.columns
            if get_evaluation_key(column.shared)[:length] in wanted
            for contrast in column.contrasts
        ]
        if effects:
            return PaperEffect(float(np.mean(effects)), min(effects), max(effects))
    return None
