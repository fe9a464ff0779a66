"""Two records side by side: how they were made, how they score, and where they differ most."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkd_lab.config import ConfigError
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.metrics import METRICS, score_many
from gkd_lab.report.spec_diff import SpecDifference, compare_specs, describe_relation, get_role, read_spec
from gkd_lab.statistics.bootstrap import (
    ExampleStatistics,
    bootstrap_scores,
    build_example_statistics,
    compute_percentile_interval,
)
from gkd_lab.statistics.effects import SCORE_TOLERANCE, Effect, estimate_bootstrap_effect
from gkd_lab.store import Record
from gkd_lab.store.predictions import PredictionRow, group_by_prompt, read_predictions
from gkd_lab.tables.evaluations import FinishedEvaluation, list_finished_evaluations, match_evaluations

RESAMPLES = 10_000
MIN_SHARED_PROMPTS = 0.5
"""Share of the smaller set of prompts from which on both must have it to be paired: made data of other
seeds repeat a prompt now and then."""


@dataclass(frozen=True)
class ComparedRecord:
    """One of the two records and how it scores."""

    record: str
    fingerprint: str
    role: str
    """`cell`, `start` or `teacher`."""
    score: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ComparedExample:
    """A prompt with what both wrote first, and the mean score of what they wrote."""

    number: int
    """Its place in the second record's predictions, from 1."""
    prompt: str
    references: tuple[str, ...]
    a: str
    b: str
    score_a: float
    score_b: float


