"""What claims are judged on: one measured number each, with the place where it stands.

A place says what the number is of by resolved values (lmbda, loss, beta, role, ...), never by a method's
name, so that the paper's figures and a table of ours are read by the same declarations.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from gkd_lab.claims import paper
from gkd_lab.config import Cell
from gkd_lab.config.grid import METHODS
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedReward
from gkd_lab.metrics import METRICS
from gkd_lab.statistics.summaries import expand_collapsed_cells
from gkd_lab.tables.rows import encode_axis_value
from gkd_lab.tables.table import list_axes

FigureCell = dict[str, Any]

MODEL_FIELDS = ("role", "lmbda", "loss", "beta", "alpha", "anchor")
"""Fields of a place that tell a model from the others of its column."""
CONTEXT_FIELDS = (
    "task", "metric", "measure", "student", "pair", "decoding", "temperature", "evaluation", "train",
    "teacher_temperature", "learning_rate", "rest",
)  # fmt: skip
FIGURE_CELL_FIELDS = (*CONTEXT_FIELDS, *MODEL_FIELDS)

STUDENT_SIZES = ("small", "base", "large")
"""Names of students, from small to large, in the paper and at every scale of ours."""


@dataclass(frozen=True)
class Measurement:
    """A score of one model, one seed and one evaluation."""

    figure_cell: FigureCell
    value: float | None
    """None: not done yet."""
    seed: int = 0
    reading_error: float = 0.0
    """By how much a number read off a figure may be wrong."""
    fingerprint: str | None = None
    """Fingerprint of the model, in a table."""
    score_column: str | None = None
    """`<evaluation>/<metric>`, in a table."""


def load_paper_measurements(figures: Iterable[str] | None = None) -> list[Measurement]:
    """The paper's own numbers, of some figures or of all."""
    frame = paper.load_values()
    chosen = frame if figures is None else frame[frame["figure"].isin(tuple(figures))]
    return _remove_duplicates(fact for row in chosen.to_dict("records") for fact in _convert_paper_row(row))


def _convert_paper_row(row: dict[Any, Any]) -> Iterator[Measurement]:
    row = {str(name): None if pd.isna(value) else value for name, value in row.items()}
    metric = row["metric"]
    place = {
        "task": row["task"],
        "metric": metric,
        "measure": metric if metric in _OTHER_MEASURES else "quality",
        "student": row["student"],
        "pair": "self" if row["figure"] == "A.10" else "smaller",
        "decoding": row["decoding"],
        "temperature": row["temperature"],
        "train": row["train_share"] if row["figure"] == "3" else None,  # elsewhere it is no axis
        "teacher_temperature": row["teacher_temperature"],
        "role": row["role"],
        "lmbda": row["lmbda"],
        "loss": _classify_method_loss(row["method"], row["divergence"]),
        "beta": row["beta"],
        "alpha": row["alpha"],
        "anchor": "start" if row["method"] == "rlef" else None,
    }
    yield Measurement(place, row["value"], reading_error=row["error"])
    if row["role"] == "cell" and (row["start"] is not None or row["form"] == "gain"):
        is_gain = row["form"] == "gain"
        error = 0.0 if is_gain else row["gain_error"] - row["error"]
        yield Measurement(
            _describe_reference(place, "start"), 0.0 if is_gain else row["start"], reading_error=error
        )


_OTHER_MEASURES = ("self_bleu", "entailment", "step_time")


def _describe_reference(place: FigureCell, role: str) -> FigureCell:
    """The place of a model that a cell is held against."""
    return {**place, **dict.fromkeys(MODEL_FIELDS), "role": role}


