"""Noise of scores: variance components between seeds and examples, measured on a table or stated.

A score is the sum of what the model is worth, what all models of a seed or an example share (which cancels
in paired differences), and the noise of one model under one seed and at one example.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gkd_lab.claims.model_scores import ComparedModel, ModelScores
from gkd_lab.claims.model_settings import Settings
from gkd_lab.statistics.noise import FULL_SCORE, Array

NoiseKey = tuple[object, ...]
"""Values of `EVALUATION_KEY_SETTINGS`, or of the first two."""
EVALUATION_KEY_SETTINGS = ("task", "metric", "decoding", "temperature")
_SHARED_SETTINGS = ("task", "metric", "measure", "student", "pair", "decoding", "temperature", "evaluation")
"""Settings of models whose scores vary alike, the evaluation last; training settings may differ."""
_RELATIVE_ZERO = 1e-12


@dataclass(frozen=True)
class ScoreNoise:
    """Variance components of the score of one model under one seed, in squared points."""

    variance: float
    """Between seeds, without what all models of a seed share; a paired difference has twice as much."""
    shared_variance: float = 0.0
    """Of what all models of a seed share; it cancels in paired differences."""
    example_variance: float | None = None
    """Of one example, equal in all seeds, without what all models share; None: not known."""
    residual_variance: float = 0.0
    """Of one example under one seed: its mean over the examples is part of `variance`."""
    example_count: int | None = None
    """Examples behind `variance`; None: their noise is not known."""
    degrees: float = math.inf
    """Degrees of freedom of `variance`."""
    models: int = 0
    seeds: int = 0

    def compute_seed_variance(self, examples: int | None) -> float:
        """Return `variance` on a test set of so many examples; None: of as many as were measured."""
        if examples is None or self.example_count is None:
            return self.variance
        rest = self.residual_variance * (1 / examples - 1 / self.example_count)
        return max(self.variance + rest, self.residual_variance / examples)

    def compute_example_variance(self, examples: int | None) -> float:
        """Return the variance of a mean over so many examples that seeds do not reduce; 0: not known."""
        count = self.example_count if examples is None else examples
        return 0.0 if self.example_variance is None or not count else self.example_variance / count


@dataclass(frozen=True)
class NoiseSource:
    """Noise of the scores of some tasks and metrics, and where it is from."""

    text: str
    by_evaluation: Mapping[NoiseKey, ScoreNoise] = field(default_factory=dict)
    by_metric: Mapping[NoiseKey, ScoreNoise] = field(default_factory=dict)
    stated: ScoreNoise | None = None
    """Of every score."""

    def find(self, settings: Settings) -> ScoreNoise | None:
        """Return the noise of a model's score: of its evaluation, else of its metric; None: not known."""
        return (
            self.stated
            or self.by_evaluation.get(get_evaluation_key(settings))
            or self.by_metric.get(get_evaluation_key(settings)[:2])
        )


def get_evaluation_key(settings: Settings) -> NoiseKey:
    """Return task, metric, decoding and temperature of a model's score."""
    return tuple(settings.get(name) for name in EVALUATION_KEY_SETTINGS)


# ---- measuring ----


@dataclass
class _Squares:
    """Sums of squares and their degrees of freedom, of scores whose noise is pooled."""

    residual: float = 0.0
    residual_degrees: int = 0
    """Of models crossed with seeds."""
    within: float = 0.0
    within_degrees: int = 0
    """Of each model between its seeds."""
    example: float = 0.0
    example_residual: float = 0.0
    example_weight: int = 0
    """Components of examples, times M - 1."""
    example_numbers: set[int] = field(default_factory=set)
    """Numbers of examples behind these components."""
    text_numbers: set[int | None] = field(default_factory=set)
    """Numbers of texts behind the scores: examples times samples."""
    models: int = 0
    seeds: int = 0


def measure_noise(scores: ModelScores, text: str) -> NoiseSource:
    """Measure the noise of a table's scores, pooled over models of one metric and task.

    Two seeds or more of a model are needed; with per-example scores of several models under the same seeds
    the examples' part is measured as well. `text` says where the scores are from.
    """
    groups: dict[NoiseKey, list[ComparedModel]] = defaultdict(list)
    for model in scores.models:
        if model["role"] == "cell" and model["measure"] != "step_time" and len(model.scores) > 1:
            groups[tuple(model[name] for name in _SHARED_SETTINGS)].append(model)
    by_evaluation: dict[NoiseKey, _Squares] = defaultdict(_Squares)
    by_metric: dict[NoiseKey, _Squares] = defaultdict(_Squares)
    # Two evaluations that differ in nothing else, such as of the last and the best checkpoint, vary together.
    first_groups = {key[:-1]: models for key, models in reversed(groups.items())}
    for models in reversed(first_groups.values()):
        key = get_evaluation_key(models[0].settings)
        for squares in (by_evaluation[key], by_metric[key[:2]]):
            _add_seeds(squares, models)
            _add_examples(squares, models, scores)
    return NoiseSource(text, _summarize(by_evaluation), _summarize(by_metric))


