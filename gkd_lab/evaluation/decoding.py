"""Generate the predictions of every cell of a pack, in length-sorted batches with a KV cache."""

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
"""Most cells x prompts x beams in one batch."""


def generate_predictions(
    pack: Pack,
    tokenizer: Any,
    rows: Sequence[Row],
    examples: Sequence[Example],
    evaluation: Evaluation,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    shard: tuple[int, int] = (0, 1),
    max_sequences: int | None = None,
) -> list[list[Prediction]]:
    """Generate `samples` texts per row by every cell; return one list of predictions per cell, by row.

    A row's samples follow each other. Sampling noise is keyed by row, so it does not depend on batching, and
    all cells share it. `progress` is called after each batch with its number of rows.

    shard: (k, n) takes rows k, k + n, ... alone, as one of n processes. max_sequences: most cells x prompts x
    beams in one batch; None: `MAX_BATCH_SEQUENCES`.
    """
    beams, samples = evaluation.num_beams or 1, evaluation.samples or 1
    size = max(1, (max_sequences or MAX_BATCH_SEQUENCES) // (pack.size * beams * samples))
    wrap_chooser = Calculator(tokenizer).assist_choice if evaluation.calculator else None
    order = sorted(range(shard[0], len(rows), shard[1]), key=lambda n: len(examples[n].prompt_ids))
    noise = _draw_noise(evaluation, len(rows) * samples)
    end_ids = collect_end_ids(pack.model, tokenizer)
    predictions: list[dict[int, Prediction]] = [{} for _ in range(pack.size)]
    for start in range(0, len(order), size):
        indices = [n * samples + k for n in order[start : start + size] for k in range(samples)]
        prompts = collate_examples(
            [examples[n // samples] for n in indices],
            tokenizer.pad_token_id,
            is_encoder_decoder=pack.model.config.is_encoder_decoder,
        ).to(pack.model.device)
        completions = generate_completions(
            pack.model,
            prompts.repeat_rows(pack.size),
            max_new_tokens=evaluation.max_output_tokens,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id,
            uniforms=None if noise is None else noise[indices].repeat(pack.size, 1),
            temperature=evaluation.temperature or 1.0,
            num_beams=beams,
            length_penalty=evaluation.length_penalty or 0.0,
            length_penalty_form=evaluation.length_penalty_form,
            wrap_chooser=wrap_chooser,
        )
        for cell, block in enumerate(split_blocks(completions, pack.size)):
            texts = tokenizer.batch_decode(block.completion_ids, skip_special_tokens=True)
            lengths = block.completion_mask.sum(-1)
            last_ids = block.completion_ids.gather(1, (lengths - 1)[:, None])[:, 0]
            has_ended = torch.isin(last_ids, end_ids.to(last_ids.device)).tolist()
            for n, text, length, ended in zip(indices, texts, lengths.tolist(), has_ended, strict=True):
                row, sample = rows[n // samples], n % samples
                predictions[cell][n] = Prediction(
                    row.prompt, text.strip(), row.references, length, ended, sample
                )
        progress(len(indices) // samples)
    return [[by_index[n] for n in sorted(by_index)] for by_index in predictions]


def _draw_noise(evaluation: Evaluation, rows: int) -> torch.Tensor | None:
    """Return sampling noise for every prediction, (rows, max_output_tokens); None for greedy, beam search."""
    if evaluation.decoding != "sample":
        return None
    return draw_uniforms(evaluation.seed or 0, 0, "evaluation", rows, evaluation.max_output_tokens)
