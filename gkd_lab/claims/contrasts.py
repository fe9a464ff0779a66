"""The verbs that claims are built from: each compares the models of every column.

A column is all that stays the same in a contrast: task, student, decoding, divergence, ... A contrast is
a sum of scores of which the claim says that it is above 0, or above minus a margin.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from gkd_lab.claims.model_scores import ComparedModel, ModelScores
from gkd_lab.claims.model_settings import (
    STUDENT_SIZES,
    Conditions,
    Settings,
    format_distinction,
    format_setting,
    meets_condition,
)
from gkd_lab.statistics.noise import Array, ExtremePart

Models = Sequence[ComparedModel]


@dataclass(frozen=True)
class Selector:
    """Selects models of a column by the settings that they were made with."""

    name: str
    conditions: Conditions

    def matches(self, model: ComparedModel) -> bool:
        """Return whether a model meets the conditions; only trained cells do, if no role is named."""
        conditions = {"role": "cell", **self.conditions}
        return all(meets_condition(model[name], condition) for name, condition in conditions.items())


ALL_CELLS = Selector("", {})
SFT_STUDENT = Selector("the SFT student", {"role": "start"})
TEACHER = Selector("the teacher", {"role": "teacher"})


@dataclass(frozen=True)
class Contrast:
    """A sum of scores that a claim says is above minus its margin."""

    label: str
    models: tuple[ComparedModel, ...]
    parts: tuple[ExtremePart, ...]
    """Weights of the models."""
    margin: float = 0.0
    """Points; what the claim calls "no worse" may be this much worse."""
    ratio: tuple[Array, Array] | None = None
    """Weights of a quotient to report beside the sum."""
    measures_ratio: bool = False
    """Whether the quotient is itself what is measured."""

    @property
    def is_linear(self) -> bool:
        """Whether it is one weighted sum, without a choice of the largest score."""
        return all(len(part.matrix) == 1 for part in self.parts)


@dataclass(frozen=True)
class ColumnContrasts:
    """The contrasts of one column, and what it lacks."""

    shared: Settings
    contrasts: list[Contrast]
    missing: list[str] = field(default_factory=list)
    """Names of models that the claim names and the table lacks."""
    unfinished: list[ComparedModel] = field(default_factory=list)
    """Planned models of the contrasts that have no score yet."""


@dataclass(frozen=True)
class Contrasts:
    """All columns of a claim, and a reason for each verb that found nothing to compare."""

    columns: list[ColumnContrasts]
    reasons: list[str]

    def __add__(self, other: "Contrasts") -> "Contrasts":
        return Contrasts(self.columns + other.columns, self.reasons + other.reasons)


Plan = tuple[list[Contrast], list[str]]
"""Contrasts of one column, and the names of the models that it lacks."""


def paired_difference(
    scores: ModelScores,
    better: Selector,
    worse: Sequence[Selector],
    margins: Mapping[str, float] | None = None,
) -> Contrasts:
    """Compare each `better` model with each `worse` one: better minus worse.

    margins: task -> points by which better may be worse; None: it must be better.
    """

    def build(models: Models, shared: Settings) -> Plan:
        uppers = _find(models, better)
        lowers = [(selector, _find(models, selector)) for selector in worse]
        margin = 0.0 if margins is None else margins.get(shared["task"], margins["other tasks"])
        contrasts = [
            _compare_linear(
                models, _name_pair(models[upper], models[lower], selector, is_ambiguous=len(uppers) > 1),
                _weigh(models, [upper]) - _weigh(models, [lower]), margin,
            )
            for upper in uppers
            for selector, indices in lowers
            for lower in indices
        ]  # fmt: skip
        return contrasts, [better.name] if not uppers else _list_missing(lowers)

    return _compare_columns(scores, _list_varying(better, *worse), build)


def best_of(scores: ModelScores, better: Selector, worse: Sequence[Selector]) -> Contrasts:
    """Compare the best of the `better` models with the best of the `worse` ones."""

    def build(models: Models, shared: Settings) -> Plan:
        upper = _find(models, better)
        lowers = [(selector, _find(models, selector)) for selector in worse]
        lower = [index for _, indices in lowers for index in indices]
        if not upper or not lower:
            return [], [better.name] if not upper else [selector.name for selector in worse]
        parts = _largest(models, upper, 1), _largest(models, lower, -1)
        return [Contrast("against the best of the others", tuple(models), parts)], _list_missing(lowers)

    return _compare_columns(scores, _list_varying(better, *worse), build)


def ranked(scores: ModelScores, *selectors: Selector) -> Contrasts:
    """Compare each model with the next one of the list; pairs that a column lacks are left out."""

    def build(models: Models, shared: Settings) -> Plan:
        groups = [(selector, _find(models, selector)) for selector in selectors]
        contrasts = [
            _compare_linear(
                models, f"{upper.name} against {lower.name}", _weigh(models, first) - _weigh(models, second)
            )
            for (upper, first), (lower, second) in pairwise(groups)
            if first and second
        ]
        return contrasts, _list_missing(groups)

    return _compare_columns(scores, _list_varying(*selectors), build)


def monotone(scores: ModelScores, axis: str, *, is_falling: bool = False) -> Contrasts:
    """Compare each value of an axis with the one before: the score rises, or falls, at each step."""

    def build(models: Models, shared: Settings) -> Plan:
        groups = _group(models, axis)
        sign = -1 if is_falling else 1
        contrasts = [
            _compare_linear(
                models,
                _name_step(axis, before, after),
                sign * (_weigh(models, groups[after]) - _weigh(models, groups[before])),
            )
            for before, after in pairwise(groups)
        ]
        return contrasts, [] if contrasts else [f"two values of {axis}"]

    return _compare_columns(scores, _list_varying(axis), build)


def shrinking_span(scores: ModelScores, axis: str, over: str, *, is_descending: bool = False) -> Contrasts:
    """Compare the span (largest minus smallest score) over `over` at each value of an axis with the next.

    The span shrinks upwards along the axis, or from its largest value down. Only spans over equal values
    of `over` are compared: a span grows with their number.
    """

    def build(models: Models, shared: Settings) -> Plan:
        groups = {value: indices for value, indices in _group(models, axis).items() if len(indices) > 1}
        order = list(groups)[::-1] if is_descending else list(groups)
        contrasts = [
            Contrast(
                _name_step(axis, before, after),
                tuple(models),
                (*_span(models, groups[before], 1), *_span(models, groups[after], -1)),
            )
            for before, after in pairwise(order)
            if _list_values(models, groups[before], over) == _list_values(models, groups[after], over)
        ]
        values = f"students of known size ({', '.join(STUDENT_SIZES)})"
        values = values if axis == "student" else f"values of {axis}"
        return contrasts, [] if contrasts else [f"two {values} over the same {over}s"]

    return _compare_columns(scores, _list_varying(axis, over), build)


def span_below_effect(scores: ModelScores, better: Selector, worse: Selector, over: str) -> Contrasts:
    """Compare the least of better minus worse over `over` with the span of the better over it."""

    def build(models: Models, shared: Settings) -> Plan:
        uppers, lowers = _group(models, over, better), _group(models, over, worse)
        values = [value for value in uppers if value in lowers]
        missing = _list_missing([(better, uppers), (worse, lowers)])
        if not values or len(uppers) < 2:
            return [], missing or [f"two values of {over}"]
        effects = np.array([_weigh(models, lowers[v]) - _weigh(models, uppers[v]) for v in values])
        everything = [index for indices in uppers.values() for index in indices]
        parts = ExtremePart(-1, effects), *_span(models, everything, -1)
        missing += [
            f"{worse.name} at {format_setting(over, value)}" for value in uppers if value not in lowers
        ]
        return [Contrast("least effect minus span", tuple(models), parts)], missing

    return _compare_columns(scores, _list_varying(better, worse, over), build)


def gain_ratio(
    scores: ModelScores,
    better: Selector,
    baselines: Sequence[Selector],
    factor: float,
    average_over: str,
    *,
    of_best: bool = False,
    start: Selector = SFT_STUDENT,
) -> Contrasts:
    """Compare a gain over the start, averaged over an axis, with `factor` times that of the baselines.

    The baselines' gain is their mean, or with `of_best` that of the best of them at each value of the axis.
    """
    selectors = (better, start, *baselines)

    def build(models: Models, shared: Settings) -> Plan:
        groups = [_group(models, average_over, selector, is_ordered=False) for selector in selectors]
        values = [value for value in groups[0] if all(value in group for group in groups)]
        if not values:
            return [], _list_missing(zip(selectors, groups, strict=True)) or [f"a common {average_over}"]

        def average(group: Mapping[Any, list[int]]) -> Array:
            return np.mean([_weigh(models, group[value]) for value in values], axis=0)

        gain = average(groups[0]) - average(groups[1])
        options = _list_choices([[_weigh(models, g[v]) for g in groups[2:]] for v in values], of_best)
        rivals = np.array([np.mean(choice, axis=0) for choice in options]) - average(groups[1])
        parts = (ExtremePart(1, gain[None]), ExtremePart(-1, factor * rivals))
        means = np.array([np.mean([s.value for s in m.scores.values()] or [np.nan]) for m in models])
        best = rivals[int(np.argmax(rivals @ np.nan_to_num(means)))]
        ratio = Contrast(_name_factor(factor, baselines), tuple(models), parts, ratio=(gain, best))
        return [ratio, _compare_linear(models, "its own gain", gain)], []

    return _compare_columns(scores, _list_varying(*selectors, average_over), build)


def measured_difference(
    scores: ModelScores, first: Selector, second: Selector, *, as_ratio: bool = False
) -> Contrasts:
    """Measure the mean of `first` minus that of `second`, or their ratio."""

    def build(models: Models, shared: Settings) -> Plan:
        groups = [(selector, _find(models, selector)) for selector in (first, second)]
        missing = _list_missing(groups)
        if missing:
            return [], missing
        upper, lower = (_weigh(models, indices) for _, indices in groups)
        if not as_ratio:
            return [_compare_linear(models, "difference", upper - lower)], []
        used = [index for index in range(len(models)) if upper[index] or lower[index]]
        ratio, part = (upper[used], lower[used]), ExtremePart(1, (upper - lower)[None, used])
        used_models = tuple(models[index] for index in used)
        return [Contrast("ratio", used_models, (part,), ratio=ratio, measures_ratio=True)], []

    return _compare_columns(scores, _list_varying(first, second), build)


def difference_of_changes(scores: ModelScores, first: Selector, second: Selector, axis: str) -> Contrasts:
    """Measure the change of `first` minus that of `second` between an axis's two largest values."""

    def build(models: Models, shared: Settings) -> Plan:
        uppers, lowers = _group(models, axis, first), _group(models, axis, second)
        values = [value for value in uppers if value in lowers]
        if len(values) < 2:
            return [], _list_missing([(first, uppers), (second, lowers)]) or [f"two values of {axis}"]
        before, after = values[-2:]
        weights = _weigh(models, uppers[after]) - _weigh(models, uppers[before])
        weights -= _weigh(models, lowers[after]) - _weigh(models, lowers[before])
        return [_compare_linear(models, "change", weights)], []

    return _compare_columns(scores, _list_varying(first, second, axis), build)