def _add_seeds(squares: _Squares, models: Sequence[ComparedModel]) -> None:
    """Add the squares of models x seeds; models may lack seeds."""
    cells = [(number, seed) for number, model in enumerate(models) for seed in model.scores]
    seeds = sorted({seed for _, seed in cells})
    values = np.array([models[number].scores[seed].value for number, seed in cells])
    rows = np.zeros((len(cells), len(models) + len(seeds)))
    for row, (number, seed) in enumerate(cells):
        rows[row, [number, len(models) + seeds.index(seed)]] = 1
    for is_crossed, design in ((False, rows[:, : len(models)]), (True, rows)):
        fit, _, rank, _ = np.linalg.lstsq(design, values)
        rest = values - design @ fit
        total = float(rest @ rest)
        total = 0.0 if total <= _RELATIVE_ZERO * float(values @ values) else total
        if is_crossed:
            squares.residual += total
            squares.residual_degrees += len(values) - int(rank)
        else:
            squares.within += total
            squares.within_degrees += len(values) - int(rank)
    squares.text_numbers |= {score.example_count for model in models for score in model.scores.values()}
    squares.models += len(models)
    squares.seeds = max(squares.seeds, len(seeds))


def _add_examples(squares: _Squares, models: Sequence[ComparedModel], scores: ModelScores) -> None:
    """Add the components of models x examples and of the rest, where scores of examples are known."""
    if len(models) < 2:
        return
    sample, _ = scores.collect_sample(models)
    if sample is None or sample.example_scores is None or sample.seeds < 2:
        return
    example_variance, residual_variance = _compute_example_components(sample.example_scores)
    weight = len(models) - 1
    squares.example += weight * example_variance
    squares.example_residual += weight * residual_variance
    squares.example_weight += weight
    squares.example_numbers.add(sample.example_scores.shape[2])


def _compute_example_components(scores: Array) -> tuple[float, float]:
    """Return the variances of model x example and of the residual, of (M, S, N) scores."""
    models, seeds, examples = scores.shape
    centered = scores - scores.mean(axis=0)
    by_example = centered.mean(axis=1) - centered.mean(axis=(1, 2))[:, None]
    rest = centered - by_example[:, None] - centered.mean(axis=2, keepdims=True)
    degrees = (models - 1) * (examples - 1)
    residual = float((rest**2).sum()) / (degrees * (seeds - 1))
    example = seeds * float((by_example**2).sum()) / degrees
    return max(example - residual, 0.0) / seeds, residual


def _summarize(pooled: Mapping[NoiseKey, _Squares]) -> dict[NoiseKey, ScoreNoise]:
    """Return the noise of each key, without keys whose noise is not known."""
    noises = {key: _estimate_components(squares) for key, squares in pooled.items()}
    return {key: noise for key, noise in noises.items() if noise is not None}


def _estimate_components(squares: _Squares) -> ScoreNoise | None:
    """Return the variance components; None where all scores are equal and their examples not known.

    Scores that are equal by chance have the variance of one example that falls to either side.
    """
    within = squares.within / squares.within_degrees
    variance, degrees = within, squares.within_degrees
    if squares.residual_degrees > 0:
        variance, degrees = squares.residual / squares.residual_degrees, squares.residual_degrees
    texts = max((number or 0 for number in squares.text_numbers), default=0)
    if variance == 0.0:
        if not texts:
            return None
        variance = (FULL_SCORE / texts) ** 2 / 2
    noise = ScoreNoise(
        variance, max(within - variance, 0.0),
        degrees=float(degrees), models=squares.models, seeds=squares.seeds,
    )  # fmt: skip
    if len(squares.example_numbers) != 1:
        return noise
    return replace(
        noise,
        example_variance=squares.example / squares.example_weight,
        residual_variance=squares.example_residual / squares.example_weight,
        example_count=min(squares.example_numbers),
    )
