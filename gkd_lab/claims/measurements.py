"""Measurements: single scores of the paper and of tables, each with the figure cell that it belongs to."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from gkd_lab.claims import paper
from gkd_lab.claims.figure_cells import FIGURE_CELL_FIELDS, MODEL_FIELDS, FigureCell
from gkd_lab.config import Cell
from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA, ResolvedDivergence, ResolvedReward
from gkd_lab.config.settings import METHODS
from gkd_lab.metrics import METRICS
from gkd_lab.statistics.summaries import expand_collapsed_cells
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.table import list_wide_axes


@dataclass(frozen=True)
class Measurement:
    """The score of one model, one seed and one evaluation."""

    figure_cell: FigureCell
    value: float | None
    """None while unfinished."""
    seed: int = 0
    reading_error: float = 0.0
    """Largest error of a number that was read off a figure."""
    fingerprint: str | None = None
    """Of the model, in a table."""
    score_column: str | None = None
    """`<evaluation>/<metric>`, in a table."""


def _remove_duplicates(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Keep one measurement per figure cell and seed, the first with a value: cells share a start."""
    unique: dict[Any, Measurement] = {}
    for measurement in measurements:
        key = (*(measurement.figure_cell.get(name) for name in FIGURE_CELL_FIELDS), measurement.seed)
        if key not in unique or unique[key].value is None:
            unique[key] = measurement
    return list(unique.values())


def _build_reference_cell(figure_cell: FigureCell, role: str) -> FigureCell:
    """Return a copy of a cell's figure cell for its `start` or `teacher`, model fields cleared."""
    return {**figure_cell, **dict.fromkeys(MODEL_FIELDS), "role": role}


# ---- the paper ----

_OTHER_MEASURES = ("self_bleu", "entailment", "step_time")


def load_paper_measurements(figures: Iterable[str] | None = None) -> list[Measurement]:
    """Load the paper's numbers of these figures (None: of all) as a list without duplicates."""
    frame = paper.load_values()
    selected = frame if figures is None else frame[frame["figure"].isin(tuple(figures))]
    return _remove_duplicates(
        measurement for row in selected.to_dict("records") for measurement in _convert_paper_row(row)
    )


def _convert_paper_row(row: dict[Any, Any]) -> Iterator[Measurement]:
    """Yield a paper row's measurement and, where it is known, that of its start (0 for gains)."""
    row = {str(name): None if pd.isna(value) else value for name, value in row.items()}
    metric = row["metric"]
    figure_cell = {
        "task": row["task"],
        "metric": metric,
        "measure": metric if metric in _OTHER_MEASURES else "quality",
        "student": row["student"],
        "pair": "self" if row["figure"] == "A.10" else "smaller",
        "decoding": row["decoding"],
        "temperature": row["temperature"],
        "train_share": row["train_share"] if row["figure"] == "3" else None,  # elsewhere it is no axis
        "teacher_temperature": row["teacher_temperature"],
        "role": row["role"],
        "lmbda": row["lmbda"],
        "loss": _classify_method_loss(row["method"], row["divergence"]),
        "beta": row["beta"],
        "alpha": row["alpha"],
        "anchor": "start" if row["method"] == "rlef" else None,
    }
    yield Measurement(figure_cell, row["value"], reading_error=row["error"])
    if row["role"] == "cell" and (row["start"] is not None or row["form"] == "gain"):
        is_gain = row["form"] == "gain"
        error = 0.0 if is_gain else row["gain_error"] - row["error"]
        start = _build_reference_cell(figure_cell, "start")
        yield Measurement(start, 0.0 if is_gain else row["start"], reading_error=error)


def _classify_method_loss(method: Any, divergence: Any) -> str | None:
    """Return the method's name if it trains with cross-entropy (`seqkd`, `sft`), else `divergence`."""
    settings = METHODS.get(method, {}) if isinstance(method, str) else {}
    return str(method) if settings.get("type") == "cross_entropy" else divergence


# ---- tables ----

_DECODING_NAME = re.compile(r"(greedy|sample|beam)([\d.]+)?")
_AXIS_FIELDS = {
    "student": "student",
    "teacher_temperature": "teacher_temperature",
    "learning_rate": "learning_rate",
    "train_rows": "train_share",
}
"""Axis -> field of the figure cell that it sets."""
_METHOD_AXES = ("method", "divergence", "source", "alpha", "anchor")
"""Axes that are read from the cell's losses and data instead."""


