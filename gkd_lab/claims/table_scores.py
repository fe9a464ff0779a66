"""Read the long table of a run for claims: which scores count, of which models, in which units."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from gkd_lab.claims.model_scores import (
    OTHER_MEASURES,
    ComparedModel,
    ExampleLookup,
    ModelCollector,
    ModelScores,
    SeedScore,
    build_reference_settings,
    classify_method_loss,
    find_no_examples,
)
from gkd_lab.claims.model_settings import Settings
from gkd_lab.config.errors import ConfigError
from gkd_lab.metrics import METRICS
from gkd_lab.tables.cell_facts import FACT_COLUMNS
from gkd_lab.tables.long_table import LEADING_COLUMNS, SCORE_COLUMNS, TRAILING_COLUMNS
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tasks import TASKS

_REQUIRED_COLUMNS = ("cell", "role", "task", "seed", "lmbda", "metric", "value")
_NUMBERS = (
    "seed", "lmbda", "beta", "temperature", "value", "n_examples", "distillation_share",
    "teacher_temperature", "learning_rate", "train_rows",
)  # fmt: skip
_SIGNED_METRICS = ("matthews", "pearson", "spearman")
"""Metrics from -100 to 100; all others of ours are from 0 to 100."""
_BENCHMARK_METRICS = ("acc", "acc_norm", "exact_match")
"""Scores of lm-eval that are a benchmark's own, the first one first."""
_AXIS_SETTINGS = {
    "teacher_temperature": "teacher_temperature",
    "learning_rate": "learning_rate",
    "train_rows": "train_share",
}
"""Axis -> setting that it sets."""
_METHOD_AXES = ("method", "divergence", "source", "alpha", "anchor", "student")
"""Axes that are read from the resolved losses, data and models instead."""
_KNOWN_COLUMNS = {*LEADING_COLUMNS, *SCORE_COLUMNS, *TRAILING_COLUMNS, *FACT_COLUMNS}

Row = dict[str, Any]
ScoreName = tuple[Any, Any, Any]
"""(task, evaluation, metric)."""