# ---- columns ----


def _compare_columns(
    scores: ModelScores, varying: Collection[str], build: Callable[[Models, Settings], Plan]
) -> Contrasts:
    """Build each column's contrasts on its finished models; name the planned ones without a score."""
    columns = []
    for column in scores.columns(varying):
        planned, missing = build(column.models, column.shared)
        used = {id(model): model for contrast in planned for model in _list_used_models(contrast)}
        unfinished = [model for model in used.values() if not model.scores]
        finished = [model for model in column.models if model.scores]
        contrasts = build(finished, column.shared)[0] if unfinished else planned
        columns.append(ColumnContrasts(column.shared, contrasts, missing, unfinished))
    if not columns:
        return Contrasts([], [scores.empty_reason or "no cells"])
    if any(column.contrasts or column.unfinished for column in columns):
        return Contrasts(columns, [])
    missing = min((column.missing for column in columns), key=len)
    return Contrasts(columns, [f"no {' and no '.join(missing)}"])


def _list_used_models(contrast: Contrast) -> list[ComparedModel]:
    """Return the models that have a weight in a contrast."""
    weights = sum(np.abs(part.matrix).sum(axis=0) for part in contrast.parts)
    return [model for model, weight in zip(contrast.models, np.atleast_1d(weights), strict=True) if weight]


