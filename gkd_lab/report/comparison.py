"""Compare two records: specifications, scores, paired difference, the examples that differ most."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gkd_lab.config import ConfigError
from gkd_lab.config.errors import build_unknown_name_error
from gkd_lab.metrics import METRICS, score_many
from gkd_lab.metrics.intervals import bootstrap_corpus_interval, bootstrap_mean_interval
from gkd_lab.metrics.score import CorpusStatistics
from gkd_lab.statistics.noise import DIFFERENCE, ScoreSample, estimate_contrast, estimate_unpaired
from gkd_lab.store import Record
from gkd_lab.store.files import read_json
from gkd_lab.store.predictions import PredictionRow, group_by_prompt, read_predictions
from gkd_lab.tables.evaluations import FinishedEvaluation, list_finished_evaluations, match_evaluations
from gkd_lab.tables.example_statistics import (
    SCORE_TOLERANCE,
    ExampleStatistics,
    build_example_statistics,
    compute_pseudo_values,
)

MIN_SHARED_PROMPTS = 0.5
"""Share of the smaller set of prompts that both must have to be paired: made data of other seeds repeat
a prompt now and then."""


@dataclass(frozen=True)
class SpecDifference:
    """A field in which two specifications differ; None where one has no such field."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class ScoreDifference:
    """B minus A with its 95 % interval over examples; other seeds of either are not covered."""

    mean: float
    low: float | None
    high: float | None
    pairs: int
    """Pairs of models that it is the mean of: 1."""
    over: str
    """What the interval is taken over."""
    p: float | None
    """Two-sided p-value of no difference."""

    @property
    def verdict(self) -> str:
        """`higher` or `lower` if the interval excludes 0; `undecided` if not, or without interval."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "higher" if self.low > 0 else "lower"


@dataclass(frozen=True)
class ComparedRecord:
    """One of the two records with its score and the score's 95 % interval over examples."""

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
    """A prompt with the first completion of each record and the mean score of its completions."""

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
    """The difference B minus A in one metric of one evaluation."""

    a: ComparedRecord
    b: ComparedRecord
    differs: tuple[SpecDifference, ...]
    relation: str | None
    """`B started from A` or `A learnt from the teacher B`; None if neither."""
    evaluation: str
    other_evaluations: tuple[str, ...]
    metric: str
    signature: str
    effect: ScoreDifference
    paired: bool
    n: int
    """Prompts that both have, if paired; those of A and B together, if not."""
    examples: tuple[ComparedExample, ...]
    differing: int
    """Prompts whose scores differ; 0 if unpaired."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _PromptScores:
    """Predictions and scores of one record, by prompt."""

    rows: list[PredictionRow]
    prompt_groups: list[list[int]]
    """Indices of the rows of each prompt."""
    sample: ExampleStatistics
    mean_scores: list[float]
    signature: str
    interval: tuple[float, float]

    def build_prompt_keys(self) -> list[tuple[Any, ...]]:
        """Return a key per prompt: (count of equal ones before it, text, references)."""
        counts: Counter[tuple[Any, ...]] = Counter()
        keys = []
        for indices in self.prompt_groups:
            first = self.rows[indices[0]]
            content = (first["prompt"], *first["references"])
            keys.append((counts[content], *content))
            counts[content] += 1
        return keys


def compare_records(
    a: Record, b: Record, *, evaluation: str | None = None, metric: str | None = None, examples: int = 10
) -> Comparison:
    """Return B minus A in one metric of one evaluation, recomputed from stored texts, with examples.

    Paired by prompt, where at least half of the prompts are the same. Raises ConfigError for a request
    that these records cannot answer and DamagedRecord for damaged predictions.
    """
    if metric is not None and metric not in METRICS:
        raise build_unknown_name_error("metric", metric, METRICS)
    finished = list_finished_evaluations(a), list_finished_evaluations(b)
    evaluation_a, evaluation_b, other_evaluations = match_evaluations(*finished, evaluation)
    metric = metric or _find_common_metric(evaluation_a, evaluation_b)
    scores_a, scores_b = _score_evaluation(evaluation_a, metric), _score_evaluation(evaluation_b, metric)
    shared = _match_prompts(scores_a, scores_b)
    smaller = min(len(scores_a.prompt_groups), len(scores_b.prompt_groups))
    is_paired = len(shared) >= MIN_SHARED_PROMPTS * smaller
    ranked = _rank_examples(scores_a, scores_b, shared) if is_paired else []
    spec_a, spec_b = read_spec(a), read_spec(b)
    return Comparison(
        a=_build_compared_record(a, spec_a, scores_a),
        b=_build_compared_record(b, spec_b, scores_b),
        differs=tuple(compare_specs(spec_a, spec_b)),
        relation=describe_relation(spec_a, spec_b),
        evaluation=evaluation_a.name,
        other_evaluations=other_evaluations,
        metric=metric,
        signature=scores_a.signature,
        effect=_compute_difference(scores_a.sample, scores_b.sample, shared if is_paired else None),
        paired=is_paired,
        n=len(shared) if is_paired else len(scores_a.prompt_groups) + len(scores_b.prompt_groups),
        examples=tuple(ranked[:examples]),
        differing=len(ranked),
        notes=(
            *_describe_pairing(scores_a, scores_b, is_paired, len(shared)),
            *_describe_evaluations(evaluation_a, evaluation_b, scores_a, scores_b, metric),
        ),
    )


def _find_common_metric(a: FinishedEvaluation, b: FinishedEvaluation) -> str:
    """Return A's first metric that B has too and that can be computed. Raises ConfigError."""
    for metric in a.metrics:
        if metric in b.metrics and metric in METRICS:
            return metric
    raise ConfigError(
        f"no common metric: {', '.join(a.metrics)} and {', '.join(b.metrics)}; --metric computes one of "
        f"{', '.join(METRICS)}"
    )