def load_table_scores(table: pd.DataFrame, find_examples: ExampleLookup = find_no_examples) -> ModelScores:
    """Read the long table: one quality metric of each evaluation, Self-BLEU and step times.

    Quality is the requested metric that comes first in the task's own order, for a benchmark of lm-eval its
    accuracy. Scores outside of their metric's range, rows without a seed, and scores that contradict each
    other are left out and named. Raises ConfigError for a table that is not long, or holds text for a number.
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
        self.collector = ModelCollector()
        self.axes = _list_declared_axes(table)
        self.rows = _list_rows(table, self.axes)
        self.benchmarks = _list_benchmarks(self.rows)
        self.quality = _choose_quality_metrics(self.rows)
        self.scales = self._find_scales()
        self.references = self._index_references()
        self.train_rows = self._find_all_train_rows()
        names = {(r["task"], r.get("temperature"), r.get("evaluation")) for r in self.rows if _is_sampled(r)}
        counts = Counter((task, temperature) for task, temperature, _ in names)
        self.ambiguous_samplings = {key for key, count in counts.items() if count > 1}

    def read(self) -> list[ComparedModel]:
        """Return all models of the table."""
        for row in self.rows:
            measure = self._classify_measure(row)
            if row["role"] == "cell" and measure is not None:
                for point in self._list_points(row):
                    self._add_row({**row, **point}, measure)
        return self.collector.finish()

    def _classify_measure(self, row: Row) -> str | None:
        """Return what a row measures: quality, self_bleu, entailment, step_time; None for other metrics."""
        return OTHER_MEASURES.get(row["metric"]) or ("quality" if _name_score(row) in self.quality else None)

    def _find_scales(self) -> dict[ScoreName, float]:
        """Map the scores that are shares of 1 to 100, the points of a share: lm-eval's, and others, named."""
        largest: dict[ScoreName, float] = defaultdict(float)
        for row in self.rows:
            if row["value"] is not None and _name_score(row) in self.quality:
                largest[_name_score(row)] = max(largest[_name_score(row)], abs(row["value"]))
        shares = [name for name, value in largest.items() if 0 < value <= 1]
        ours = {metric for _, evaluation, metric in shares if evaluation not in self.benchmarks}
        for metric in sorted(ours):
            self.collector.notes.append(f"scores of {metric} are at most 1, taken as shares of 100 points")
        return dict.fromkeys(shares, 100.0)

    def _index_references(self) -> dict[tuple[Any, ...], Row]:
        """Map (role, cell, evaluation, metric) to a reference's row, without value where two contradict."""
        index: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if row["role"] != "cell":
                key = (row["role"], row["cell"], row.get("evaluation"), row["metric"])
                stored = index.setdefault(key, row)
                if stored["value"] != row["value"]:
                    index[key] = {**row, "value": None}
                    self.collector.problems[f"scores of one {row['role']} that contradict each other"] += 1
        return index

    def _find_all_train_rows(self) -> dict[Any, float | None]:
        """Map each task to its largest number of training rows; None where some cells have all of them."""
        counts: dict[Any, list[float | None]] = defaultdict(list)
        if "train_rows" in self.axes:
            for row in self.rows:
                if row["role"] == "cell":
                    counts[row["task"]].append(row["train_rows"])
        return {
            task: None if None in values else max(v for v in values if v is not None)
            for task, values in counts.items()
        }

    def _list_points(self, row: Row) -> list[Row]:
        """Return the distinct axis values of the grid points that a collapsed cell stands for."""
        names = {"lmbda", "seed", *self.axes} - set(_METHOD_AXES)
        points = [
            {name: encode_axis_value(value) for name, value in point.items() if name in names}
            for point in _parse_points(row.get("stands_for"))
        ]
        return list({str(sorted(point.items())): point for point in points}.values()) or [{}]

    def _add_row(self, row: Row, measure: str) -> None:
        """Add the score of a cell, and those of its start and teacher under the same metric."""
        settings = self._build_settings(row, measure)
        seed = _parse_seed(row["seed"])
        if seed is None:
            self.collector.problems["rows without a seed"] += 1
        self.collector.add(settings, seed, self._read_score(row, row.get("start_cell")))
        for role in ("start", "teacher") if measure != "step_time" else ():
            reference = self.references.get(
                (role, row.get(f"{role}_cell"), row.get("evaluation"), row["metric"])
            )
            if reference is not None:
                score = self._read_score(reference, row.get("start_cell"))
                self.collector.add(build_reference_settings(settings, role), seed, score)

    def _read_score(self, row: Row, start: str | None) -> SeedScore | None:
        """Return a row's score in points; None where it is missing or outside of its metric's range.

        start: SFT student of the cell that the score belongs to, or is compared with.
        """
        if row["value"] is None:
            return None
        value, metric = row["value"] * self.scales.get(_name_score(row), 1.0), row["metric"]
        lowest = -100.0 if metric in _SIGNED_METRICS else 0.0
        if not math.isfinite(value) or (metric in METRICS and not lowest - 1e-9 <= value <= 100 + 1e-9):
            self.collector.problems[f"scores outside of {lowest:g} to 100 ({metric})"] += 1
            return None
        count = row.get("n_examples")
        is_count = count is not None and math.isfinite(count) and count >= 1
        key = (row["cell"], row.get("evaluation"), metric)
        return SeedScore(value, 0.0, key, start, int(count) if is_count else None)  # type: ignore[arg-type]

    def _build_settings(self, row: Row, measure: str) -> Settings:
        """Return the settings of a cell under one evaluation and metric."""
        decoding, evaluation = row.get("decoding"), row.get("evaluation")
        metric = evaluation if evaluation in self.benchmarks else row["metric"]
        is_only_sampling = _is_sampled(row) and (row["task"], row.get("temperature")) not in (
            self.ambiguous_samplings
        )
        others = tuple(
            (axis, row[axis]) for axis in self.axes if axis not in _AXIS_SETTINGS and axis not in _METHOD_AXES
        )
        loss = _classify_loss(row)
        return {
            "task": row["task"],
            "metric": measure if measure == "step_time" else metric,
            "measure": measure,
            "student": row.get("student"),
            "pair": "self" if _is_self_distillation(row) else "smaller",
            "decoding": decoding,
            "temperature": row.get("temperature") if decoding == "sample" else None,
            # The temperature tells samplings apart; the number of texts per prompt makes no other evaluation.
            "evaluation": None if is_only_sampling else evaluation,
            **{name: row[axis] for axis, name in _AXIS_SETTINGS.items() if axis in self.axes},
            "train_share": self._compute_train_share(row),
            "other_axes": others or None,
            "role": "cell",
            "lmbda": row["lmbda"],
            "loss": f"{loss} with a reward" if row.get("reward") else loss,
            "beta": row.get("beta") if loss.startswith("jsd") else None,
            "alpha": None if row.get("anchor") else row.get("distillation_share"),
            "anchor": row.get("anchor"),
        }

    def _compute_train_share(self, row: Row) -> float | None:
        """Return training rows / the task's largest number; None without the axis, NaN if that is unknown."""
        if "train_rows" not in self.axes:
            return None
        largest, rows = self.train_rows[row["task"]], row["train_rows"]
        if rows is None:
            return 1.0
        return math.nan if largest is None else round(rows / largest, 4)