def extract_measurements(
    frame: pd.DataFrame,
    cells: Mapping[str, Cell] | None = None,
    step_seconds: Mapping[str, float] | None = None,
) -> list[Measurement]:
    """List the scores of cells, starts and teachers: first metric per evaluation, and Self-BLEU.

    `cells` (fingerprint -> cell) hold what the columns lack: divergences without a beta, settings that
    are no axis. `step_seconds` (fingerprint -> seconds of a step) are those of cells that ran alone; they
    become measurements too.
    """
    reader = _TableReader(frame, cells or {}, step_seconds or {})
    table_rows = expand_collapsed_cells(frame).to_dict("records")
    return _remove_duplicates(measurement for row in table_rows for measurement in reader.read_row(row))


class _TableReader:
    """Converts the rows of one table to measurements."""

    def __init__(
        self, frame: pd.DataFrame, cells: Mapping[str, Cell], step_seconds: Mapping[str, float]
    ) -> None:
        self.cells, self.step_seconds = cells, step_seconds
        self.axes = list_wide_axes(frame)
        self.score_columns = {task: list(_find_score_columns(frame, task)) for task in frame["task"].unique()}
        references = frame[frame["role"] != "cell"].to_dict("records")
        self.references = {(row["role"], row["cell"]): row for row in references}
        rows = frame["train_rows"].max() if "train_rows" in frame else None
        self.max_train_rows = None if rows is None or pd.isna(rows) else float(rows)

    def read_row(self, row: dict[Any, Any]) -> Iterator[Measurement]:
        """Yield a row's measurement per score column, its start's and teacher's, and its step time."""
        described, seed = self._build_cell_fields(row), int(row["seed"])
        for column, measure in self.score_columns[row["task"]]:
            figure_cell = {**described, **_parse_score_column(column), "measure": measure}
            value = _parse_number(row[column])
            yield Measurement(figure_cell, value, seed, fingerprint=row["cell"], score_column=column)
            for role in ("start", "teacher"):
                reference = self.references.get((role, row[f"{role}_cell"]))
                if reference is not None:
                    yield Measurement(
                        _build_reference_cell(figure_cell, role),
                        _parse_number(reference[column]),
                        seed,
                        fingerprint=reference["cell"],
                        score_column=column,
                    )
        if row["cell"] in self.step_seconds:
            timed = {**described, "metric": "step_time", "measure": "step_time"}
            yield Measurement(timed, self.step_seconds[row["cell"]], seed)

    def _build_cell_fields(self, row: dict[Any, Any]) -> FigureCell:
        """Return the fields of a cell's figure cell that do not depend on the evaluation."""
        cell = self.cells.get(row["cell"])
        fields = {
            name: encode_axis_value(row[axis]) for axis, name in _AXIS_FIELDS.items() if axis in self.axes
        }
        others = {
            axis: row[axis] for axis in self.axes if axis not in _AXIS_FIELDS and axis not in _METHOD_AXES
        }
        if cell is not None:
            fields.setdefault("student", cell.training.start.model.name)
        loss = _classify_loss(cell, row)
        has_beta = loss.startswith("jsd") and not pd.isna(row["beta"])
        return {
            "task": row["task"],
            "pair": _classify_pair(cell, fields.get("student")),
            **fields,
            "train_share": self._compute_train_share(row),
            "other_axes": json.dumps(others, sort_keys=True, default=str) if others else None,
            "role": "cell",
            "lmbda": float(row["lmbda"]),
            **_build_loss_fields(cell, loss),
            "beta": float(row["beta"]) if has_beta else None,
        }

    def _compute_train_share(self, row: dict[Any, Any]) -> float | None:
        """Return training rows / the table's largest number (null: 1.0); None without the axis."""
        if "train_rows" not in self.axes:
            return None
        rows = row["train_rows"]
        if self.max_train_rows is None or rows is None or pd.isna(rows):
            return 1.0
        return round(float(rows) / self.max_train_rows, 4)


