"""Readable labels of losses: a divergence by its beta, a list of loss terms in one line."""

import json
import math
from collections.abc import Mapping
from typing import Any

from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA


def divergence_label(beta: float | None) -> str:
    """Format `Forward KL`, `JSD(0.1)`, ..., `Reverse KL` as on the paper's axes.

    Without a beta (None, infinite or NaN) it is `Total variation`.
    """
    if beta is None or not math.isfinite(beta):
        return "Total variation"
    return {0.0: "Forward KL", 1.0: "Reverse KL"}.get(float(beta), f"JSD({beta:g})")


def loss_label(objectives: Any) -> str:
    """Format an experiment's list of objectives, or its JSON in a table, in one line.

    Omitted fields and a weight of 1 are left out.
    """
    terms = json.loads(objectives) if isinstance(objectives, str) else objectives
    return " + ".join(_format_weighted_term(dict(term)) for term in terms)


def format_axis_value(axis: str, value: Any) -> str:
    """Format a value of an axis: objectives by their terms, a number without needless digits."""
    if axis == "objectives" and not isinstance(value, float):
        return loss_label(value)
    return _format_number(value)


def format_axis_setting(axis: str, value: Any) -> str:
    """Format `student small`; a list of objectives stands without the axis's name."""
    text = format_axis_value(axis, value)
    return text if axis == "objectives" else f"{axis} {text}"


def _format_weighted_term(term: dict[str, Any]) -> str:
    """Format a term behind its weight, or behind `0.5 to 1` for a weight that changes."""
    weight, final_weight = term.pop("weight", 1), term.pop("final_weight", None)
    term_type = term.pop("type", "divergence")
    is_divergence = term_type == "divergence"
    name = _format_divergence_term(term) if is_divergence else _format_other_term(term_type, term)
    if final_weight is not None:
        return f"{weight:g} to {final_weight:g} {name}"
    return name if weight == 1 else f"{weight:g} {name}"


def _format_divergence_term(term: dict[str, Any]) -> str:
    """Format a divergence with its temperatures and teachers."""
    name = NAMES_WITHOUT_BETA.get(term.get("divergence", ""), "").capitalize()
    name = name or divergence_label(term.get("beta"))
    temperatures = {side: term.get(f"{side}_temperature", 1) for side in ("teacher", "student")}
    if temperatures["teacher"] == temperatures["student"] != 1:
        name += f" at T = {temperatures['teacher']:g}"
    else:
        for side, value in temperatures.items():
            name += f" at the {side}'s T = {value:g}" if value != 1 else ""
    name += " times T\N{SUPERSCRIPT TWO}" if term.get("square_temperature") else ""
    name += " rescaled" if term.get("rescale") else ""
    return name + _format_teachers(term)


def _format_teachers(term: Mapping[str, Any]) -> str:
    """Name the teachers and their weights; older tables call them `teacher` and `mixture`."""
    teachers = term.get("teachers", term.get("teacher"))
    if teachers is None:
        return ""
    names = [teachers] if isinstance(teachers, str) else list(teachers)
    if term.get("routed"):
        return f" of {' or '.join(names)}, by row"
    weights = term.get("weights", term.get("mixture"))
    if weights is None:
        return f" of {' and '.join(names)}"
    return " of " + " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))


def _format_other_term(term_type: str, settings: Mapping[str, Any]) -> str:
    """Format a term that is no divergence, with its settings in brackets."""
    name = term_type.replace("_", " ")
    parts = ", ".join(
        value if isinstance(value, str) else f"{field.replace('_', ' ')} {_format_number(value)}"
        for field, value in settings.items()
    )
    return f"{name} ({parts})" if parts else name


def _format_number(value: Any) -> str:
    """Format a float without needless digits, anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)
