"""Predictions of every cell of a pack for the same prompts, in length-sorted batches with a KV cache."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gkd_lab.config.cell import Evaluation
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.evaluation.calculator import Calculator
from gkd_lab.losses.step_loss import split_blocks
from gkd_lab.metrics.scored_predictions import Prediction
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.tasks import Row
from gkd_lab.training.sampling import collect_end_ids, generate_completions

MAX_BATCH_SEQUENCES = 1024
"""Upper bound of cells x prompts x beams in one batch."""


def generate_predictions(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    evaluation: Evaluation,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[list[Prediction]]:
    """For each cell `samples` predictions for each row, in the rows' order; `progress` hears of rows done.

    Sampling noise belongs to the row, so that it does not depend on batching, and cells share it.
    """
    beams, samples = evaluation.num_beams or 1, evaluation.samples or 1
    size = max(1, MAX_BATCH_SEQUENCES // (pack.size * beams * samples))
    assisted = Calculator(tokenizer).assist_choice if evaluation.calculator else None
    order = sorted(range(len(rows)), key=lambda n: len(examples[n].prompt_ids))
    noise = _draw_noise(evaluation, len(rows) * samples)
    ends = collect_end_ids(pack.model, tokenizer)
    found: list[list[Prediction | None]] = [[None] * (len(rows) * samples) for _ in range(pack.size)]
    for first in range(0, len(rows), size):
        chosen = [n * samples + k for n in order[first : first + size] for k in range(samples)]
        prompts = collate_examples(
            [examples[n // samples] for n in chosen],
            tokenizer.pad_token_id,
            is_encoder_decoder=pack.model.config.is_encoder_decoder,
        ).to(pack.model.device)
        written = generate_completions(
            pack.model,
            prompts.repeat_rows(pack.size),
            max_new_tokens=evaluation.max_output_tokens,
            end_ids=ends,
            pad_id=tokenizer.pad_token_id,
            uniforms=None if noise is None else noise[chosen].repeat(pack.size, 1),
            temperature=evaluation.temperature or 1.0,
            num_beams=beams,
            length_penalty=evaluation.length_penalty or 0.0,
            wrap_chooser=assisted,
        )
        for cell, block in enumerate(split_blocks(written, pack.size)):
            texts = tokenizer.batch_decode(block.completion_ids, skip_special_tokens=True)
            lengths = block.completion_mask.sum(-1)
            last = block.completion_ids.gather(1, (lengths - 1)[:, None])[:, 0]
            ended = torch.isin(last, ends.to(last.device)).tolist()
            for n, text, length, end in zip(chosen, texts, lengths.tolist(), ended, strict=True):
                row, sample = rows[n // samples], n % samples
                found[cell][n] = Prediction(row.prompt, text.strip(), row.references, length, end, sample)
        progress(len(chosen) // samples)
    return [[p for p in predictions if p is not None] for predictions in found]


def _draw_noise(evaluation: Evaluation, rows: int) -> torch.Tensor | None:
    if evaluation.decoding != "sample":
        return None
    return draw_uniforms(evaluation.seed or 0, 0, "evaluation", rows, evaluation.max_output_tokens)
