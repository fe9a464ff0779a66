"""Scores of models as claims read them: from the long table of a run, or from the paper's numbers.

A model is what cells of several seeds have in common: their settings, under one evaluation and metric. Its
settings are resolved values (lmbda, loss, beta, role, ...) and never a method's name, so the same claim
reads the paper's figures and our own tables.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from gkd_lab.claims import paper
from gkd_lab.claims.model_settings import (
    MODEL_SETTINGS,
    SETTING_NAMES,
    Conditions,
    Settings,
    describe_condition,
    meets_condition,
)
from gkd_lab.config.errors import ConfigError
from gkd_lab.config.settings import METHODS
from gkd_lab.metrics import METRICS
from gkd_lab.statistics.example_scores import ExampleLookup, SeedScore, build_sample, find_no_examples
from gkd_lab.statistics.noise import ScoreSample
from gkd_lab.tables.long_table import list_axes


@dataclass(frozen=True)
class ComparedModel:
    """Cells that differ in their seed only, a shared SFT student, or a teacher."""

    settings: Settings
    scores: dict[int, SeedScore]
    """Seed -> finished score; empty where none is."""

    def __getitem__(self, name: str) -> Any:
        return self.settings.get(name)


@dataclass(frozen=True)
class Column:
    """Models that differ only in what a claim compares; all other settings are shared."""

    shared: Settings
    models: list[ComparedModel]


@dataclass(frozen=True)
class ModelScores:
    """Models that claims compare, with what is known of their examples."""

    models: list[ComparedModel]
    find_examples: ExampleLookup = find_no_examples
    problems: tuple[str, ...] = ()
    """What of the table was left out, and why."""
    empty_reason: str | None = None
    """First condition that left no trained cell."""

    def where(self, *conditions: Conditions, **others: Any) -> "ModelScores":
        """Return the models that meet all conditions; quality scores, unless `measure` is named.

        A start or teacher is kept if it meets the conditions on what it shares with trained cells.
        """
        merged: dict[str, Any] = {"measure": "quality"}
        for condition in (*conditions, others):
            merged.update(condition)
        models, reason = self.models, self.empty_reason
        if not models:
            reason = reason or "no cells"
        for name in sorted(merged, key=lambda name: name != "task"):
            models = [model for model in models if _meets(model, name, merged[name])]
            if not reason and not any(model["role"] == "cell" for model in models):
                reason = f"no {describe_condition(name, merged[name])}"
        return ModelScores(models, self.find_examples, self.problems, reason)

    def columns(self, varying: Iterable[str]) -> list[Column]:
        """Group the models into columns that share every setting but the varying ones."""
        dependent = {name for field_name in varying for name in _DEPENDENT_SETTINGS.get(field_name, ())}
        excluded = {*varying, *dependent}
        shared = [name for name in SETTING_NAMES if name not in excluded]
        groups: dict[tuple[Any, ...], list[ComparedModel]] = {}
        for model in self.models:
            if "role" in excluded or model["role"] == "cell":
                groups.setdefault(tuple(model[name] for name in shared), []).append(model)
        return [Column(dict(zip(shared, key, strict=True)), models) for key, models in groups.items()]

    def collect_sample(self, models: Sequence[ComparedModel]) -> tuple[ScoreSample | None, list[str]]:
        """Return (scores over the seeds that all models have, notes on what these do not cover).

        No sample: the models have no seed in common. Examples are used where all scores have them.
        """
        seeds = sorted(set.intersection(*(set(model.scores) for model in models)))
        if not seeds:
            return None, []
        table = [[model.scores[seed] for seed in seeds] for model in models]
        sample, note = build_sample(table, self.find_examples)
        return sample, [*([note] if note else []), *_describe_coverage(models, seeds)]


def _describe_coverage(models: Sequence[ComparedModel], seeds: Sequence[int]) -> list[str]:
    """Return notes on seeds that some model lacks, and on an SFT student that all seeds share."""
    unpaired = sorted(set().union(*(model.scores for model in models)) - set(seeds))
    starts = {model.scores[seed].start for model in models for seed in seeds}
    notes = [f"not all models have seed {', '.join(map(str, unpaired))}"] if unpaired else []
    return [*notes, "one SFT student"] if len(seeds) > 1 and len(starts) == 1 and starts != {None} else notes


def _meets(model: ComparedModel, name: str, condition: Any) -> bool:
    """Return whether a model meets one condition; settings of trained cells do not apply to references."""
    if model["role"] != "cell" and name in MODEL_SETTINGS and name != "role":
        return True
    return meets_condition(model[name], condition)


_DEPENDENT_SETTINGS = {
    "temperature": ("evaluation",),
    "beta": ("loss",),
    "loss": ("beta",),
    "anchor": ("alpha", "loss", "beta"),
    "role": MODEL_SETTINGS,
}
"""Setting -> settings that cannot stay the same where it changes."""


# ---- building ----


@dataclass
class _ModelCollector:
    """Collects scores by settings and seed, and counts what it leaves out."""

    models: dict[tuple[Any, ...], ComparedModel] = field(default_factory=dict)
    conflicts: set[tuple[Any, ...]] = field(default_factory=set)
    problems: Counter[str] = field(default_factory=Counter)

    def add(self, settings: Settings, seed: int | None, score: SeedScore | None) -> None:
        """Add a score; None for a seed or score that is missing, which keeps the model as planned."""
        key = tuple(settings.get(name) for name in SETTING_NAMES)
        model = self.models.setdefault(key, ComparedModel(settings, {}))
        if seed is None or score is None:
            return
        stored = model.scores.setdefault(seed, score)
        if settings["role"] == "cell" and stored is not score:
            if (stored.key, stored.value) == (score.key, score.value):
                self.problems["repeated rows"] += 1
            else:
                self.conflicts.add((*key, seed))

    def finish(self) -> list[ComparedModel]:
        """Return the models without the scores that contradict each other."""
        for *key, seed in self.conflicts:
            del self.models[tuple(key)].scores[seed]
        if self.conflicts:
            self.problems["scores that differ though their settings and seed are equal"] += len(
                self.conflicts
            )
        return list(self.models.values())

    def describe_problems(self) -> tuple[str, ...]:
        """Return a text per kind of score that was left out."""
        return tuple(f"left out: {count} {text}" for text, count in self.problems.items())


def _build_reference_settings(settings: Settings, role: str) -> Settings:
    """Return the settings of a cell's start or teacher: what the cell shares with it."""
    return {**settings, **dict.fromkeys(MODEL_SETTINGS), "role": role}