def _remove_duplicates(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Of several facts of one place and seed the first: a start that many cells share is one number."""
    found: dict[Any, Measurement] = {}
    for fact in measurements:
        key = (*(fact.figure_cell.get(name) for name in FIGURE_CELL_FIELDS), fact.seed)
        if key not in found or found[key].value is None:
            found[key] = fact
    return list(found.values())


def extract_measurements(
    frame: pd.DataFrame,
    cells: Mapping[str, Cell] | None = None,
    step_seconds: Mapping[str, float] | None = None,
) -> list[Measurement]:
    """A table's scores: of every evaluation its first metric, and Self-BLEU.

    `cells` (fingerprint -> cell) tell what the columns do not: divergences without a beta, settings
    that are no axis. `seconds` (fingerprint -> of a step) are the times of cells that ran alone.
    """
    reader = _TableReader(frame, cells or {}, step_seconds or {})
    return _remove_duplicates(
        fact for row in expand_collapsed_cells(frame).to_dict("records") for fact in reader.read_row(row)
    )


_DECODING_NAME = re.compile(r"(greedy|sample|beam)([\d.]+)?")
_AXIS_FIELDS = {
    "student": "student",
    "teacher_temperature": "teacher_temperature",
    "learning_rate": "learning_rate",
    "train_rows": "train",
}
_METHOD_AXES = ("method", "divergence", "source", "alpha", "anchor")


class _TableReader:
    """Rows of one table as facts."""

    def __init__(self, frame: pd.DataFrame, cells: Mapping[str, Cell], seconds: Mapping[str, float]) -> None:
        self.cells, self.step_seconds = cells, seconds
        self.axes = list_axes(frame)
        self.score_columns = {task: list(_find_score_columns(frame, task)) for task in frame["task"].unique()}
        references = frame[frame["role"] != "cell"].to_dict("records")
        self.references = {(row["role"], row["cell"]): row for row in references}
        rows = frame["train_rows"].max() if "train_rows" in frame else None
        self.max_train_rows = None if rows is None or pd.isna(rows) else float(rows)

    def read_row(self, row: dict[Any, Any]) -> Iterator[Measurement]:
        place, seed = self._describe_cell(row), int(row["seed"])
        for column, measure in self.score_columns[row["task"]]:
            here = {**place, **_parse_score_column(column), "measure": measure}
            yield Measurement(
                here, _parse_number(row[column]), seed, fingerprint=row["cell"], score_column=column
            )
            for role in ("start", "teacher"):
                known = self.references.get((role, row[f"{role}_cell"]))
                if known is not None:
                    value, there = _parse_number(known[column]), _describe_reference(here, role)
                    yield Measurement(there, value, seed, fingerprint=known["cell"], score_column=column)
        if row["cell"] in self.step_seconds:
            timed = {**place, "metric": "step_time", "measure": "step_time"}
            yield Measurement(timed, self.step_seconds[row["cell"]], seed)

    def _describe_cell(self, row: dict[Any, Any]) -> FigureCell:
        cell = self.cells.get(row["cell"])
        own = {name: encode_axis_value(row[axis]) for axis, name in _AXIS_FIELDS.items() if axis in self.axes}
        rest = {
            axis: row[axis] for axis in self.axes if axis not in _AXIS_FIELDS and axis not in _METHOD_AXES
        }
        if cell is not None:
            own.setdefault("student", cell.training.start.model.name)
        loss = _classify_loss(cell, row)
        return {
            "task": row["task"],
            "pair": _classify_pair(cell, own.get("student")),
            **own,
            "train": self._compute_train_share(row),
            "rest": json.dumps(rest, sort_keys=True, default=str) if rest else None,
            "role": "cell",
            "lmbda": float(row["lmbda"]),
            **_describe_reward(cell, loss),
            "beta": None if pd.isna(row["beta"]) or not loss.startswith("jsd") else float(row["beta"]),
        }

    def _compute_train_share(self, row: dict[Any, Any]) -> float | None:
        """Of the most training rows that the table has; null in the axis stands for all."""
        if "train_rows" not in self.axes:
            return None
        rows = row["train_rows"]
        if self.max_train_rows is None or rows is None or pd.isna(rows):
            return 1.0
        return round(float(rows) / self.max_train_rows, 4)


def _find_score_columns(frame: pd.DataFrame, task: str) -> Iterator[tuple[str, str]]:
    """(score column, measure) of each evaluation of a task: its first metric, and Self-BLEU."""
    here = frame[frame["task"] == task]
    names: dict[str, None] = {}
    for found in here["evaluations"]:
        states = json.loads(found) if isinstance(found, str) else found
        names.update(dict.fromkeys(states if isinstance(states, dict) else ()))
    for name in names:
        columns = [one for one in frame.columns if _is_score_column(one, name)]
        there = [one for one in columns if here[one].notna().any()] or columns
        yield from ((one, "quality") for one in there[:1] if one.rsplit("/", 1)[1] != "self_bleu")
        if f"{name}/self_bleu" in columns:
            if there and there[0] == f"{name}/self_bleu":
                yield from ((one, "quality") for one in there[1:2])
            yield f"{name}/self_bleu", "self_bleu"


def _is_score_column(column: str, evaluation: str) -> bool:
    before, slash, metric = column.partition("/")
    if not slash or before != evaluation or metric.endswith((".low", ".high")):
        return False
    return metric in METRICS or not _DECODING_NAME.match(evaluation)


def _parse_score_column(column: str) -> FigureCell:
    """How texts were decoded, from an evaluation's name; a benchmark of lm-eval is a metric of its own."""
    evaluation, metric = column.split("/", 1)
    decoded = _DECODING_NAME.match(evaluation)
    if decoded is None:
        known = [name for name in ("mmlu", "bbh") if evaluation.startswith(name)]
        return {"metric": known[0] if known else evaluation, "decoding": None, "evaluation": evaluation}
    temperature = float(decoded[2]) if decoded[1] == "sample" and decoded[2] else None
    # Sampling is told apart by its temperature; how many texts a prompt got does not make it another.
    own_name = None if evaluation.startswith("sample") and "@" not in evaluation else evaluation
    return {
        "metric": metric, "decoding": decoded[1], "temperature": temperature, "evaluation": own_name,
    }  # fmt: skip


def _classify_loss(cell: Cell | None, row: Mapping[Any, Any]) -> str:
    """`jsd`, `tv`, `seqkd` or `sft`; a table alone knows the latter by their method."""
    if cell is not None:
        if cell.divergence == "cross_entropy":
            return "sft" if cell.training.source.text is None else "seqkd"
        written = "" if cell.training.source.text is None else " on the teacher's text"
        return cell.divergence + written
    divergence = "jsd" if row["beta"] != float("inf") else "tv"
    return _classify_method_loss(row.get("method"), divergence) or divergence


def _describe_reward(cell: Cell | None, loss: str) -> FigureCell:
    """The weight of the divergence beside a reward's, and whom it holds to: the start, in RLEF*.

    A cell with a reward is no example of what its divergence does alone; `loss` says so.
    """
    objectives = () if cell is None else cell.training.objectives
    rewards = sum(one.weight for one in objectives if isinstance(one, ResolvedReward))
    if not rewards:
        return {"loss": loss}
    held = [one for one in objectives if isinstance(one, ResolvedDivergence)]
    total = rewards + sum(one.weight for one in held)
    if any(one.teachers != (0,) for one in held):
        return {"loss": f"{loss} with a reward", "anchor": "start"}
    return {"loss": f"{loss} with a reward", "alpha": round(1 - rewards / total, 6)}


def _classify_method_loss(method: Any, divergence: Any) -> str | None:
    sets = METHODS.get(method, {}) if isinstance(method, str) else {}
    return str(method) if sets.get("type") == "cross_entropy" else divergence


def _classify_pair(cell: Cell | None, student: Any) -> str:
    """Whether the student is as large as its teacher: self-distillation."""
    if cell is not None:
        teacher, start = cell.training.teacher.model, cell.training.start.model
        same = (teacher.architecture, teacher.pretrained, teacher.path, teacher.keep_layers) == (
            start.architecture, start.pretrained, start.path, start.keep_layers,
        )  # fmt: skip
        return "self" if same else "smaller"
    return "self" if student in ("teacher", "xl") else "smaller"


def _parse_number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)