@dataclass(frozen=True)
class Comparison:
    """B minus A, and what it is of."""

    a: ComparedRecord
    b: ComparedRecord
    differs: tuple[SpecDifference, ...]
    relation: str | None
    """Whether one started from the other or learnt from it."""
    evaluation: str
    other_evaluations: tuple[str, ...]
    metric: str
    signature: str
    effect: Effect
    paired: bool
    n: int
    """Prompts that both have, if paired; those of A and B together, if not."""
    examples: tuple[ComparedExample, ...]
    differing: int
    """Prompts whose scores differ; 0 if unpaired."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _PromptScores:
    """What one record wrote for the evaluation, by prompt."""

    rows: list[PredictionRow]
    prompt_groups: list[list[int]]
    sample: ExampleStatistics
    mean_scores: list[float]
    signature: str
    interval: tuple[float, float]

    def build_prompt_keys(self) -> list[tuple[Any, ...]]:
        """What tells prompts apart: text, references, and which of several equal ones it is."""
        seen: Counter[tuple[Any, ...]] = Counter()
        found = []
        for group in self.prompt_groups:
            first = self.rows[group[0]]
            key = (first["prompt"], *first["references"])
            found.append((seen[key], *key))
            seen[key] += 1
        return found


def compare_records(
    a: Record, b: Record, *, evaluation: str | None = None, metric: str | None = None, examples: int = 10
) -> Comparison:
    """B minus A in one metric of one evaluation that both have; scores are computed from the stored texts.

    Paired by prompt, where at least half of the prompts are the same. Raises SpecError for a request
    that these records cannot answer and DamagedPredictions.
    """
    if metric is not None and metric not in METRICS:
        raise build_unknown_name_error("metric", metric, METRICS)
    there = list_finished_evaluations(a), list_finished_evaluations(b)
    ours, theirs, others = match_evaluations(*there, evaluation)
    chosen = metric or _find_common_metric(ours, theirs)
    judged = _score_evaluation(ours, chosen), _score_evaluation(theirs, chosen)
    effect, paired, shared = _compute_effect(*judged)
    listed = _rank_examples(*judged, shared) if paired else []
    return Comparison(
        a=_build_compared_record(a, judged[0]),
        b=_build_compared_record(b, judged[1]),
        differs=tuple(compare_specs(a, b)),
        evaluation=ours.name,
        other_evaluations=others,
        metric=chosen,
        signature=judged[0].signature,
        effect=effect,
        paired=paired,
        n=len(shared) if paired else sum(len(one.prompt_groups) for one in judged),
        examples=tuple(listed[:examples]),
        differing=len(listed),
        relation=describe_relation(a, b),
        notes=tuple(_list_notes(ours, theirs, chosen, *judged, paired, len(shared))),
    )


def _find_common_metric(a: FinishedEvaluation, b: FinishedEvaluation) -> str:
    both = [metric for metric in a.metrics if metric in b.metrics and metric in METRICS]
    if not both:
        raise ConfigError(
            f"no common metric: {', '.join(a.metrics)} and {', '.join(b.metrics)}; --metric computes one of "
            f"{', '.join(METRICS)}"
        )
    return both[0]


def _score_evaluation(evaluation: FinishedEvaluation, metric: str) -> _PromptScores:
    rows = read_predictions(evaluation.record)
    groups = group_by_prompt(rows)
    prompts = [number for number, group in enumerate(groups) for _ in group]
    texts, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    try:
        score = score_many([metric], texts, references, prompts=prompts)[metric]
    except ValueError as error:
        raise ConfigError(f"{evaluation.record.folder}: {error}") from error
    sample = build_example_statistics(metric, rows, score.per_example)
    values = [float(np.mean([score.per_example[n] for n in group])) for group in groups]
    ends = compute_percentile_interval(bootstrap_scores([sample], resamples=RESAMPLES)[0])
    return _PromptScores(rows, groups, sample, values, score.signature, ends)


def _compute_effect(a: _PromptScores, b: _PromptScores) -> tuple[Effect, bool, list[tuple[int, int]]]:
    """(B minus A, whether paired, the prompts of A and of B that are the same)."""
    places = {key: place for place, key in enumerate(a.build_prompt_keys())}
    shared = [(places[key], place) for place, key in enumerate(b.build_prompt_keys()) if key in places]
    if len(shared) < MIN_SHARED_PROMPTS * min(len(a.prompt_groups), len(b.prompt_groups)):
        difference = b.sample.score - a.sample.score
        (first,), (second,) = (
            bootstrap_scores([one.sample], resamples=RESAMPLES, seed=seed) for seed, one in enumerate((a, b))
        )
        smaller = min(len(a.prompt_groups), len(b.prompt_groups))
        over = "bootstrap over the examples of each, not paired"
        return estimate_bootstrap_effect(difference, second - first, smaller, 1, over), False, shared
    ours, theirs = (
        a.sample.select_examples([n for n, _ in shared]),
        b.sample.select_examples([n for _, n in shared]),
    )
    first, second = bootstrap_scores([ours, theirs], resamples=RESAMPLES)
    over = "paired bootstrap over examples"
    effect = estimate_bootstrap_effect(theirs.score - ours.score, second - first, len(shared), 1, over)
    return effect, True, shared


def _rank_examples(
    a: _PromptScores, b: _PromptScores, shared_prompts: Sequence[tuple[int, int]]
) -> list[ComparedExample]:
    """Those whose scores differ, the largest difference first."""
    found = [
        _build_example(a, b, *pair)
        for pair in shared_prompts
        if a.mean_scores[pair[0]] != b.mean_scores[pair[1]]
    ]
    return sorted(found, key=lambda one: -abs(one.score_b - one.score_a))


def _build_example(a: _PromptScores, b: _PromptScores, index_a: int, index_b: int) -> ComparedExample:
    first, second = a.rows[a.prompt_groups[index_a][0]], b.rows[b.prompt_groups[index_b][0]]
    return ComparedExample(
        number=index_b + 1,
        prompt=second["prompt"],
        references=tuple(second["references"]),
        a=first["prediction"],
        b=second["prediction"],
        score_a=a.mean_scores[index_a],
        score_b=b.mean_scores[index_b],
    )


def _build_compared_record(record: Record, scores: _PromptScores) -> ComparedRecord:
    spec = read_spec(record)
    low, high = scores.interval
    return ComparedRecord(
        record=str(record.folder),
        fingerprint=str(spec.get("fingerprint", ""))[:8],
        role=get_role(spec),
        score=scores.sample.score,
        low=low,
        high=high,
        n=len(scores.prompt_groups),
    )


def _list_notes(
    evaluation_a: FinishedEvaluation,
    evaluation_b: FinishedEvaluation,
    metric: str,
    scores_a: _PromptScores,
    scores_b: _PromptScores,
    is_paired: bool,
    shared_count: int,
) -> Iterator[str]:
    sizes = len(scores_a.prompt_groups), len(scores_b.prompt_groups)
    if not is_paired:
        yield f"not paired: {shared_count} prompts are the same, of {sizes[0]} in A and {sizes[1]} in B"
    elif shared_count < max(sizes):
        yield (
            f"paired over the {shared_count} prompts that are the same, of {sizes[0]} in A and {sizes[1]} in B; "
            "the scores of A and B are over all of their own"
        )
    if evaluation_a.folder != evaluation_b.folder:
        yield f"the evaluations share a name, not all settings: {evaluation_a.folder} and {evaluation_b.folder}"
    if scores_a.signature != scores_b.signature:
        yield f"the signatures differ: {scores_a.signature} and {scores_b.signature}"
    for name, found, judged in (("A", evaluation_a, scores_a), ("B", evaluation_b, scores_b)):
        stored = found.record.read_scores().get(metric, {}).get("value")
        if stored is not None and abs(stored - judged.sample.score) > SCORE_TOLERANCE:
            yield f"the stored score of {name} is {stored:.2f}: the metric has changed, `rescore` renews it"
