"""The paper's numbers: Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024.

`values.csv` has one row per number, `figures.yaml` how each figure was read, and with which error.
"""

import math
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml

_START_ERRORS = {"summarization": 0.05, "translation": 0.005, "arithmetic": 0.005}
_TEXT_COLUMNS = (
    "figure", "task", "data", "student", "decoding", "role", "method", "divergence", "metric", "form",
)  # fmt: skip


def load_figures() -> dict[str, dict[str, Any]]:
    """Return figure (ICLR number) -> dict of `how` it was read, `error`, what it `shows`, maybe `note`.

    `error` is the largest error of a number, in its own unit; a mapping where metrics differ.
    """
    document = yaml.safe_load((files(__package__) / "figures.yaml").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def load_values() -> pd.DataFrame:
    """Load the paper's numbers as a data frame, one per row; the caller may change it.

    Columns: `figure`, `task` (as here), `data` (as the paper calls it), `student` (size), `decoding`
    (`greedy`, `sample`, `beam`), `temperature` (of decoding by sampling), `teacher_temperature` (in the
    loss), `role` (`cell`, `start`, `teacher`), `method`, `lmbda`, `divergence` (`jsd`, `tv`,
    `cross_entropy`), `beta`, `train_share` (of the training data), `alpha` (weight of distillation beside
    a reward, Eq. 5), `metric`, `form` (`score`, or `gain` over the start), `value`, `start` and `teacher`
    (their scores, where the paper states them), `gain` (`value` minus the start, where that is known),
    `how` (printed or digitised), `error` (the largest error of `value`) and `gain_error`. ROUGE,
    BLEU, accuracy and Self-BLEU are points of 0 to 100, entailment is per cent, step time is in steps on
    fixed data. What does not apply is null.
    """
    return _read_values().copy()


@cache
def _read_values() -> pd.DataFrame:
    """Read `values.csv` once and add columns `how`, `error`, `gain` and `gain_error`."""
    source = files(__package__) / "values.csv"
    with source.open("r", encoding="utf-8") as file:
        frame = pd.read_csv(file, dtype=dict.fromkeys(_TEXT_COLUMNS, "object"))
    figures = load_figures()
    frame["how"] = frame["figure"].map(lambda figure: figures[figure]["how"])
    rows = frame.to_dict("records")
    frame["error"] = [_get_reading_error(figures[row["figure"]]["error"], row["metric"]) for row in rows]
    is_gain = frame["form"] == "gain"
    frame["gain"] = frame["value"].where(is_gain, frame["value"] - frame["start"])
    start_error = pd.Series([_get_start_error(row) for row in frame.to_dict("records")], dtype="float64")
    frame["gain_error"] = frame["error"] + start_error.where(~is_gain, 0.0)
    return frame


def _get_reading_error(error: float | dict[str, float], metric: str) -> float:
    """Return the largest reading error of a metric: a figure states one error, or one per metric."""
    return float(error[metric] if isinstance(error, dict) else error)


def _get_start_error(row: dict[Any, Any]) -> float:
    """Return the reading error of a row's start score; NaN where the paper states no start.

    It is drawn in Figures 1, A.10 and A.11, elsewhere printed.
    """
    if math.isnan(row["start"]):
        return math.nan
    is_drawn = row["figure"] in ("1", "A.10", "A.11")
    return float(row["error"]) if is_drawn else _START_ERRORS[row["task"]]