# ---- rows ----


def _list_rows(table: pd.DataFrame, axes: Sequence[str]) -> list[Row]:
    """Return the rows of a table as dictionaries: numbers as floats, None for what is missing."""
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise ConfigError(f"the table has two columns {repeated[0]!r}; rename one")
    columns = {}
    for name in table.columns:
        is_missing = table[name].isna().to_numpy()
        values = [None if gap else value for value, gap in zip(table[name].tolist(), is_missing, strict=True)]
        if name in _NUMBERS:
            values = [None if value is None else _parse_number(name, value) for value in values]
        elif name in axes:
            values = [v if isinstance(v, int | float) else encode_axis_value(v) for v in values]
        columns[name] = values
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _parse_number(name: str, value: Any) -> Any:
    """Return a value of a column as a float. ConfigError for text that is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"column {name}: {value!r} is not a number") from None


def _parse_seed(value: float | None) -> int | None:
    """Return a seed as a whole number; None for a missing one. ConfigError for a fraction."""
    if value is None:
        return None
    if value != int(value):
        raise ConfigError(f"column seed: {value:g} is not a whole number")
    return int(value)


def _parse_points(value: Any) -> list[Mapping[str, Any]]:
    """Return the grid points of a column `stands_for`: a list of mappings, or its JSON; [] for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return []
    points = list(value) if isinstance(value, list | tuple | np.ndarray) else []
    return [point for point in points if isinstance(point, Mapping)]


def _list_declared_axes(table: pd.DataFrame) -> list[str]:
    """Return the axes of a long table: columns that DESIGN's do not name, and facts among them.

    A fact such as `train_rows` is an axis where it stands between `beta` and `evaluation`.
    """
    columns = [str(name) for name in table.columns]
    axes = [name for name in columns if name not in _KNOWN_COLUMNS]
    if "beta" in columns and "evaluation" in columns:
        between = columns[columns.index("beta") + 1 : columns.index("evaluation")]
        axes += [name for name in between if name in FACT_COLUMNS]
    if "teacher" in columns:
        is_cell = (table["role"] == "cell").to_numpy()
        teachers = set(zip(table["task"][is_cell], table["teacher"][is_cell].astype(str), strict=True))
        if len(teachers) > len({task for task, _ in teachers}):
            return ["teacher", *axes]
    return axes


