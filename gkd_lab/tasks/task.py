"""What a task is: rows to learn from, where they come from and how the answers are judged.

A task is data and a few functions, never a class of its own: variation is a value. No torch here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gkd_lab.config.settings import merge_settings
from gkd_lab.tasks.scale_defaults import COMMON_SETTINGS

Family = Literal[
    "decoder-only", "encoder-decoder", "sequence-classification", "token-classification", "regression"
]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One example: what the model is given, what it should write, what a metric compares with."""

    prompt: str
    target: str
    references: tuple[str, ...]  # (target,) unless the data has several
    teacher: str | None = None  # which of several teachers the row is meant for


@dataclass(frozen=True)
class MadeSource:
    """A source made on the spot, without network: the same rows for the same (seed, split).

    Both functions take a folder last, where a slow source may keep what it read; None: nowhere.
    """

    rows: Callable[[int, Split, Path | None], Iterator[Row]]
    version: Callable[[Path | None], str]  # changes when the rows would: part of a cell's identity
    endless: bool = True  # False: the source has a last row, and the seed changes nothing
    check: Callable[[], None] = lambda: None
    """ValueError, with the way out, where something that the source needs is not installed."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is judged."""

    name: str
    family: Family
    metrics: tuple[str, ...]  # the headline metric first
    generators: Mapping[str, MadeSource]
    parse_row: Callable[[Mapping[str, Any]], Row]  # one raw row of real data -> Row, or ValueError
    hub_name: str | None = None  # the data the paper used
    parse_row_with_marks: Callable[[Mapping[str, Any]], Row] | None = (
        None  # keeps calculator marks, where there are
    )
    labels: tuple[str, ...] = ()  # what a classifier chooses from, in the order of its outputs
    exemplars: tuple[Mapping[str, Any], ...] = ()  # worked examples for few-shot prompts, as raw rows
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Scale -> settings, with `models` (name -> settings), `evaluations`, `per_student` (name -> what
    changes for that student, and its `reverse_kl`: what changes for that divergence besides), and
    `real`: what changes when the rows are not the made ones."""

    def get_defaults(self, scale: str, source: str | None) -> Mapping[str, Any]:
        """All settings at `scale` for rows from `source` (None: the scale's own choice)."""
        if scale not in self.scales:
            raise ValueError(f"{self.name} has no {scale} scale; it has: {', '.join(self.scales)}")
        own = dict(self.scales[scale])
        real = own.pop("real", {})
        chosen = source or own["data"]["source"]
        return merge_settings(dict(COMMON_SETTINGS[scale]), own, real if chosen != "made" else {})


def text_field(raw: Mapping[str, Any], name: str) -> str:
    """The text in field `name`, stripped; ValueError if it is missing, not text or empty."""
    if name not in raw:
        raise ValueError(f"no field {name!r}; the fields there are: {', '.join(map(str, raw))}")
    value = raw[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"field {name!r} is empty")
    return value.strip()
