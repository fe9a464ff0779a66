"""Settings of the models that claims compare: their names, conditions on them, and their text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gkd_lab.config.loss_terms import NAMES_WITHOUT_BETA
from gkd_lab.tables.loss_labels import format_axis_setting

Settings = Mapping[str, Any]
"""Setting -> value; None or absent where it does not apply."""

Conditions = Mapping[str, Any]
"""Setting -> required value, tuple of accepted values, or predicate."""

MODEL_SETTINGS = ("role", "lmbda", "loss", "beta", "alpha", "anchor")
"""Settings that tell a model from the others of its column."""
SETTING_NAMES = (
    "task", "metric", "measure", "student", "pair", "decoding", "temperature", "evaluation", "train_share",
    "teacher_temperature", "learning_rate", "other_axes", *MODEL_SETTINGS,
)  # fmt: skip

STUDENT_SIZES = ("small", "base", "large")
"""Names of students, from small to large, in the paper and at each of our scales."""


def meets_condition(value: Any, condition: Any) -> bool:
    """Return whether a value equals the condition (0.1 % for numbers), is in its tuple, or satisfies it."""
    if isinstance(condition, tuple):
        return any(meets_condition(value, option) for option in condition)
    if callable(condition):
        return value is not None and bool(condition(value))
    if isinstance(condition, (int, float)) and isinstance(value, (int, float)):
        return math.isclose(value, condition, rel_tol=1e-3, abs_tol=1e-9)
    return bool(value == condition)


def require_minimum(bound: float) -> Callable[[float], bool]:
    """Return a predicate to use as a condition: the value is at least `bound`."""
    return lambda value: value >= bound


def require_prefix(prefix: str) -> Callable[[str], bool]:
    """Return a predicate to use as a condition: the value begins so, as `mmlu_5shot` with `mmlu`."""
    return lambda value: value.startswith(prefix)


# ---- text ----

_PLAIN_SETTINGS = ("task", "metric", "student", "decoding", "evaluation")
_SETTING_TEMPLATES = {
    "temperature": "γ = {:g}",
    "lmbda": "λ = {:g}",
    "train_share": "{:.3g} of the data",
    "teacher_temperature": "teacher at {:g}",
    "learning_rate": "learning rate {:g}",
    "alpha": "α = {:g}",
}
_LOSS_NAMES = {**NAMES_WITHOUT_BETA, "seqkd": "SeqKD", "sft": "SFT"}
_ROLE_NAMES = {"start": "the SFT student", "teacher": "the teacher"}


def format_setting(name: str, value: Any) -> str:
    """Format a setting, such as `λ = 0.5` or `forward KL`; empty where it needs no mention."""
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
    if name == "other_axes":
        return ", ".join(format_axis_setting(axis, setting) for axis, setting in value)
    if name == "anchor":
        return "RL held to its start"
    if name in _PLAIN_SETTINGS:
        return str(value)
    return _SETTING_TEMPLATES[name].format(value) if name in _SETTING_TEMPLATES else ""


def format_settings(settings: Settings, names: Iterable[str]) -> str:
    """Join the formatted values of these settings with commas; those that are None are left out."""
    selected = set(names)
    words = [
        format_setting(name, settings[name])
        for name in SETTING_NAMES
        if name in selected and settings.get(name) is not None
    ]
    return ", ".join(filter(None, words))


def format_distinction(settings: Settings, other: Settings) -> str:
    """Format the settings in which a model differs from another one; a start or teacher by its role."""
    if settings.get("role") in _ROLE_NAMES:
        return _ROLE_NAMES[settings["role"]]
    differing = [n for n in SETTING_NAMES if settings.get(n) != other.get(n) and n != "evaluation"]
    return format_settings(settings, differing)


def find_distinguishing_settings(all_settings: Sequence[Settings]) -> list[str]:
    """Return names of settings that together tell all apart; one that adds nothing is left out."""
    names: list[str] = []
    distinct = 1
    for name in SETTING_NAMES:
        if name != "measure":
            count = len({tuple(str(settings.get(n)) for n in (*names, name)) for settings in all_settings})
            names, distinct = ([*names, name], count) if count > distinct else (names, distinct)
    return names


_MEASURE_DESCRIPTIONS = {
    "quality": "score",
    "self_bleu": "Self-BLEU (an evaluation with samples and the metric self_bleu)",
    "entailment": "entailment (a reward here, not a score)",
    "step_time": "times of cells that were trained alone (`run --pack off`)",
}
_CONDITION_TEXTS = {
    "train_share": "axis train_rows",
    "alpha": "cells with a reward (settings reward and alpha)",
}


def describe_condition(name: str, condition: Any) -> str:
    """Describe the cells, evaluation or axis that meet a condition, such as `cells of task arithmetic`."""
    if name == "measure":
        return _MEASURE_DESCRIPTIONS[condition]
    if name == "task":
        return f"cells of task {condition}"
    if name == "pair":
        size = "as large as" if condition == "self" else "smaller than"
        return f"cells with a student {size} its teacher"
    if name == "decoding":
        return "evaluation by sampling" if condition == "sample" else f"evaluation by {condition} decoding"
    if name in _CONDITION_TEXTS:
        return _CONDITION_TEXTS[name]
    if callable(condition):
        return f"cells with the asked for {name}"
    options = condition if isinstance(condition, tuple) else (condition,)
    return "cells with " + " or ".join(format_setting(name, option) or str(option) for option in options)
