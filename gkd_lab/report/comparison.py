"""Two records side by side: how they were made, how they score, and where they differ most."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkd_lab.config import SpecError
from gkd_lab.config.errors import unknown
from gkd_lab.metrics import METRICS, score_many
from gkd_lab.report.spec_diff import Field, described, differences, relation, role_of
from gkd_lab.statistics.bootstrap import Sample, bootstrap, middle, sample_of
from gkd_lab.statistics.effects import SAME, Effect, over_examples
from gkd_lab.store import Record
from gkd_lab.store.predictions import Row, by_prompt, read_predictions
from gkd_lab.tables.evaluations import Finished, common, finished

RESAMPLES = 10_000
SHARED_ENOUGH = 0.5
"""Share of the smaller set of prompts from which on both must have it to be paired: made data of other
seeds repeat a prompt now and then."""


@dataclass(frozen=True)
class Side:
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
class Example:
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

    a: Side
    b: Side
    differs: tuple[Field, ...]
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
    examples: tuple[Example, ...]
    differing: int
    """Prompts whose scores differ; 0 if unpaired."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Judged:
    """What one record wrote for the evaluation, by prompt."""

    rows: list[Row]
    groups: list[list[int]]
    sample: Sample
    values: list[float]
    signature: str
    resampled: tuple[float, float]

    def keys(self) -> list[tuple[Any, ...]]:
        """What tells prompts apart: text, references, and which of several equal ones it is."""
        seen: Counter[tuple[Any, ...]] = Counter()
        found = []
        for group in self.groups:
            first = self.rows[group[0]]
            key = (first["prompt"], *first["references"])
            found.append((seen[key], *key))
            seen[key] += 1
        return found


def compare(
    a: Record, b: Record, *, evaluation: str | None = None, metric: str | None = None, examples: int = 10
) -> Comparison:
    """B minus A in one metric of one evaluation that both have; scores are computed from the stored texts.

    Paired by prompt, where at least half of the prompts are the same. Raises SpecError for a request
    that these records cannot answer and DamagedPredictions.
    """
    if metric is not None and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    there = finished(a), finished(b)
    ours, theirs, others = common(*there, evaluation)
    chosen = metric or _first_metric(ours, theirs)
    judged = _judge(ours, chosen), _judge(theirs, chosen)
    effect, paired, shared = _effect(*judged)
    listed = _examples(*judged, shared) if paired else []
    return Comparison(
        a=_side(a, judged[0]),
        b=_side(b, judged[1]),
        differs=tuple(differences(a, b)),
        evaluation=ours.name,
        other_evaluations=others,
        metric=chosen,
        signature=judged[0].signature,
        effect=effect,
        paired=paired,
        n=len(shared) if paired else sum(len(one.groups) for one in judged),
        examples=tuple(listed[:examples]),
        differing=len(listed),
        relation=relation(a, b),
        notes=tuple(_notes(ours, theirs, chosen, *judged, paired, len(shared))),
    )


def _first_metric(a: Finished, b: Finished) -> str:
    both = [metric for metric in a.metrics if metric in b.metrics and metric in METRICS]
    if not both:
        raise SpecError(
            f"no common metric: {', '.join(a.metrics)} and {', '.join(b.metrics)}; --metric computes one of "
            f"{', '.join(METRICS)}"
        )
    return both[0]


def _judge(found: Finished, metric: str) -> _Judged:
    rows = read_predictions(found.part)
    groups = by_prompt(rows)
    prompts = [number for number, group in enumerate(groups) for _ in group]
    texts, references = [row["prediction"] for row in rows], [row["references"] for row in rows]
    try:
        score = score_many([metric], texts, references, prompts=prompts)[metric]
    except ValueError as error:
        raise SpecError(f"{found.part.folder}: {error}") from error
    sample = sample_of(metric, rows, score.per_example)
    values = [float(np.mean([score.per_example[n] for n in group])) for group in groups]
    ends = middle(bootstrap([sample], resamples=RESAMPLES)[0])
    return _Judged(rows, groups, sample, values, score.signature, ends)


def _effect(a: _Judged, b: _Judged) -> tuple[Effect, bool, list[tuple[int, int]]]:
    """(B minus A, whether paired, the prompts of A and of B that are the same)."""
    places = {key: place for place, key in enumerate(a.keys())}
    shared = [(places[key], place) for place, key in enumerate(b.keys()) if key in places]
    if len(shared) < SHARED_ENOUGH * min(len(a.groups), len(b.groups)):
        difference = b.sample.value - a.sample.value
        (first,), (second,) = (
            bootstrap([one.sample], resamples=RESAMPLES, seed=seed) for seed, one in enumerate((a, b))
        )
        smaller = min(len(a.groups), len(b.groups))
        over = "bootstrap over the examples of each, not paired"
        return over_examples(difference, second - first, smaller, 1, over), False, shared
    ours, theirs = a.sample.take([n for n, _ in shared]), b.sample.take([n for _, n in shared])
    first, second = bootstrap([ours, theirs], resamples=RESAMPLES)
    over = "paired bootstrap over examples"
    effect = over_examples(theirs.value - ours.value, second - first, len(shared), 1, over)
    return effect, True, shared


def _examples(a: _Judged, b: _Judged, shared: Sequence[tuple[int, int]]) -> list[Example]:
    """Those whose scores differ, the largest difference first."""
    found = [_example(a, b, *pair) for pair in shared if a.values[pair[0]] != b.values[pair[1]]]
    return sorted(found, key=lambda one: -abs(one.score_b - one.score_a))


def _example(a: _Judged, b: _Judged, ours: int, theirs: int) -> Example:
    first, second = a.rows[a.groups[ours][0]], b.rows[b.groups[theirs][0]]
    return Example(
        number=theirs + 1,
        prompt=second["prompt"],
        references=tuple(second["references"]),
        a=first["prediction"],
        b=second["prediction"],
        score_a=a.values[ours],
        score_b=b.values[theirs],
    )


def _side(record: Record, judged: _Judged) -> Side:
    spec = described(record)
    low, high = judged.resampled
    return Side(
        record=str(record.folder),
        fingerprint=str(spec.get("fingerprint", ""))[:8],
        role=role_of(spec),
        score=judged.sample.value,
        low=low,
        high=high,
        n=len(judged.groups),
    )


def _notes(
    ours: Finished, theirs: Finished, metric: str, a: _Judged, b: _Judged, paired: bool, shared: int
) -> Iterator[str]:
    sizes = len(a.groups), len(b.groups)
    if not paired:
        yield f"not paired: {shared} prompts are the same, of {sizes[0]} in A and {sizes[1]} in B"
    elif shared < max(sizes):
        yield (
            f"paired over the {shared} prompts that are the same, of {sizes[0]} in A and {sizes[1]} in B; "
            "the scores of A and B are over all of their own"
        )
    if ours.folder != theirs.folder:
        yield f"the evaluations share a name, not all settings: {ours.folder} and {theirs.folder}"
    if a.signature != b.signature:
        yield f"the signatures differ: {a.signature} and {b.signature}"
    for name, found, judged in (("A", ours, a), ("B", theirs, b)):
        stored = found.part.scores().get(metric, {}).get("value")
        if stored is not None and abs(stored - judged.sample.value) > SAME:
            yield f"the stored score of {name} is {stored:.2f}: the metric has changed, `rescore` renews it"
