"""The paper's numbers: Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024.

`values.csv` has a row a number; `figures.yaml` says how each figure was read, and how exactly.
"""

import math
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd
import yaml

_START_ERRORS = {"summarization": 0.05, "translation": 0.005, "arithmetic": 0.005}
_TEXT_COLUMNS = (
    "figure",
    "task",
    "data",
    "student",
    "decoding",
    "role",
    "method",
    "divergence",
    "metric",
    "form",
)


def load_figures() -> dict[str, dict[str, Any]]:
    """Figure (ICLR numbering) -> `how` it was read, `error`, what it `shows` and a `note` where one is due.

    `error` is the most by which a number may be off, in its own unit; a mapping where metrics differ.
    """
    found = yaml.safe_load((files(__package__) / "figures.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def load_values() -> pd.DataFrame:
    """The paper's numbers, one a row.

    Columns: `figure`, `task` (as here), `data` (as the paper calls it), `student` (size), `decoding`
    (`greedy`, `sample`, `beam`), `temperature` (of decoding by sampling), `teacher_temperature` (in the
    loss), `role` (`cell`, `start`, `teacher`), `method`, `lmbda`, `divergence` (`jsd`, `tv`,
    `cross_entropy`), `beta`, `train_share` (of the training data), `alpha` (weight of distillation beside
    a reward, Eq. 5), `metric`, `form` (`score`, or `gain` over the start), `value`, `start` and `teacher`
    (their scores, where the paper states them), `gain` (`value` minus the start, where that is known),
    `how` (printed or digitised), `error` (the most by which `value` may be off) and `gain_error`. ROUGE,
    BLEU, accuracy and Self-BLEU are points of 0 to 100, entailment is per cent, step time is in steps on
    fixed data. What does not apply is null.
    """
    return _read_values().copy()


@cache
def _read_values() -> pd.DataFrame:
    source = files(__package__) / "values.csv"
    with source.open("r", encoding="utf-8") as file:
        frame = pd.read_csv(file, dtype=dict.fromkeys(_TEXT_COLUMNS, "object"))
    about = load_figures()
    frame["how"] = frame["figure"].map(lambda figure: about[figure]["how"])
    rows = frame.to_dict("records")
    frame["error"] = [_get_reading_error(about[row["figure"]]["error"], row["metric"]) for row in rows]
    is_gain = frame["form"] == "gain"
    frame["gain"] = frame["value"].where(is_gain, frame["value"] - frame["start"])
    of_start = pd.Series([_get_start_error(row) for row in frame.to_dict("records")], dtype="float64")
    frame["gain_error"] = frame["error"] + of_start.where(~is_gain, 0.0)
    return frame


def _get_reading_error(error: float | dict[str, float], metric: str) -> float:
    return float(error[metric] if isinstance(error, dict) else error)


def _get_start_error(row: dict[Any, Any]) -> float:
    """Figures 1 and A.10 draw their starts; elsewhere they are printed in captions and text."""
    if math.isnan(row["start"]):
        return math.nan
    drawn = row["figure"] in ("1", "A.10", "A.11")
    return float(row["error"]) if drawn else _START_ERRORS[row["task"]]
