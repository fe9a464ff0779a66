"""What a claim asks for and a table does not have, in words."""

from collections.abc import Sequence
from typing import Any

from gkd_lab.claims.checks import Check, meets_conditions
from gkd_lab.claims.facts import MODEL_FIELDS, FigureCell, Measurement
from gkd_lab.claims.place_names import find_distinguishing_fields, format_field, format_fields

UNJUDGED_PREFIX = "0 of 0; "
"""How the detail of a claim without a column begins: a script finds `k of n` in every one."""

MAX_LISTED_CELLS = 8
"""Missing places that are named one by one."""


def format_unjudged(reasons: Sequence[str], unfinished_cells: Sequence[FigureCell]) -> str:
    """Why there is no verdict at all."""
    return f"{UNJUDGED_PREFIX}cannot be judged: {'; '.join([*reasons, *_list_unfinished(unfinished_cells)])}"


def list_gaps(
    missing_models: Sequence[str], reasons: Sequence[str], unfinished_cells: Sequence[FigureCell]
) -> list[str]:
    """What a verdict was given without."""
    without = [f"not in the table: {', '.join(missing_models)}"] if missing_models else []
    return [*without, *reasons, *_list_unfinished(unfinished_cells)]


def _list_unfinished(places: Sequence[FigureCell]) -> list[str]:
    fields = {*find_distinguishing_fields(places), *MODEL_FIELDS}
    names = list(dict.fromkeys(format_fields(place, fields) for place in places))
    more = f" and {len(names) - MAX_LISTED_CELLS} more" if len(names) > MAX_LISTED_CELLS else ""
    return [f"not done: {' | '.join(names[:MAX_LISTED_CELLS])}{more}"] if names else []


_MEASURE_DESCRIPTIONS = {
    "quality": "score",
    "self_bleu": "Self-BLEU (an evaluation with samples and the metric self_bleu)",
    "entailment": "entailment (a reward here, not a score)",
    "step_time": "times of cells that were trained alone (`run --pack off`)",
}


def explain_missing_data(check: Check, measurements: Sequence[Measurement]) -> str:
    """The first field that no fact meets."""
    wanted = {"measure": "quality", **check.conditions}
    if not measurements:
        return "no cells"
    left = [fact for fact in measurements if fact.figure_cell["role"] == "cell"]
    for name in sorted(wanted, key=lambda name: name != "task"):
        left = [fact for fact in left if meets_conditions(fact.figure_cell, {name: wanted[name]})]
        if not left:
            return f"no {_format_condition(name, wanted[name])}"
    return "no cells in which all of this is so: " + ", ".join(
        _format_condition(*one) for one in check.conditions.items()
    )


def _format_condition(name: str, value: Any) -> str:
    if name == "measure":
        return _MEASURE_DESCRIPTIONS[value]
    if name == "task":
        return f"cells of task {value}"
    if name == "pair":
        what = "student as large as its teacher" if value == "self" else "student smaller than its teacher"
        return f"cells with a {what}"
    if name == "decoding":
        return "evaluation by sampling" if value == "sample" else f"evaluation by {value} decoding"
    if name == "train":
        return "axis train_rows"
    if name == "alpha":
        return "cells with a reward (settings reward and alpha)"
    if callable(value):
        return f"cells with the asked for {name}"
    values = value if isinstance(value, tuple) else (value,)
    return "cells with " + " or ".join(format_field(name, one) or str(one) for one in values)
