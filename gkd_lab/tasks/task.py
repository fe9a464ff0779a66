"""Task, its rows and its row generators. A task is data and a few functions, never a class of its own."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gkd_lab.config.artifact_specs import Family
from gkd_lab.config.cell import Split
from gkd_lab.config.settings import merge_settings
from gkd_lab.tasks.scale_defaults import COMMON_SETTINGS

_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
"""A lone surrogate, as in JSON that was cut within an escaped emoji."""

SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Row:
    """One example: the input of the model, the completion to learn, and the references of the metrics."""

    prompt: str
    target: str
    references: tuple[str, ...]  # (target,) unless the data has several
    teacher: str | None = None  # name of the teacher that the row is routed to; None: all teachers


@dataclass(frozen=True)
class RowGenerator:
    """Source of rows that needs no network: the same rows for the same (seed, split).

    Both functions take a cache folder last, where a slow generator may store what it reads; None: no cache.
    """

    generate_rows: Callable[[int, Split, Path | None], Iterator[Row]]
    get_version: Callable[[Path | None], str]  # changes when the rows would: part of a cell's fingerprint
    is_endless: bool = True  # False: there is a last row, and the seed changes nothing
    check_dependencies: Callable[[], None] = lambda: None
    """Raises ValueError, with the command to run, where a package that it needs is not installed."""


@dataclass(frozen=True)
class Task:
    """A task: its rows, its metrics, and its default settings at each scale."""

    name: str
    family: Family
    metrics: tuple[str, ...]  # the headline metric first
    generators: Mapping[str, RowGenerator]
    parse_row: Callable[[Mapping[str, Any]], Row]  # raw row of real data -> Row, or ValueError
    columns: Mapping[str, str] = field(default_factory=dict)
    """`prompt`, `target` and perhaps `references` -> column that `parse_row` reads; {}: no other names."""
    reads_other_columns: bool = True
    """False: rows may have blank texts in columns that are not in `columns`."""
    hub_name: str | None = None  # the data set of the paper
    parse_row_with_marks: Callable[[Mapping[str, Any]], Row] | None = None  # keeps calculator marks
    labels: tuple[str, ...] = ()  # a classifier's labels, in the order of its outputs
    exemplars: tuple[Mapping[str, Any], ...] = ()  # worked examples for few-shot prompts, as raw rows
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Scale -> settings, with `models` (name -> settings), `evaluations`, `per_student` (name -> changes for
    that student, with its `reverse_kl`: further changes for that divergence), and `real`: changes when the
    rows are not the made ones."""

    def get_defaults(self, scale: str, source: str | None) -> Mapping[str, Any]:
        """Return the merged settings at `scale`; every `source` but `made` adds the scale's `real` changes.

        source: None: the scale's default source. Raises ValueError for a scale that the task lacks.
        """
        return merge_settings(*(dict(layer) for _, layer in self.list_default_layers(scale, source)))

    def list_default_layers(
        self, scale: str, source: str | None
    ) -> list[tuple[Literal["scale", "task", "data"], Mapping[str, Any]]]:
        """Return what `get_defaults` merges, later wins: for all tasks, this task, data that is not made."""
        if scale not in self.scales:
            raise ValueError(f"{self.name} has no {scale} scale; it has: {', '.join(self.scales)}")
        settings = dict(self.scales[scale])
        real = settings.pop("real", {})
        own_source = settings["data"].get("source")
        source = source or own_source
        if source is None:
            raise ValueError(
                f"data.source is missing: {self.name} has no rows of its own; give a folder of jsonl or "
                "parquet, or a hub name (owner/name)"
            )
        is_folder = Path(source).expanduser().is_dir()
        if source not in self.generators and (source != own_source or is_folder):
            # The part of the scale's hub data set is none of another data set, nor a folder's subfolder.
            settings["data"] = {name: value for name, value in settings["data"].items() if name != "config"}
        layers: list[tuple[Literal["scale", "task", "data"], Mapping[str, Any]]] = [
            ("scale", COMMON_SETTINGS[scale]),
            ("task", settings),
        ]
        return layers if source == "made" else [*layers, ("data", real)]


def read_text_field(raw: Mapping[str, Any], name: str) -> str:
    """Return the stripped text of a raw row's field; ValueError if it is missing, not text or blank."""
    if name not in raw:
        raise ValueError(
            f"no field {name!r}; the fields there are: {', '.join(map(str, raw)) or 'none'}; `data.columns` "
            "names other ones"
        )
    value = raw[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"field {name!r} is empty")
    if _HALF_CHARACTER.search(value):
        raise ValueError(f"field {name!r} holds half of a character, such as a cut emoji: {value!r:.60}")
    return value.strip()


def read_references(raw: Mapping[str, Any], target: str) -> tuple[str, ...]:
    """Return a raw row's list `references`, or (target,); ValueError if it is no list of texts."""
    references = raw.get("references") or [target]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise ValueError(f"field 'references' must be a list of texts, got {references!r:.60}")
    return tuple(references)