def _score_evaluation(evaluation: FinishedEvaluation, metric: str) -> _PromptScores:
    """Recompute a metric from stored predictions, grouped by prompt. Raises ConfigError."""
    rows = read_predictions(evaluation.record)
    prompt_groups = group_by_prompt(rows)
    prompts = [number for number, indices in enumerate(prompt_groups) for _ in indices]
    texts, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    try:
        score = score_many([metric], texts, references, prompts=prompts)[metric]
    except ValueError as error:
        raise ConfigError(f"{evaluation.record.folder}: {error}") from error
    sample = build_example_statistics(metric, rows, score.per_example)
    return _PromptScores(
        rows=rows,
        prompt_groups=prompt_groups,
        sample=sample,
        mean_scores=[float(np.mean([score.per_example[n] for n in indices])) for indices in prompt_groups],
        signature=score.signature,
        interval=_bootstrap_interval(sample),
    )


def _bootstrap_interval(sample: ExampleStatistics) -> tuple[float, float]:
    """Return a score's 95 % bootstrap interval over prompts, as the table has it."""
    if sample.corpus_score is None:
        return bootstrap_mean_interval(sample.statistics[:, 0].tolist())
    return bootstrap_corpus_interval(CorpusStatistics(sample.statistics, sample.corpus_score))


def _match_prompts(a: _PromptScores, b: _PromptScores) -> list[tuple[int, int]]:
    """Return (number in A, number in B) of each prompt that both have, in B's order."""
    numbers_a = {key: number for number, key in enumerate(a.build_prompt_keys())}
    return [(numbers_a[key], n) for n, key in enumerate(b.build_prompt_keys()) if key in numbers_a]


def _compute_difference(
    a: ExampleStatistics, b: ExampleStatistics, shared: Sequence[tuple[int, int]] | None
) -> ScoreDifference:
    """Return B minus A, paired over the shared prompts, or over all prompts of each where it is None."""
    if shared is not None:
        numbers_a, numbers_b = zip(*shared, strict=True)
        a, b = a.select_examples(numbers_a), b.select_examples(numbers_b)
    effect = b.score - a.score
    if min(len(a), len(b)) < 2:
        return ScoreDifference(effect, None, None, 1, "one example, no interval", None)
    values_a, values_b = compute_pseudo_values(a), compute_pseudo_values(b)
    if shared is None:
        estimate = estimate_unpaired(values_a, values_b)
        method = "the examples of each, not paired; other seeds not covered"
    else:
        values = np.array([[values_b], [values_a]])
        estimate = estimate_contrast(ScoreSample(values.mean(axis=2), values), DIFFERENCE)
        method = f"{len(a)} examples, paired; other seeds not covered"
    return ScoreDifference(effect, estimate.low(), estimate.high(), 1, method, estimate.p_value)


