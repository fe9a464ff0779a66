"""Readable labels of losses and methods: a divergence by its beta, a list of loss terms in one line."""

import json
from collections.abc import Mapping
from typing import Any

from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA

METHOD_NAMES = {
    "sft": "SFT, as many steps",
    "seqkd": "SeqKD",
    "supervised_kd": "Supervised KD",
    "f_distill": "f-distill",
    "gkd_supervised": "Supervised GKD",
    "imitkd": "ImitKD",
    "gkd": "On-policy GKD",
}
"""The paper's names, in the order of Figure 9."""
GKD_METHODS = ("gkd_supervised", "gkd")
"""Methods that take any divergence."""


def format_method(method: str, divergence: str) -> str:
    """Format a method by the paper's name, those that take any divergence with theirs."""
    name = METHOD_NAMES.get(method, method)
    return f"{name}, {divergence}" if method in GKD_METHODS else name


def divergence_label(beta: float | None, kind: str | None = None) -> str:
    """Format `JSD(0.1)`, at its ends `Forward KL`, `Reverse KL`; a kind without beta by its name.

    `kind` is one of `DIVERGENCE_KINDS`, or the type of a term that is no divergence. Where it is not known
    (None), a beta means `jsd`.
    """
    if beta is not None and kind in ("jsd", None):
        return {0.0: "Forward KL", 1.0: "Reverse KL"}.get(float(beta), f"JSD({beta:g})")
    kind = kind or "unknown divergence"
    return NAMES_WITHOUT_BETA.get(kind, kind.replace("_", " ")).capitalize()


def loss_label(objectives: Any) -> str:
    """Format a list of loss terms, or its JSON, in one line: `JSD(0.5) + 0.1 cross entropy`.

    Omitted fields and a weight of 1 are left out.
    """
    terms = json.loads(objectives) if isinstance(objectives, str) else objectives
    return " + ".join(_format_weighted_term(dict(term)) for term in terms)


def format_axis_value(axis: str, value: Any) -> str:
    """Format a value without its axis's name: objectives by `loss_label`, floats by `:g`."""
    if axis == "objectives" and not isinstance(value, float):
        return loss_label(value)
    return _format_number(value)


def format_axis_setting(axis: str, value: Any) -> str:
    """Format axis and value, such as `student small`; objectives stand without the axis's name."""
    text = format_axis_value(axis, value)
    return text if axis == "objectives" else f"{axis} {text}"


def _format_weighted_term(term: dict[str, Any]) -> str:
    """Format a term as `JSD(0.1)`, `0.5 JSD(0.1)` or `0.5 to 1 JSD(0.1)`; pops keys of `term`."""
    weight, final_weight = term.pop("weight", 1), term.pop("final_weight", None)
    term_type = term.pop("type", "divergence")
    is_divergence = term_type == "divergence"
    name = _format_divergence_term(term) if is_divergence else _format_other_term(term_type, term)
    if final_weight is not None:
        return f"{weight:g} to {final_weight:g} {name}"
    return name if weight == 1 else f"{weight:g} {name}"


def _format_divergence_term(term: dict[str, Any]) -> str:
    """Format a divergence's label, its temperatures unless 1, its scaling and its teachers."""
    name = divergence_label(term.get("beta"), term.get("divergence"))
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
    """Format ` of a and b`, ` of 0.3 a + 0.7 b` or ` of a or b, by row`; empty without teachers.

    Older tables call the fields `teacher` and `mixture`.
    """
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
    """Format a term that is no divergence as `hidden states (mse, layers 2)`; no empty brackets."""
    name = term_type.replace("_", " ")
    parts = ", ".join(
        value if isinstance(value, str) else f"{field.replace('_', ' ')} {_format_number(value)}"
        for field, value in settings.items()
    )
    return f"{name} ({parts})" if parts else name


def _format_number(value: Any) -> str:
    """Format a float by `:g`, anything else by `str`."""
    return f"{value:g}" if isinstance(value, float) else str(value)
