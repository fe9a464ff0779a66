"""Places in words, as a verdict names its exceptions."""

from collections.abc import Iterable, Sequence
from typing import Any

from gkd_lab.claims.facts import FIGURE_CELL_FIELDS, FigureCell

_PLAIN_FIELDS = ("task", "metric", "student", "decoding", "evaluation", "rest")
_FIELD_TEMPLATES = {
    "temperature": "γ = {:g}",
    "lmbda": "λ = {:g}",
    "train": "{:.3g} of the data",
    "teacher_temperature": "teacher at {:g}",
    "learning_rate": "learning rate {:g}",
    "alpha": "α = {:g}",
}
_LOSS_NAMES = {"tv": "total variation", "seqkd": "SeqKD", "sft": "SFT"}
_ROLE_NAMES = {"start": "the SFT student", "teacher": "the teacher"}


def format_field(field_name: str, value: Any) -> str:
    """One field of a place."""
    if field_name == "beta":
        return {0.0: "forward KL", 1.0: "reverse KL"}.get(float(value), f"JSD({value:g})")
    if field_name == "loss":
        return "" if value == "jsd" else _LOSS_NAMES.get(value, str(value))
    if field_name == "role":
        return _ROLE_NAMES.get(value, "")
    if field_name == "decoding":
        return {"sample": "sampling"}.get(value, str(value))
    if field_name == "pair":
        return "self-distillation" if value == "self" else ""
    if field_name == "anchor":
        return "RL held to its start"
    if field_name in _PLAIN_FIELDS:
        return str(value)
    return _FIELD_TEMPLATES[field_name].format(value) if field_name in _FIELD_TEMPLATES else ""


def format_fields(place: FigureCell, fields: Iterable[str]) -> str:
    """Some fields of a place, in the order of `FACTORS`."""
    chosen = set(fields)
    words = [
        format_field(n, place[n]) for n in FIGURE_CELL_FIELDS if n in chosen and place.get(n) is not None
    ]
    return ", ".join(filter(None, words))


def format_distinction(place: FigureCell, other: FigureCell) -> str:
    """What tells a place from another one of its column."""
    if place.get("role") in _ROLE_NAMES:
        return _ROLE_NAMES[place["role"]]
    differing = [n for n in FIGURE_CELL_FIELDS if place.get(n) != other.get(n) and n != "evaluation"]
    return format_fields(place, differing)


def find_distinguishing_fields(places: Sequence[FigureCell]) -> list[str]:
    """Fields that tell some places apart, each only where those before it do not."""
    chosen: list[str] = []
    apart_by_now = 1
    for name in (one for one in FIGURE_CELL_FIELDS if one != "measure"):
        found = len({tuple(str(place.get(one)) for one in (*chosen, name)) for place in places})
        if found > apart_by_now:
            chosen, apart_by_now = [*chosen, name], found
    return chosen
