"""A teacher reads fixed text once, and what it says of each token is written down.

Shapes: R rows of C completion tokens, T of them real, H width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gkd_lab.encoding.batches import Example, collate
from gkd_lab.losses.teacher_targets import Projected
from gkd_lab.models.attention import attention_in_float32
from gkd_lab.models.forward import Sequences, evaluating
from gkd_lab.models.heads import Head
from gkd_lab.models.vocabulary import head_size
from gkd_lab.teachers.score_files import DTYPES, Layout, ScoreWriter
from gkd_lab.teachers.top_k_distributions import Scores, kept_of

ROWS_AT_ONCE = 64
CHUNK_BYTES = 128 * 2**20
"""Size of the logits that are made at once."""


def numbered(examples: Sequence[Example]) -> list[Example]:
    """The rows with their place among them, by which their scores are found."""
    return [replace(row, number=number) for number, row in enumerate(examples)]


def write_scores(
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    folder: str | Path,
    *,
    pad_id: int,
    top_k: int | None = None,
    dtype: str = "float32",
    lowered: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> None:
    """Write what `teacher` says of each row's completion; files that are there already are kept.

    A row's place is its number: train on `numbered` rows with a `StoredTeacher` of the folder.

    Args:
        top_k: tokens named of each distribution, with the mass of all others; None: all of the vocabulary.
        dtype: of what is written: float32, bfloat16 or float16.
        lowered: read under autocast to bfloat16, as a training in bf16 does.
        advance: called with the rows that are done.

    Raises ValueError for a dtype that is none of these, and for top_k below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} of a teacher's scores is not one of {', '.join(DTYPES)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} names no token: give 1 or more, or None for all of the vocabulary")
    lengths = [len(example.completion_ids) for example in examples]
    writer = ScoreWriter(Path(folder), Layout.of(lengths, top_k, head_size(teacher), dtype))
    head, missing = Head(teacher), writer.missing()
    done = len(examples) - sum(map(len, missing))
    for rows in missing:
        found: dict[int, Scores] = {}
        # Rows of like length are read together.
        order = sorted(rows, key=lambda n: len(examples[n].prompt_ids) + lengths[n])
        for first in range(0, len(order), ROWS_AT_ONCE):
            some = order[first : first + ROWS_AT_ONCE]
            batch = collate(
                [examples[n] for n in some], pad_id, is_encoder_decoder=teacher.config.is_encoder_decoder
            )
            found.update(zip(some, _read(head, batch, writer.layout, lowered), strict=True))
            advance(done + len(found))
        done += len(found)
        writer.write(rows, [examples[n].completion_ids for n in rows], [found[n] for n in rows])


def _read(head: Head, batch: Sequences, layout: Layout, lowered: bool) -> list[Scores]:
    """Of each row's real tokens."""
    device = head.model.get_input_embeddings().weight.device
    batch = batch.to(device)
    with (
        torch.no_grad(),
        evaluating(head.model),
        attention_in_float32(lowered and device.type == "cpu"),
        torch.autocast(device.type, torch.bfloat16, enabled=lowered),
    ):
        read = head.unprojected(batch)
        real = batch.completion_mask.bool()
        guide = Projected(read.hidden[real][None], read.projection)
        kept = kept_of(guide, layout.top_k, DTYPES[layout.dtype], CHUNK_BYTES)
    return kept.split(real.sum(-1).tolist())
