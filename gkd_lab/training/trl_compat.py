"""Static methods of TRL's GKDTrainer that scripts call on the class, with TRL's signatures."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gkd_lab.losses.divergence import compute_logs, pointwise_jsd
from gkd_lab.models.forward import eval_mode, make_completion_mask

REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Any = None,
) -> Tensor:
    """Return JSD(beta) of logits (B, T, V), as TRL's: a scalar, or with reduction "none" all values.

    Computed in float32 at least and finite with -inf logits, which TRL's is not. `labels` (B, T) are -100
    where nothing counts. `"batchmean"` divides by the tokens that count (without labels by B), as
    `num_items_in_batch` does by that number; `"none"` returns one value per vocabulary entry.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is not one of {REDUCTIONS}")
    if labels is not None:
        student_logits, teacher_logits = student_logits[labels != -100], teacher_logits[labels != -100]
    log_q, log_p, log_ratio = compute_logs(student_logits, teacher_logits, temperature, temperature)
    if reduction == "none" and beta in (0, 1) and num_items_in_batch is None:  # TRL's entries, of either sign
        return log_p.exp() * log_ratio if beta == 0 else -log_q.exp() * log_ratio
    values = pointwise_jsd(log_q, log_p, log_ratio, beta)
    if num_items_in_batch is not None:
        return values.sum() / torch.as_tensor(num_items_in_batch, device=values.device)
    if reduction == "batchmean":
        return values.sum() / max(1, values.shape[0])
    if reduction == "sum":
        return values.sum()
    return values.mean() if reduction == "mean" else values


def generate_on_policy_outputs(
    model: Any, inputs: Mapping[str, Tensor], generation_config: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample completions of the prompts (B, P); return (ids, attention mask, labels), each (B, P + C).

    The prompts are `inputs["prompts"]`. The model samples in eval mode. Labels are -100 on the prompt and
    after the first end of sequence.
    """
    prompts, prompt_mask = inputs["prompts"], inputs["prompt_attention_mask"]
    dropout_off = eval_mode(model) if isinstance(model, nn.Module) else nullcontext()
    with torch.no_grad(), dropout_off:
        ids = model.generate(
            input_ids=prompts,
            attention_mask=prompt_mask,
            generation_config=generation_config,
            return_dict_in_generate=True,
        ).sequences
    completion = ids[:, prompts.shape[1] :]
    ends = generation_config.eos_token_id
    end_ids = torch.tensor([] if ends is None else ends, dtype=torch.long, device=ids.device).flatten()
    mask = torch.cat([prompt_mask, make_completion_mask(completion, end_ids).to(prompt_mask.dtype)], dim=1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : prompts.shape[1]] = -100
    return ids, mask, labels
