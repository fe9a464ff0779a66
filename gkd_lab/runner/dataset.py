"""The rows that a cell or an artifact needs, as texts and as token ids, and how many were cut or left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gkd_lab.config.artifact_specs import DataSpec, SftModel
from gkd_lab.config.cell import Split
from gkd_lab.encoding.batches import Example, TruncationCounts, encode_rows
from gkd_lab.encoding.labelled_rows import LabelledExample, encode_labelled_rows
from gkd_lab.models.classifiers import parse_classifier_kind
from gkd_lab.store.files import write_json
from gkd_lab.tasks import Row, get_task, load_rows


@dataclass(frozen=True)
class SplitReport(TruncationCounts):
    """What became of a split's rows: `rows` were taken, so many `prompts` and `completions` of them were
    longer than their limits and lost what exceeded it, and `dropped` rows were not taken, by reason.
    """

    dropped: dict[str, int] = field(default_factory=dict)


class SplitRows(tuple[Row, ...]):
    """Rows that remember what their source left out."""

    dropped: dict[str, int]

    @classmethod
    def create(cls, rows: Iterable[Row], dropped: dict[str, int]) -> "SplitRows":
        made = cls(rows)
        made.dropped = dropped
        return made

    def take_first(self, count: int | None) -> "SplitRows":
        """The first rows; None: all."""
        return self if count is None else SplitRows.create(self[:count], self.dropped)


@lru_cache(maxsize=16)
def load_split(task: str, data: DataSpec, split: Split, cache: Path) -> SplitRows:
    """The rows of a split, as many as the spec asks for or as there are. ValueError for broken data."""
    found = load_rows(
        get_task(task),
        data.kind,
        name=data.name,
        path=data.path,
        revision=data.revision,
        config=data.config,
        split=split,
        count=getattr(data, split),
        seed=data.seed,
        shots=data.shots,
        calculator_marks=data.calculator_marks,
        cache=cache,
    )
    return SplitRows.create(found, found.dropped_counts)


def build_text_pairs(model: SftModel, rows: tuple[Row, ...]) -> list[tuple[str, str]]:
    """(prompt, target) as the model reads them: a decoder's prompt ends with a line break."""
    end = "\n" if model.family == "decoder-only" else ""
    return [(row.prompt + end, row.target) for row in rows]


def encode_examples(model: SftModel, tokenizer: Any, rows: tuple[Row, ...]) -> tuple[list[Any], SplitReport]:
    """Token ids of the rows within the model's limits, and how many rows were cut or left out.

    `Example`s, or of a classifier `LabelledExample`.
    """
    encoded: Sequence[Example | LabelledExample]
    pairs, limit = build_text_pairs(model, rows), model.max_input_tokens
    kind = parse_classifier_kind(model.family)
    if kind is not None:
        names = get_task(model.task).labels
        encoded, cut = encode_labelled_rows(tokenizer, kind, names, pairs, max_input_tokens=limit)
    else:
        encoded, cut = encode_rows(
            tokenizer,
            pairs,
            is_encoder_decoder=model.family == "encoder-decoder",
            max_input_tokens=limit,
            max_output_tokens=model.max_output_tokens,
        )
    return list(encoded), SplitReport(
        **vars(cut), dropped=rows.dropped if isinstance(rows, SplitRows) else {}
    )


def write_split_report(folder: Path, split: str, report: TruncationCounts) -> None:
    """Say beside the record how many rows were longer than the limits, and how many were left out."""
    write_json(folder / f"rows-{split}.json", vars(report))