def _list_varying(*parts: Selector | str) -> set[str]:
    """Return the settings that may differ in a column: those of selectors, and axes."""
    return {name for part in parts for name in ([part] if isinstance(part, str) else part.conditions)}


def _find(models: Models, selector: Selector) -> list[int]:
    """Return the indices of the models that a selector matches, in order."""
    return [index for index, model in enumerate(models) if selector.matches(model)]


def _group(
    models: Models, axis: str, selector: Selector = ALL_CELLS, *, is_ordered: bool = True
) -> dict[Any, list[int]]:
    """Map each value of an axis to the indices of the selected models that have it.

    Values are sorted; students of unknown size are left out where their order matters.
    """
    groups: dict[Any, list[int]] = {}
    for index in _find(models, selector):
        if models[index][axis] is not None:
            groups.setdefault(models[index][axis], []).append(index)
    return {value: groups[value] for value in _sort_values(axis, groups, is_ordered)}


def _sort_values(axis: str, values: Collection[Any], is_ordered: bool) -> list[Any]:
    """Sort values; students small to large, those of unknown size last, or not at all among several."""
    if axis != "student":
        return sorted(values)
    sizes = [size for size in STUDENT_SIZES if size in values]
    return sizes if is_ordered and len(values) > 1 else [*sizes, *(v for v in values if v not in sizes)]