# ---- what a row says ----


def _name_score(row: Row) -> ScoreName:
    """Return (task, evaluation, metric) of a row."""
    return row["task"], row.get("evaluation"), row["metric"]


def _list_benchmarks(rows: Iterable[Row]) -> set[Any]:
    """Return the evaluations that are benchmarks of lm-eval: they have no decoding.

    In a table without any decoding they are those without a split, or with a metric that is not ours.
    """
    all_rows = [row for row in rows if row.get("evaluation") is not None]
    has_decodings = any(row.get("decoding") is not None for row in all_rows)
    return {
        row["evaluation"]
        for row in all_rows
        if row.get("decoding") is None
        and (has_decodings or row.get("split") is None or row["metric"] not in METRICS)
    }


def _is_sampled(row: Row) -> bool:
    """Return whether a row is a score of sampled text of the test split."""
    return row.get("decoding") == "sample" and row.get("split") in (None, "test")


def _is_self_distillation(row: Row) -> bool:
    """Return whether teacher and student have one architecture; by their names where it is not stated."""
    stated = row.get("self_distillation")
    if stated is not None:
        return bool(stated)
    return row.get("student") is not None and row.get("student") == row.get("teacher")


def _classify_loss(row: Row) -> str:
    """Return the loss's kind: `jsd`, `tv`, `seqkd`, `sft`, ...; text that is not the data's is added."""
    kind = row.get("divergence") or ("jsd" if row.get("beta") is not None else "unknown loss")
    kind = str(classify_method_loss(row.get("method"), kind))
    has_teacher_text = row.get("text") == "teacher" or row.get("source") == "teacher"
    if kind in ("cross_entropy", "nll"):
        return "seqkd" if has_teacher_text else "sft"
    if row.get("text") == "corrupted":
        return f"{kind} on corrupted text"
    return f"{kind} on the teacher's text" if has_teacher_text and kind not in ("seqkd", "sft") else kind


def _choose_quality_metrics(rows: Iterable[Row]) -> set[ScoreName]:
    """Return the score of each evaluation that stands for its models' quality.

    Of the metrics that have a score, and were requested where the table says so: of ours the first in the
    task's order, of lm-eval its accuracy, else the only one.
    """
    candidates: dict[tuple[Any, Any], dict[Any, tuple[bool, bool]]] = defaultdict(dict)
    all_rows = list(rows)
    has_evaluations = any(row.get("evaluation") is not None for row in all_rows)
    for row in all_rows:
        metric, evaluation = row["metric"], row.get("evaluation")
        is_other = metric is None or metric in OTHER_MEASURES or metric == "train_seconds"
        if is_other or (evaluation is None and has_evaluations):
            continue
        has_value, is_requested = row["value"] is not None, row.get("origin") in (None, "requested")
        stored = candidates[row["task"], evaluation].get(metric, (False, False))
        candidates[row["task"], evaluation][metric] = (stored[0] or has_value, stored[1] or is_requested)
    chosen = set()
    for (task, evaluation), metrics in candidates.items():
        ranked = [metric for metric in metrics if _rank_metric(task, metric) is not None]
        options = ranked or (list(metrics) if len(metrics) == 1 else [])  # of several unranked ones none
        if options:
            best = min(
                options,
                key=lambda m: (not metrics[m][0], not metrics[m][1], _rank_metric(task, m) or 0, str(m)),
            )
            chosen.add((task, evaluation, best))
    return chosen


def _rank_metric(task: Any, metric: Any) -> int | None:
    """Return the place of a metric: the task's own first, then ours, then lm-eval's; None for others."""
    task_metrics = TASKS[task].metrics if task in TASKS else ()
    order = list(dict.fromkeys((*task_metrics, *METRICS, *_BENCHMARK_METRICS)))
    name = str(metric).split(",")[0]  # lm-eval adds its filter: `exact_match,strict-match`
    return order.index(name) if name in order else None