# ---- the paper ----

_OTHER_MEASURES = {"self_bleu": "self_bleu", "entailment": "entailment", "step_time": "step_time",
                   "step_seconds": "step_time"}  # fmt: skip
"""Metric -> measure, where it is not a model's quality."""


def load_paper_scores(figures: Iterable[str] | None = None) -> ModelScores:
    """Load the paper's numbers of these figures (None: of all), one seed each."""
    frame = paper.load_values()
    selected = frame if figures is None else frame[frame["figure"].isin(tuple(figures))]
    collector = _ModelCollector()
    for row in selected.to_dict("records"):
        _add_paper_row(collector, {str(k): None if pd.isna(v) else v for k, v in row.items()})
    return ModelScores(collector.finish())


def _add_paper_row(collector: _ModelCollector, row: dict[str, Any]) -> None:
    """Add a number of the paper and, where it is known, that of its start (0 for gains)."""
    settings = {
        **{name: row[name] for name in ("task", "metric", "student", "decoding", "temperature")},
        **{name: row[name] for name in ("teacher_temperature", "role", "lmbda", "beta", "alpha")},
        "measure": _OTHER_MEASURES.get(row["metric"], "quality"),
        "pair": "self" if row["figure"] == "A.10" else "smaller",
        "train_share": row["train_share"] if row["figure"] == "3" else None,  # elsewhere it is no axis
        "loss": _classify_method_loss(row["method"], row["divergence"]),
        "anchor": "start" if row["method"] == "rlef" else None,
    }
    collector.add(settings, 0, SeedScore(row["value"], row["error"]))
    is_gain = row["form"] == "gain"
    if row["role"] == "cell" and (is_gain or row["start"] is not None):
        error = 0.0 if is_gain else row["gain_error"] - row["error"]
        start = SeedScore(0.0 if is_gain else row["start"], error)
        collector.add(_build_reference_settings(settings, "start"), 0, start)


def _classify_method_loss(method: Any, divergence: Any) -> str | None:
    """Return the method's name if it trains with cross-entropy (`seqkd`, `sft`), else `divergence`."""
    settings = METHODS.get(method, {}) if isinstance(method, str) else {}
    return str(method) if settings.get("type") == "cross_entropy" else divergence