def _rank_examples(
    a: _PromptScores, b: _PromptScores, shared: Sequence[tuple[int, int]]
) -> list[ComparedExample]:
    """Return the shared prompts whose mean scores differ, the largest difference first."""
    examples = []
    for number_a, number_b in shared:
        if a.mean_scores[number_a] != b.mean_scores[number_b]:
            row_a, row_b = a.rows[a.prompt_groups[number_a][0]], b.rows[b.prompt_groups[number_b][0]]
            example = ComparedExample(
                number=number_b + 1,
                prompt=row_b["prompt"],
                references=tuple(row_b["references"]),
                a=row_a["prediction"],
                b=row_b["prediction"],
                score_a=a.mean_scores[number_a],
                score_b=b.mean_scores[number_b],
            )
            examples.append(example)
    return sorted(examples, key=lambda example: -abs(example.score_b - example.score_a))


def _build_compared_record(record: Record, spec: Mapping[str, Any], scores: _PromptScores) -> ComparedRecord:
    """Build the summary of one record: folder, fingerprint, role, score, interval, prompts."""
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


def _describe_pairing(
    a: _PromptScores, b: _PromptScores, is_paired: bool, shared_count: int
) -> Iterator[str]:
    """Yield a note if the comparison is not paired, or not over all prompts; else nothing."""
    count_a, count_b = len(a.prompt_groups), len(b.prompt_groups)
    if not is_paired:
        yield f"not paired: {shared_count} prompts are the same, of {count_a} in A and {count_b} in B"
    elif shared_count < max(count_a, count_b):
        yield (
            f"paired over the {shared_count} prompts that are the same, of {count_a} in A and {count_b} in "
            "B; the scores of A and B are over all of their own"
        )


def _describe_evaluations(
    evaluation_a: FinishedEvaluation,
    evaluation_b: FinishedEvaluation,
    scores_a: _PromptScores,
    scores_b: _PromptScores,
    metric: str,
) -> Iterator[str]:
    """Yield notes on differing settings, differing signatures and outdated stored scores."""
    if evaluation_a.folder != evaluation_b.folder:
        yield (
            f"the evaluations share a name, not all settings: {evaluation_a.folder} and {evaluation_b.folder}"
        )
    if scores_a.signature != scores_b.signature:
        yield f"the signatures differ: {scores_a.signature} and {scores_b.signature}"
    for name, evaluation, scores in (("A", evaluation_a, scores_a), ("B", evaluation_b, scores_b)):
        stored = evaluation.record.read_scores().get(metric, {}).get("value")
        if stored is not None and abs(stored - scores.sample.score) > SCORE_TOLERANCE:
            yield f"the stored score of {name} is {stored:.2f}: the metric has changed, `rescore` renews it"


def read_spec(record: Record) -> dict[str, Any]:
    """Read `spec.json` as a dict: fingerprint, role or labels, specification; empty if missing."""
    return read_json(record.folder / "spec.json") or {}


def get_role(spec: Mapping[str, Any]) -> str:
    """Return `start` or `teacher` as `spec.json` states it; `cell` where it states no role."""
    return str(spec.get("role", "cell"))  # only artifacts have the key


def compare_specs(spec_a: Mapping[str, Any], spec_b: Mapping[str, Any]) -> Iterator[SpecDifference]:
    """Yield each field (`objectives[0].beta`) with a different value in both; one side may lack it.

    A cell is compared with a reference model by the specification of its SFT student.
    """
    fields_a, fields_b = spec_a.get("spec", {}), spec_b.get("spec", {})
    role_a, role_b = get_role(spec_a), get_role(spec_b)
    if role_a != role_b:
        yield SpecDifference("role", role_a, role_b)
    if (role_a == "cell") != (role_b == "cell"):
        fields_a, fields_b = fields_a.get("start", fields_a), fields_b.get("start", fields_b)
    flat_a, flat_b = dict(_flatten_spec(fields_a)), dict(_flatten_spec(fields_b))
    for name in dict.fromkeys(chain(flat_a, flat_b)):
        if flat_a.get(name) != flat_b.get(name):
            yield SpecDifference(name, flat_a.get(name), flat_b.get(name))


def describe_relation(spec_a: Mapping[str, Any], spec_b: Mapping[str, Any]) -> str | None:
    """Return `B started from A` or `A learnt from the teacher B`; None if neither."""
    for cell, model, names in ((spec_a, spec_b, "AB"), (spec_b, spec_a, "BA")):
        role = get_role(model)
        if get_role(cell) == "cell" != role and cell.get("spec", {}).get(role) == model.get("spec"):
            verb = "started from" if role == "start" else "learnt from the teacher"
            return f"{names[0]} {verb} {names[1]}"
    return None


def _flatten_spec(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every leaf of nested dicts and lists, such as `objectives[0].beta`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten_spec(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flatten_spec(item, f"{name}[{index}]")
    else:
        yield name, value