def _find_score_columns(frame: pd.DataFrame, task: str) -> Iterator[tuple[str, str]]:
    """Yield (column, `quality`) per evaluation, its first scored metric, and (column, `self_bleu`)."""
    task_rows = frame[frame["task"] == task]
    evaluations: dict[str, None] = {}
    for states in task_rows["evaluations"]:
        states = json.loads(states) if isinstance(states, str) else states
        evaluations.update(dict.fromkeys(states if isinstance(states, dict) else ()))
    for evaluation in evaluations:
        columns = [column for column in frame.columns if _is_score_column(column, evaluation)]
        scored = [column for column in columns if task_rows[column].notna().any()] or columns
        self_bleu = f"{evaluation}/self_bleu"
        quality = scored[1:2] if scored[:1] == [self_bleu] else scored[:1]
        yield from ((column, "quality") for column in quality)
        if self_bleu in columns:
            yield self_bleu, "self_bleu"


def _is_score_column(column: str, evaluation: str) -> bool:
    """Return whether a column is a score of this evaluation, not a bound or a detail of it."""
    name, slash, metric = column.partition("/")
    if not slash or name != evaluation or metric.endswith((".low", ".high")):
        return False
    return metric in METRICS or not _DECODING_NAME.match(evaluation)


def _parse_score_column(column: str) -> FigureCell:
    """Parse `<evaluation>/<metric>` to fields metric, decoding, temperature and evaluation.

    An lm-eval benchmark is its own metric and has no decoding.
    """
    evaluation, metric = column.split("/", 1)
    decoding = _DECODING_NAME.match(evaluation)
    if decoding is None:
        benchmarks = [name for name in ("mmlu", "bbh") if evaluation.startswith(name)]
        metric = benchmarks[0] if benchmarks else evaluation
        return {"metric": metric, "decoding": None, "evaluation": evaluation}
    # The temperature tells samplings apart; the number of texts per prompt makes no other evaluation.
    is_sampling = evaluation.startswith("sample")
    return {
        "metric": metric,
        "decoding": decoding[1],
        "temperature": float(decoding[2]) if is_sampling and decoding[2] else None,
        "evaluation": None if is_sampling and "@" not in evaluation else evaluation,
    }


def _classify_loss(cell: Cell | None, row: Mapping[Any, Any]) -> str:
    """Return the loss's kind, such as `jsd`, `tv`, `seqkd`, `sft`; on the teacher's text that is added.

    Without a cell, the row's method tells SeqKD and SFT, and its divergence, or else its beta, the others.
    """
    if cell is not None:
        has_teacher_text = cell.training.source.text is not None
        if cell.divergence == "cross_entropy":
            return "seqkd" if has_teacher_text else "sft"
        return cell.divergence + (" on the teacher's text" if has_teacher_text else "")
    divergence = row.get("divergence")
    if not isinstance(divergence, str):
        divergence = "jsd" if not pd.isna(row["beta"]) else " or ".join(NAMES_WITHOUT_BETA)
    return _classify_method_loss(row.get("method"), divergence) or divergence


def _build_loss_fields(cell: Cell | None, loss: str) -> FigureCell:
    """Return field `loss`; with a reward also `alpha`, the divergence's share, or RLEF*'s `anchor`.

    A cell with a reward does not show what its divergence does alone, so its loss has another name.
    """
    objectives = () if cell is None else cell.training.objectives
    rewards = sum(term.weight for term in objectives if isinstance(term, ResolvedReward))
    if not rewards:
        return {"loss": loss}
    divergences = [term for term in objectives if isinstance(term, ResolvedDivergence)]
    total = rewards + sum(term.weight for term in divergences)
    if any(term.teachers != (0,) for term in divergences):
        return {"loss": f"{loss} with a reward", "anchor": "start"}
    return {"loss": f"{loss} with a reward", "alpha": round(1 - rewards / total, 6)}


def _classify_pair(cell: Cell | None, student: Any) -> str:
    """Return `self` if student and teacher have one architecture (self-distillation), else `smaller`.

    Without a cell, the student's name tells it.
    """
    if cell is None:
        return "self" if student in ("teacher", "xl") else "smaller"
    teacher, start = (
        (model.architecture, model.pretrained, model.path, model.keep_layers)
        for model in (cell.training.teacher.model, cell.training.start.model)
    )
    return "self" if teacher == start else "smaller"


def _parse_number(value: Any) -> float | None:
    """Return a table's number as a float; None for None or NaN."""
    return None if value is None or pd.isna(value) else float(value)
