"""Losses as a reader says them: a divergence by its beta, a list of objectives in one line."""

import json
import math
from collections.abc import Mapping
from typing import Any


def divergence_label(beta: float | None) -> str:
    """`Forward KL`, `JSD(0.1)`, ..., `Reverse KL`, as the paper's axes have it; without a beta
    (None, infinite or NaN) `Total variation`.
    """
    if beta is None or not math.isfinite(beta):
        return "Total variation"
    return {0.0: "Forward KL", 1.0: "Reverse KL"}.get(float(beta), f"JSD({beta:g})")


def loss_label(objectives: Any) -> str:
    """One line for a list of objectives as an experiment states it, also as the JSON of a table.

    What a term leaves out is not said, nor a weight of 1.
    """
    listed = json.loads(objectives) if isinstance(objectives, str) else objectives
    return " + ".join(_format_weighted_term(dict(term)) for term in listed)


def format_axis_value(axis: str, value: Any) -> str:
    """A value of an axis for reading: a list of objectives by its terms, a number without needless digits."""
    if axis == "objectives" and not isinstance(value, float):
        return loss_label(value)
    return _format_number(value)


def format_axis_setting(axis: str, value: Any) -> str:
    """`student small`; a list of objectives names itself."""
    said = format_axis_value(axis, value)
    return said if axis == "objectives" else f"{axis} {said}"


def _format_weighted_term(term: dict[str, Any]) -> str:
    weight, final = term.pop("weight", 1), term.pop("final_weight", None)
    kind = term.pop("type", "divergence")
    name = _format_divergence_term(term) if kind == "divergence" else _format_other_term(kind, term)
    said = f"{weight:g} " if weight != 1 else ""
    return f"{said if final is None else f'{weight:g} to {final:g} '}{name}"


def _format_divergence_term(term: dict[str, Any]) -> str:
    name = "Total variation" if term.get("divergence") == "tv" else divergence_label(term.get("beta"))
    temperatures = [term.get(f"{side}_temperature", 1) for side in ("teacher", "student")]
    if temperatures[0] == temperatures[1] != 1:
        name += f" at T = {temperatures[0]:g}"
    else:
        for side, value in zip(("teacher", "student"), temperatures, strict=True):
            name += f" at the {side}'s T = {value:g}" if value != 1 else ""
    name += " times T\N{SUPERSCRIPT TWO}" if term.get("square_temperature") else ""
    name += " rescaled" if term.get("rescale") else ""
    return name + _format_teachers(term)


def _format_teachers(term: Mapping[str, Any]) -> str:
    named = term.get("teacher")
    if named is None:
        return ""
    names = [named] if isinstance(named, str) else list(named)
    if term.get("routed"):
        return f" of {' or '.join(names)}, by row"
    weights = term.get("mixture")
    if weights is None:
        return f" of {' and '.join(names)}"
    return " of " + " + ".join(f"{weight:g} {name}" for weight, name in zip(weights, names, strict=True))


def _format_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_other_term(term_type: str, settings: Mapping[str, Any]) -> str:
    name = term_type.replace("_", " ")
    told = ", ".join(
        value if isinstance(value, str) else f"{field.replace('_', ' ')} {_format_number(value)}"
        for field, value in settings.items()
    )
    return f"{name} ({told})" if told else name
