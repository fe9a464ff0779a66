"""Batches as TRL's and transformers' collators lay them out, and as this package does.

Shapes: N rows, P prompt tokens, C completion tokens, T = P + C.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from gkd_lab.models.forward import Sequences

IdsAndMask = tuple[Tensor, Tensor]
NOT_TRAINED = -100


def parse_collated_batch(batch: Mapping[str, Any], pad_id: int, *, is_encoder_decoder: bool) -> Sequences:
    """A collated batch, by our collator or by a user's in TRL's form. ValueError: it is neither."""
    if has_sequence_tensors(batch):
        return Sequences(**{name: batch[name] for name in Sequences.__dataclass_fields__ if name in batch})
    if not is_trl_batch(batch):
        raise ValueError(
            f"the data collator returns {sorted(batch)}; GKDTrainer needs `input_ids`, `attention_mask` and "
            "`labels`, as TRL's DataCollatorForChatML returns them"
        )
    return parse_trl_batch(batch, pad_id, is_encoder_decoder=is_encoder_decoder)


def has_sequence_tensors(batch: Mapping[str, Any]) -> bool:
    """Whether the batch has the tensors of `Sequences`, by name."""
    return {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= batch.keys()


def build_trl_batch(batch: Sequences, *, is_encoder_decoder: bool = False) -> dict[str, Tensor]:
    """The tensors of TRL's chat collator; labels are -100 where nothing is trained.

    input_ids, attention_mask and labels are what the model's own forward takes: (N, T) each, or for an
    encoder-decoder source and target apart, (N, P) and (N, C).
    """
    ids, mask = batch.prompt_ids, batch.prompt_mask
    labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, NOT_TRAINED)
    if not is_encoder_decoder:
        ids = torch.cat([ids, batch.completion_ids], dim=1)
        mask = torch.cat([mask, batch.completion_mask], dim=1)
        labels = torch.cat([torch.full_like(batch.prompt_ids, NOT_TRAINED), labels], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "prompts": batch.prompt_ids,
        "prompt_attention_mask": batch.prompt_mask,
    }


def is_trl_batch(batch: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a collator made the batch as TRL's and transformers' do: ids and labels in a mapping."""
    return isinstance(batch, Mapping) and "input_ids" in batch and "labels" in batch


def parse_trl_batch(
    batch: Mapping[str, Tensor], pad_id: int, *, is_encoder_decoder: bool = False
) -> Sequences:
    """A batch in the form of TRL's DataCollatorForChatML, for users who pass a collator of their own.

    N rows, T tokens, P prompt tokens. input_ids, attention_mask, labels: (N, T), padded on either side,
    labels -100 where nothing is trained; prompts, prompt_attention_mask: (N, P), optional: without them the
    prompt is what stands before the first trained token. An encoder-decoder's input_ids are the source, its
    labels the target.

    ValueError: an untrained hole within the trained tokens, a row without a prompt, prompts that contradict
    input_ids. Trained tokens that follow the prompt are all that is kept.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" not in batch:
        raise ValueError("the data collator returns no attention_mask: padding cannot be told from text")
    real, trained = batch["attention_mask"].bool(), labels != NOT_TRAINED
    if is_encoder_decoder:
        source = _align_ids(ids, real, pad_id, left=False)
        return Sequences(*source, *_align_ids(labels, trained, pad_id, left=False))
    _check_trained_tokens(ids, labels, real, trained)
    prompts = _align_ids(ids, real & (trained.cumsum(1) == 0), pad_id, left=True)
    if "prompts" in batch:
        stated = _align_ids(batch["prompts"], batch["prompt_attention_mask"].bool(), pad_id, left=True)
        _check_prompt_column(stated, prompts, trained.any(1), pad_id)
        prompts = stated
    _refuse_rows(~prompts[1].any(1), "have no prompt: a completion needs one token at least to follow from")
    return Sequences(*prompts, *_align_ids(ids, trained, pad_id, left=False))


def _align_ids(ids: Tensor, selected: Tensor, pad_id: int, *, left: bool) -> IdsAndMask:
    """The kept ids of each row, in order, padded on the left or the right, and their mask."""
    width = max(1, int(selected.sum(1).max()))
    order = (selected if left else ~selected).long().argsort(dim=1, stable=True)
    order = order[:, -width:] if left else order[:, :width]
    mask = selected.gather(1, order)
    return ids.gather(1, order).masked_fill(~mask, pad_id), mask.long()


def _check_trained_tokens(ids: Tensor, labels: Tensor, real: Tensor, trained: Tensor) -> None:
    starts = trained & ~pad(trained, (1, 0))[:, :-1]
    _refuse_rows(
        starts.sum(1) > 1, "train on several parts with untrained ones between them: mask all but one"
    )
    _refuse_rows(
        (trained & ~real).any(1), "train on tokens whose attention_mask is 0: set those labels to -100"
    )
    _refuse_rows(
        (trained & (labels != ids)).any(1), "have labels unlike input_ids: do not shift or change them"
    )


def _check_prompt_column(
    column_prompts: IdsAndMask, inferred_prompts: IdsAndMask, has_completion: Tensor, pad_id: int
) -> None:
    """Stated prompts must be what the trained tokens follow: both kinds of step share one prompt."""
    width = max(column_prompts[0].shape[1], inferred_prompts[0].shape[1])
    differs = torch.zeros_like(has_completion)
    for one, other, fill in zip(column_prompts, inferred_prompts, (pad_id, 0), strict=True):
        wide = [pad(tensor, (width - tensor.shape[1], 0), value=fill) for tensor in (one, other)]
        differs |= (wide[0] != wide[1]).any(1)
    _refuse_rows(
        differs & has_completion, "have other `prompts` than stand in input_ids before the trained tokens"
    )


def _refuse_rows(is_invalid: Tensor, reason: str) -> None:
    if is_invalid.any():
        raise ValueError(
            f"rows {is_invalid.nonzero().flatten().tolist()} of the data collator's batch {reason}"
        )
