"""What a claim asks for and a table does not have, in words."""

from collections.abc import Sequence
from typing import Any

from gkd_lab.claims.checks import Check, fits
from gkd_lab.claims.facts import WHAT, Fact, Place
from gkd_lab.claims.place_names import named, said, varying

NOTHING = "0 of 0; "
"""How the detail of a claim without a column begins: a script finds `k of n` in every one."""

MOST_NAMED = 8
"""Missing places that are named one by one."""


def why_not(why: Sequence[str], undone: Sequence[Place]) -> str:
    """Why there is no verdict at all."""
    return f"{NOTHING}cannot be judged: {'; '.join([*why, *_undone(undone)])}"


def not_there(absent: Sequence[str], why: Sequence[str], undone: Sequence[Place]) -> list[str]:
    """What a verdict was given without."""
    without = [f"not in the table: {', '.join(absent)}"] if absent else []
    return [*without, *why, *_undone(undone)]


def _undone(places: Sequence[Place]) -> list[str]:
    fields = {*varying(places), *WHAT}
    names = list(dict.fromkeys(named(place, fields) for place in places))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return [f"not done: {' | '.join(names[:MOST_NAMED])}{more}"] if names else []


_MEASURES = {
    "quality": "score",
    "self_bleu": "Self-BLEU (an evaluation with samples and the metric self_bleu)",
    "entailment": "entailment (a reward here, not a score)",
    "step_time": "times of cells that were trained alone (`run --pack off`)",
}


def lacking(check: Check, facts: Sequence[Fact]) -> str:
    """The first field that no fact meets."""
    wanted = {"measure": "quality", **check.where}
    if not facts:
        return "no cells"
    left = [fact for fact in facts if fact.place["role"] == "cell"]
    for name in sorted(wanted, key=lambda name: name != "task"):
        left = [fact for fact in left if fits(fact.place, {name: wanted[name]})]
        if not left:
            return f"no {_asked(name, wanted[name])}"
    return "no cells in which all of this is so: " + ", ".join(_asked(*one) for one in check.where.items())


def _asked(name: str, value: Any) -> str:
    if name == "measure":
        return _MEASURES[value]
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
    return "cells with " + " or ".join(said(name, one) or str(one) for one in values)
