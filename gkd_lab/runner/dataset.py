"""Rows of a data split as texts and as token ids, with counts of truncated and omitted rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gkd_lab.config.artifact_specs import DataSpec, SftModel
from gkd_lab.config.cell import CorruptedText, Split
from gkd_lab.config.errors import suggest_choices
from gkd_lab.config.loss_terms import ResolvedDivergence, ResolvedTerm
from gkd_lab.encoding.batches import Example, TruncationCounts, encode_rows
from gkd_lab.encoding.labelled_rows import LabelledExample, encode_labelled_rows
from gkd_lab.models.classifiers import parse_classifier_kind
from gkd_lab.models.rng import derive_seed
from gkd_lab.store.files import write_json
from gkd_lab.tasks import Row, RowList, get_task, load_rows


@dataclass(frozen=True)
class SplitReport(TruncationCounts):
    """Counts of a split's rows: used, with a truncated prompt, with a truncated completion, omitted."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of rows that were omitted for it."""


@lru_cache(maxsize=16)
def load_split(task: str, data: DataSpec, split: Split, cache: Path) -> RowList:
    """Return the rows of a split, at most the spec's number; the same arguments give the same list object.

    Raises ValueError for broken data.
    """
    return load_rows(
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
        columns=data.columns,
        cache=cache,
    )


def take_first_rows(rows: RowList, count: int | None) -> RowList:
    """Return the first `count` rows, or all for None, with the whole split's counts of omitted rows."""
    return rows if count is None else RowList(rows[:count], rows.dropped_counts)


def build_text_pairs(model: SftModel, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return one (prompt, target) text pair per row; a decoder-only model's prompt ends with a line break."""
    end = "\n" if model.family == "decoder-only" else ""
    return [(row.prompt + end, row.target) for row in rows]


def encode_examples(model: SftModel, tokenizer: Any, rows: RowList) -> tuple[list[Any], SplitReport]:
    """Return (one example of token ids per row, counts of truncated and omitted rows).

    Texts are truncated to the model's length limits. The examples are of type `Example`, or for a classifier
    `LabelledExample`.
    """
    examples: Sequence[Example | LabelledExample]
    pairs, max_input_tokens = build_text_pairs(model, rows), model.max_input_tokens
    kind = parse_classifier_kind(model.family)
    if kind is not None:
        labels = get_task(model.task).labels
        examples, counts = encode_labelled_rows(
            tokenizer, kind, labels, pairs, max_input_tokens=max_input_tokens
        )
    else:
        examples, counts = encode_rows(
            tokenizer,
            pairs,
            is_encoder_decoder=model.family == "encoder-decoder",
            max_input_tokens=max_input_tokens,
            max_output_tokens=model.max_output_tokens,
        )
    return list(examples), SplitReport(**vars(counts), dropped=rows.dropped_counts)


def write_split_report(folder: Path, split: str, report: SplitReport) -> None:
    """Write the counts of truncated and omitted rows as JSON to `rows-<split>.json` in the folder."""
    write_json(folder / f"rows-{split}.json", vars(report))


def assign_teachers(
    examples: Sequence[Example], rows: Sequence[Row], terms: Iterable[ResolvedTerm]
) -> list[Example]:
    """Return the examples with `teacher_index` set to the index of the teacher that their row names.

    The name in the column `teacher` is looked up in the routes of the divergence terms; without routes the
    examples are returned unchanged. Raises ValueError for a row that names none of the routed teachers.
    """
    teacher_indices: dict[str, int] = {}
    for term in terms:
        if isinstance(term, ResolvedDivergence) and term.routes is not None:
            teacher_indices |= dict(zip(term.routes, term.teachers, strict=True))
    if not teacher_indices:
        return list(examples)
    return [
        replace(example, teacher_index=_find_teacher_index(row, row_index, teacher_indices))
        for row_index, (example, row) in enumerate(zip(examples, rows, strict=True))
    ]


def _find_teacher_index(row: Row, row_index: int, teacher_indices: dict[str, int]) -> int:
    """Return the index of the teacher that a row names. ValueError for no name or one without a route."""
    if row.teacher is None:
        raise ValueError(
            f"a divergence has routes, but row {row_index} of the train split names no teacher: give the "
            f"data a column `teacher` with {' or '.join(map(repr, teacher_indices))}"
        )
    if row.teacher not in teacher_indices:
        raise ValueError(
            f"row {row_index} of the train split names the teacher {row.teacher!r}, for which no divergence "
            f"has a route; {suggest_choices(row.teacher, teacher_indices)}"
        )
    return teacher_indices[row.teacher]


def corrupt_completions(examples: Sequence[Example], text: CorruptedText, tokenizer: Any) -> list[Example]:
    """Return the examples, `samples` times one after the other, each time with other tokens replaced.

    A control for on-policy text: new in every epoch, with mistakes, but not the student's own.
    A token is replaced with chance `share`, by any that is not special; the end of sequence stays. The
    result depends on the examples and the text's seed alone.
    """
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    copies = []
    for copy in range(text.samples):
        generator = torch.Generator().manual_seed(derive_seed(text.seed, copy, "corrupted text"))
        for example in examples:
            ids = torch.tensor(example.completion_ids)
            others = words[torch.randint(len(words), ids.shape, generator=generator)]
            is_replaced = torch.rand(ids.shape, generator=generator) < text.share
            is_replaced &= ~torch.isin(ids, torch.tensor(sorted(special)))
            copies.append(replace(example, completion_ids=torch.where(is_replaced, others, ids).tolist()))
    return copies
