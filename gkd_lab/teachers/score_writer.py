"""Score fixed text with a teacher once and write its scores to files.

Shapes: R rows of C completion tokens, T of them real, H width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits
from gkd_lab.models.attention import upcast_cpu_attention
from gkd_lab.models.forward import Sequences, eval_mode
from gkd_lab.models.heads import OutputHead
from gkd_lab.models.vocabulary import get_head_size
from gkd_lab.teachers.score_files import SCORE_DTYPES, ScoreLayout, ScoreWriter
from gkd_lab.teachers.top_k_distributions import TopKScores, compute_top_k_scores

ROWS_PER_BATCH = 64
LOGITS_CHUNK_BYTES = 128 * 2**20
"""Size of the logits that are computed at once."""


def number_examples(examples: Sequence[Example]) -> list[Example]:
    """Return copies of the examples with their positions as `row_index`, by which their scores are found."""
    return [replace(example, row_index=number) for number, example in enumerate(examples)]


def write_teacher_scores(
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    folder: str | Path,
    *,
    pad_id: int,
    top_k: int | None = None,
    dtype: str = "float32",
    use_bfloat16: bool = False,
    report_progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Score each row's completion with the teacher and write the scores to `folder`; finished files stay.

    Train on the examples of `number_examples` with a `CachedTeacher` of the folder.

    Args:
        top_k: Tokens named of each distribution, with the mass of all others; None: the whole vocabulary.
        dtype: Of the written scores: float32, bfloat16 or float16.
        use_bfloat16: Run the teacher under autocast to bfloat16, as a training in bf16 does.
        report_progress: Called with the number of finished rows.

    Raises ValueError for another dtype, and for top_k below 1.
    """
    if dtype not in SCORE_DTYPES:
        raise ValueError(f"dtype {dtype!r} of a teacher's scores is not one of {', '.join(SCORE_DTYPES)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} names no token: give 1 or more, or None for all of the vocabulary")
    lengths = [len(example.completion_ids) for example in examples]
    writer = ScoreWriter(Path(folder), ScoreLayout.create(lengths, top_k, get_head_size(teacher), dtype))
    head, missing = OutputHead(teacher), writer.list_missing_rows()
    n_done = len(examples) - sum(map(len, missing))
    for rows in missing:
        scores: dict[int, TopKScores] = {}
        # Rows of similar length are read together.
        order = sorted(rows, key=lambda n: len(examples[n].prompt_ids) + lengths[n])
        for first in range(0, len(order), ROWS_PER_BATCH):
            numbers = order[first : first + ROWS_PER_BATCH]
            batch = collate_examples(
                [examples[n] for n in numbers],
                pad_id,
                is_encoder_decoder=teacher.config.is_encoder_decoder,
            )
            row_scores = _score_batch(head, batch, writer.layout, use_bfloat16=use_bfloat16)
            scores.update(zip(numbers, row_scores, strict=True))
            report_progress(n_done + len(scores))
        n_done += len(scores)
        writer.write_file(rows, [examples[n].completion_ids for n in rows], [scores[n] for n in rows])


def _score_batch(
    head: OutputHead, batch: Sequences, layout: ScoreLayout, *, use_bfloat16: bool
) -> list[TopKScores]:
    """Run the teacher on a batch; return each row's scores of its real completion tokens, on the CPU."""
    device = head.model.get_input_embeddings().weight.device
    batch = batch.to(device)
    with (
        torch.no_grad(),
        eval_mode(head.model),
        upcast_cpu_attention(use_bfloat16 and device.type == "cpu"),
        torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16),
    ):
        output = head.compute_unprojected(batch)
        is_real = batch.completion_mask.bool()
        logits = HiddenTeacherLogits(output.hidden[is_real][None], output.projection)
        scores = compute_top_k_scores(logits, layout.top_k, SCORE_DTYPES[layout.dtype], LOGITS_CHUNK_BYTES)
    return scores.split(is_real.sum(-1).tolist())