def _list_values(models: Models, indices: Iterable[int], name: str) -> set[Any]:
    """Return the values of a setting among some models."""
    return {models[index][name] for index in indices}


def _list_missing(groups: Iterable[tuple[Selector, Collection[Any]]]) -> list[str]:
    """Return the names of the selectors that matched nothing."""
    return [selector.name for selector, matches in groups if not matches]


# ---- weights ----


def _weigh(models: Models, indices: Sequence[int]) -> Array:
    """Return the (M,) weights of the mean of some models."""
    weights = np.zeros(len(models))
    weights[list(indices)] = 1 / len(indices)
    return weights


def _largest(models: Models, indices: Sequence[int], sign: int) -> ExtremePart:
    """Return `sign` times the largest score of some models."""
    return ExtremePart(sign, np.eye(len(models))[list(indices)])


def _span(models: Models, indices: Sequence[int], sign: int) -> tuple[ExtremePart, ExtremePart]:
    """Return `sign` times the largest minus the smallest score of some models, as two parts."""
    largest = _largest(models, indices, sign)
    return largest, ExtremePart(sign, -largest.matrix)


def _list_choices(options: Sequence[Sequence[Array]], of_best: bool) -> list[list[Array]]:
    """Return the weights of each way to choose one baseline per value; else one way, their means."""
    if not of_best:
        return [[np.mean(choices, axis=0) for choices in options]]
    ways: list[list[Array]] = [[]]
    for choices in options:
        ways = [[*way, choice] for way in ways for choice in choices]
    return ways


def _compare_linear(models: Models, label: str, weights: Array, margin: float = 0.0) -> Contrast:
    """Return the contrast of one weighted sum, with only the models that have a weight."""
    used = [index for index, weight in enumerate(weights) if weight]
    part = ExtremePart(1, weights[None, used])
    return Contrast(label, tuple(models[index] for index in used), (part,), margin)


# ---- labels ----


def _name_pair(upper: ComparedModel, lower: ComparedModel, selector: Selector, *, is_ambiguous: bool) -> str:
    """Format `against ImitKD`; if ambiguous, `<settings of the better model> against ImitKD`."""
    label = f"against {selector.name}"
    return f"{format_distinction(upper.settings, lower.settings)} {label}" if is_ambiguous else label


def _name_step(axis: str, before: Any, after: Any) -> str:
    """Format two values of an axis: `from forward KL to JSD(0.1)`."""
    return f"from {format_setting(axis, before)} to {format_setting(axis, after)}"


def _name_factor(factor: float, baselines: Sequence[Selector]) -> str:
    """Format `said: 2.1`, or `said: 2.1 times ImitKD` where there is one baseline."""
    return f"said: {factor:g}{f' times {baselines[0].name}' if len(baselines) == 1 else ''}"
