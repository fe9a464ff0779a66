"""Figure cells: the settings behind one number of a figure, or one score of a table.

A figure cell holds resolved values (lmbda, loss, beta, role, ...) and never a method's name, so the same
claims read the paper's figures and our own tables.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA

FigureCell = dict[str, Any]
"""Field -> value; None or absent where the field does not apply."""

Conditions = Mapping[str, Any]
"""Field of a figure cell -> required value, tuple of accepted values, or predicate."""

MODEL_FIELDS = ("role", "lmbda", "loss", "beta", "alpha", "anchor")
"""Fields that tell a model from the others of its column."""
CONTEXT_FIELDS = (
    "task", "metric", "measure", "student", "pair", "decoding", "temperature", "evaluation", "train_share",
    "teacher_temperature", "learning_rate", "other_axes",
)  # fmt: skip
FIGURE_CELL_FIELDS = (*CONTEXT_FIELDS, *MODEL_FIELDS)

STUDENT_SIZES = ("small", "base", "large")
"""Names of students, from small to large, in the paper and at each of our scales."""


def meets_conditions(figure_cell: FigureCell, conditions: Conditions) -> bool:
    """Return whether a figure cell meets every condition; an absent field counts as None."""
    return all(_meets_condition(figure_cell.get(name), condition) for name, condition in conditions.items())


def _meets_condition(value: Any, condition: Any) -> bool:
    """Return whether a value equals the condition (0.1 % for numbers), is in its tuple, or satisfies it."""
    if isinstance(condition, tuple):
        return any(_meets_condition(value, option) for option in condition)
    if callable(condition):
        return value is not None and bool(condition(value))
    if isinstance(condition, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(value, condition, rel_tol=1e-3, abs_tol=1e-9)
    return bool(value == condition)


def require_minimum(bound: float) -> Callable[[float], bool]:
    """Return a predicate to use as a condition: the value is at least `bound`."""
    return lambda value: value >= bound


def require_other(name: str) -> Callable[[str], bool]:
    """Return a predicate to use as a condition: the value is not `name`."""
    return lambda value: value != name


_PLAIN_FIELDS = ("task", "metric", "student", "decoding", "evaluation", "other_axes")
_FIELD_TEMPLATES = {
    "temperature": "γ = {:g}",
    "lmbda": "λ = {:g}",
    "train_share": "{:.3g} of the data",
    "teacher_temperature": "teacher at {:g}",
    "learning_rate": "learning rate {:g}",
    "alpha": "α = {:g}",
}
_LOSS_NAMES = {**NAMES_WITHOUT_BETA, "seqkd": "SeqKD", "sft": "SFT"}
_ROLE_NAMES = {"start": "the SFT student", "teacher": "the teacher"}


def format_field(name: str, value: Any) -> str:
    """Format a field's value, such as `λ = 0.5` or `forward KL`; empty where it needs no mention."""
    if name == "beta":
        return {0.0: "forward KL", 1.0: "reverse KL"}.get(float(value), f"JSD({value:g})")
    if name == "loss":
        return "" if value == "jsd" else _LOSS_NAMES.get(value, str(value))
    if name == "role":
        return _ROLE_NAMES.get(value, "")
    if name == "decoding":
        return {"sample": "sampling"}.get(value, str(value))
    if name == "pair":
        return "self-distillation" if value == "self" else ""
    if name == "anchor":
        return "RL held to its start"
    if name in _PLAIN_FIELDS:
        return str(value)
    return _FIELD_TEMPLATES[name].format(value) if name in _FIELD_TEMPLATES else ""


def format_fields(figure_cell: FigureCell, fields: Iterable[str]) -> str:
    """Join the formatted values of these fields with commas; fields that are None are left out."""
    selected = set(fields)
    words = [
        format_field(name, figure_cell[name])
        for name in FIGURE_CELL_FIELDS
        if name in selected and figure_cell.get(name) is not None
    ]
    return ", ".join(filter(None, words))


def format_distinction(figure_cell: FigureCell, other: FigureCell) -> str:
    """Format the fields in which a figure cell differs from `other`; a start or teacher by its role."""
    if figure_cell.get("role") in _ROLE_NAMES:
        return _ROLE_NAMES[figure_cell["role"]]
    differing = [
        name
        for name in FIGURE_CELL_FIELDS
        if figure_cell.get(name) != other.get(name) and name != "evaluation"
    ]
    return format_fields(figure_cell, differing)


def find_distinguishing_fields(figure_cells: Sequence[FigureCell]) -> list[str]:
    """Return fields that together tell the cells apart; one that adds nothing is left out."""
    fields: list[str] = []
    distinct = 1
    for name in FIGURE_CELL_FIELDS:
        if name == "measure":
            continue
        count = len({tuple(str(cell.get(field)) for field in (*fields, name)) for cell in figure_cells})
        if count > distinct:
            fields, distinct = [*fields, name], count
    return fields
