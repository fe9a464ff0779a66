"""Places in words, as a verdict names its exceptions."""

from collections.abc import Iterable, Sequence
from typing import Any

from gkd_lab.claims.facts import FACTORS, Place

_PLAIN = ("task", "metric", "student", "decoding", "evaluation", "rest")
_NAMED = {
    "temperature": "γ = {:g}",
    "lmbda": "λ = {:g}",
    "train": "{:.3g} of the data",
    "teacher_temperature": "teacher at {:g}",
    "learning_rate": "learning rate {:g}",
    "alpha": "α = {:g}",
}
_LOSSES = {"tv": "total variation", "seqkd": "SeqKD", "sft": "SFT"}
_ROLES = {"start": "the SFT student", "teacher": "the teacher"}


def said(name: str, value: Any) -> str:
    """One field of a place."""
    if name == "beta":
        return {0.0: "forward KL", 1.0: "reverse KL"}.get(float(value), f"JSD({value:g})")
    if name == "loss":
        return "" if value == "jsd" else _LOSSES.get(value, str(value))
    if name == "role":
        return _ROLES.get(value, "")
    if name == "decoding":
        return {"sample": "sampling"}.get(value, str(value))
    if name == "pair":
        return "self-distillation" if value == "self" else ""
    if name == "anchor":
        return "RL held to its start"
    if name in _PLAIN:
        return str(value)
    return _NAMED[name].format(value) if name in _NAMED else ""


def named(place: Place, fields: Iterable[str]) -> str:
    """Some fields of a place, in the order of `FACTORS`."""
    chosen = set(fields)
    words = [said(n, place[n]) for n in FACTORS if n in chosen and place.get(n) is not None]
    return ", ".join(filter(None, words))


def apart(place: Place, other: Place) -> str:
    """What tells a place from another one of its column."""
    if place.get("role") in _ROLES:
        return _ROLES[place["role"]]
    differing = [n for n in FACTORS if place.get(n) != other.get(n) and n != "evaluation"]
    return named(place, differing)


def varying(places: Sequence[Place]) -> list[str]:
    """Fields that tell some places apart, each only where those before it do not."""
    chosen: list[str] = []
    apart_by_now = 1
    for name in (one for one in FACTORS if one != "measure"):
        found = len({tuple(str(place.get(one)) for one in (*chosen, name)) for place in places})
        if found > apart_by_now:
            chosen, apart_by_now = [*chosen, name], found
    return chosen