# ---- tables ----

_REQUIRED_COLUMNS = ("cell", "role", "task", "seed", "lmbda", "metric", "value")
_AXIS_SETTINGS = {
    "teacher_temperature": "teacher_temperature",
    "learning_rate": "learning_rate",
    "train_rows": "train_share",
}
"""Axis -> setting that it sets."""
_METHOD_AXES = ("method", "divergence", "source", "alpha", "anchor", "student")
"""Axes that are read from the resolved losses, data and models instead."""


def load_table_scores(table: pd.DataFrame, find_examples: ExampleLookup = find_no_examples) -> ModelScores:
    """Read the long table: the first metric of each evaluation that has scores, Self-BLEU and step times.

    Scores outside of their metric's range, rows without a seed, and scores that contradict each other are
    left out and named. Raises ConfigError for a table without the columns of a long table.
    """
    missing = [name for name in _REQUIRED_COLUMNS if name not in table.columns]
    if missing:
        raise ConfigError(
            f"the table has no column {', '.join(missing)}; claims read the long table of `gkd_lab.table` "
            f"(a row per cell, evaluation and metric)"
        )
    reader = _TableReader(table)
    return ModelScores(reader.read(), find_examples, reader.collector.describe_problems())


class _TableReader:
    """Reads the rows of one long table."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.collector = _ModelCollector()
        self.axes = _list_declared_axes(table)
        columns = [_list_values(table[name]) for name in table.columns]
        names = list(table.columns)
        self.rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        self.quality_metrics = self._find_quality_metrics()
        self.scale = self._find_points()
        self.references = {
            (row["role"], row["cell"], row.get("evaluation"), row["metric"]): row
            for row in self.rows
            if row["role"] != "cell"
        }
        row_counts = [float(row["train_rows"]) for row in self.rows if row.get("train_rows") is not None]
        self.max_train_rows = max(row_counts, default=None)

    def read(self) -> list[ComparedModel]:
        """Return all models of the table."""
        for row in self.rows:
            measure = self._classify_measure(row)
            if row["role"] == "cell" and measure is not None:
                for point in self._list_points(row):
                    self._add_row({**row, **point}, measure)
        return self.collector.finish()

    def _find_quality_metrics(self) -> set[tuple[Any, Any, Any]]:
        """Return (task, evaluation, metric) of the first metric of each evaluation that has a score."""
        first: dict[tuple[Any, Any], tuple[Any, bool]] = {}
        for row in self.rows:
            key, metric = (row["task"], row.get("evaluation")), row["metric"]
            if metric not in _OTHER_MEASURES and metric != "train_seconds":
                has_value = row["value"] is not None
                if key not in first or (has_value and not first[key][1]):
                    first[key] = (metric, has_value)
        return {(*key, metric) for key, (metric, _) in first.items()}

    def _find_points(self) -> dict[tuple[Any, Any, Any], float]:
        """Map the scores of lm-eval that are shares of 1 to 100, the points of a share."""
        largest: dict[tuple[Any, Any, Any], float] = {}
        for row in self.rows:
            if row.get("decoding") is None and row["metric"] not in METRICS and row["value"] is not None:
                key = (row["task"], row.get("evaluation"), row["metric"])
                largest[key] = max(largest.get(key, 0.0), abs(float(row["value"])))
        return {key: 100.0 for key, value in largest.items() if value <= 1}

    def _classify_measure(self, row: Mapping[str, Any]) -> str | None:
        """Return what a row measures: quality, self_bleu, entailment, step_time; None for other metrics."""
        other = _OTHER_MEASURES.get(row["metric"])
        is_quality = (row["task"], row.get("evaluation"), row["metric"]) in self.quality_metrics
        return other or ("quality" if is_quality else None)

    def _list_points(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the distinct axis values of the grid points that a collapsed cell stands for."""
        points = row.get("stands_for")
        points = json.loads(points) if isinstance(points, str) else points
        names = {"lmbda", "seed", *self.axes} - set(_METHOD_AXES)
        if not points:
            return [{}]
        selected = [{name: value for name, value in point.items() if name in names} for point in points]
        return list({str(sorted(point.items())): point for point in selected}.values())

    def _add_row(self, row: dict[str, Any], measure: str) -> None:
        """Add the score of a cell, and those of its start and teacher under the same metric."""
        settings = self._build_settings(row, measure)
        seed = None if row["seed"] is None else int(row["seed"])
        if seed is None:
            self.collector.problems["rows without a seed"] += 1
        self.collector.add(settings, seed, self._read_score(row, row.get("start_cell")))
        for role in ("start", "teacher") if measure != "step_time" else ():
            key = (role, row.get(f"{role}_cell"), row.get("evaluation"), row["metric"])
            if key in self.references:
                reference = _build_reference_settings(settings, role)
                self.collector.add(
                    reference, seed, self._read_score(self.references[key], row.get("start_cell"))
                )

    def _read_score(self, row: Mapping[str, Any], start: str | None) -> SeedScore | None:
        """Return a row's score in points; None where it is missing or outside of its metric's range.

        start: SFT student of the cell that the score belongs to, or is compared with.
        """
        if row["value"] is None:
            return None
        value = float(row["value"]) * self.scale.get((row["task"], row.get("evaluation"), row["metric"]), 1.0)
        if row["metric"] in METRICS and not -1e-9 <= value <= 100 + 1e-9 and row["metric"] != "matthews":
            self.collector.problems[f"scores outside of 0 to 100 ({row['metric']})"] += 1
            return None
        count = row.get("n_examples")
        key = (row["cell"], row.get("evaluation"), row["metric"])
        return SeedScore(value, 0.0, key, start, None if count is None else int(count))

    def _build_settings(self, row: Mapping[str, Any], measure: str) -> Settings:
        """Return the settings of a cell under one evaluation and metric."""
        decoding, evaluation = row.get("decoding"), row.get("evaluation")
        is_benchmark = decoding is None and evaluation is not None and row["metric"] not in METRICS
        is_sampled_test = decoding == "sample" and row.get("split") in (None, "test")
        others = tuple(
            (axis, row[axis]) for axis in self.axes if axis not in _AXIS_SETTINGS and axis not in _METHOD_AXES
        )
        loss = _classify_loss(row)
        return {
            "task": row["task"],
            "metric": evaluation
            if is_benchmark
            else "step_time"
            if measure == "step_time"
            else row["metric"],
            "measure": measure,
            "student": row.get("student"),
            "pair": "self" if row.get("self_distillation") else "smaller",
            "decoding": decoding,
            # The number of texts per prompt makes no other evaluation.
            "temperature": _parse_float(row.get("temperature")) if decoding == "sample" else None,
            "evaluation": None if is_sampled_test else evaluation,
            **{name: row[axis] for axis, name in _AXIS_SETTINGS.items() if axis in self.axes},
            "train_share": self._compute_train_share(row),
            "other_axes": others or None,
            "role": "cell",
            "lmbda": float(row["lmbda"]),
            "loss": f"{loss} with a reward" if row.get("reward") else loss,
            "beta": _parse_float(row.get("beta")) if loss.startswith("jsd") else None,
            "alpha": None if row.get("anchor") else _parse_float(row.get("distillation_share")),
            "anchor": row.get("anchor"),
        }

    def _compute_train_share(self, row: Mapping[str, Any]) -> float | None:
        """Return training rows / the table's largest number (all rows: 1); None without the axis."""
        if "train_rows" not in self.axes:
            return None
        if self.max_train_rows is None or row["train_rows"] is None:
            return 1.0
        return round(float(row["train_rows"]) / self.max_train_rows, 4)


def _list_declared_axes(table: pd.DataFrame) -> list[str]:
    """Return the axes of a long table; none where columns that mark their place are missing."""
    needed = {"student", "teacher", "beta", "evaluation"}
    return list_axes(table) if needed <= set(table.columns) else []


def _classify_loss(row: Mapping[str, Any]) -> str:
    """Return the loss's kind: `jsd`, `tv`, `seqkd`, `sft`, ...; on the teacher's text that is added."""
    kind = row.get("divergence") or ("jsd" if row.get("beta") is not None else "unknown loss")
    has_teacher_text = row.get("text") == "teacher"
    if kind == "cross_entropy":
        return "seqkd" if has_teacher_text else "sft"
    return f"{kind} on the teacher's text" if has_teacher_text else str(kind)


def _list_values(column: "pd.Series[Any]") -> list[Any]:
    """Return the values of a column, with None for missing ones."""
    values, missing = column.tolist(), column.isna().to_numpy()
    return [None if gap else value for value, gap in zip(values, missing, strict=True)]


def _parse_float(value: Any) -> float | None:
    """Return a number as a float; None stays None."""
    return None if value is None else float(value)
