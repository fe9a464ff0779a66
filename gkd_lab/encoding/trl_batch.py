"""Convert batches between `Sequences` and the form of TRL's and transformers' collators.

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
    """Convert a collator's batch, with our tensor names or TRL's, to `Sequences`; ValueError for others."""
    if has_sequence_tensors(batch):
        return Sequences(**{name: batch[name] for name in Sequences.__dataclass_fields__ if name in batch})
    if not is_trl_batch(batch):
        raise ValueError(
            f"the data collator returns {sorted(batch)}; GKDTrainer needs `input_ids`, `attention_mask` and "
            "`labels`, as TRL's DataCollatorForChatML returns them"
        )
    return parse_trl_batch(batch, pad_id, is_encoder_decoder=is_encoder_decoder)


def has_sequence_tensors(batch: Mapping[str, Any]) -> bool:
    """Check whether a batch has the keys prompt_ids, prompt_mask, completion_ids and completion_mask."""
    return {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"} <= batch.keys()


def build_trl_batch(batch: Sequences, *, is_encoder_decoder: bool = False) -> dict[str, Tensor]:
    """Return name -> tensor of TRL's chat collator for these sequences; labels are -100 for untrained tokens.

    input_ids, attention_mask and labels are the arguments of the model's forward: (N, T) each, or for an
    encoder-decoder source and target, (N, P) and (N, C).
    """
    ids, mask = batch.prompt_ids, batch.prompt_mask
    labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, NOT_TRAINED)
    if not is_encoder_decoder:
        ids, mask = batch.joined_ids, batch.joined_mask
        labels = torch.cat([torch.full_like(batch.prompt_ids, NOT_TRAINED), labels], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "prompts": batch.prompt_ids,
        "prompt_attention_mask": batch.prompt_mask,
    }


def is_trl_batch(batch: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Check whether a batch is a mapping with the keys `input_ids` and `labels`."""
    return isinstance(batch, Mapping) and "input_ids" in batch and "labels" in batch


def parse_trl_batch(
    batch: Mapping[str, Tensor], pad_id: int, *, is_encoder_decoder: bool = False
) -> Sequences:
    """Convert a TRL batch to `Sequences`; the completion is the tokens with a label other than -100.

    input_ids, attention_mask, labels: (N, T), padded on either side, labels -100 for untrained tokens; tokens
    after the trained ones are dropped. prompts, prompt_attention_mask: (N, P), optional, by default the
    tokens before the first trained one. An encoder-decoder's input_ids are the source, its labels the target.

    Raises:
        ValueError: for untrained tokens between trained ones, a row without a prompt, and prompts that
            contradict input_ids.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" not in batch:
        raise ValueError("the data collator returns no attention_mask: padding cannot be told from text")
    is_real, trained = batch["attention_mask"].bool(), labels != NOT_TRAINED
    if is_encoder_decoder:
        source = _align_ids(ids, is_real, pad_id, left=False)
        return Sequences(*source, *_align_ids(labels, trained, pad_id, left=False))
    _check_trained_tokens(ids, labels, is_real, trained)
    prompts = _align_ids(ids, is_real & (trained.cumsum(1) == 0), pad_id, left=True)
    if "prompts" in batch:
        column_prompts = _align_ids(
            batch["prompts"], batch["prompt_attention_mask"].bool(), pad_id, left=True
        )
        _check_prompt_column(column_prompts, prompts, trained.any(1), pad_id)
        prompts = column_prompts
    _refuse_rows(~prompts[1].any(1), "have no prompt: a completion needs at least one token to follow from")
    return Sequences(*prompts, *_align_ids(ids, trained, pad_id, left=False))


def _align_ids(ids: Tensor, selected: Tensor, pad_id: int, *, left: bool) -> IdsAndMask:
    """Return (ids, mask) of each row's selected ids only, in order, padded to one width (left: in front)."""
    width = max(1, int(selected.sum(1).max()))
    order = (selected if left else ~selected).long().argsort(dim=1, stable=True)
    order = order[:, -width:] if left else order[:, :width]
    mask = selected.gather(1, order)
    return ids.gather(1, order).masked_fill(~mask, pad_id), mask.long()


def _check_trained_tokens(ids: Tensor, labels: Tensor, is_real: Tensor, trained: Tensor) -> None:
    """Raise ValueError if a row's trained tokens are in several parts, under padding, or unlike input_ids."""
    starts = trained & ~pad(trained, (1, 0))[:, :-1]
    _refuse_rows(
        starts.sum(1) > 1, "train on several parts with untrained ones between them: mask all but one"
    )
    _refuse_rows(
        (trained & ~is_real).any(1), "train on tokens whose attention_mask is 0: set those labels to -100"
    )
    _refuse_rows(
        (trained & (labels != ids)).any(1), "have labels unlike input_ids: do not shift or change them"
    )


def _check_prompt_column(
    column_prompts: IdsAndMask, inferred_prompts: IdsAndMask, has_completion: Tensor, pad_id: int
) -> None:
    """Raise ValueError if a row's `prompts` are not the tokens before its completion in input_ids."""
    width = max(column_prompts[0].shape[1], inferred_prompts[0].shape[1])
    differs = torch.zeros_like(has_completion)
    for tensors in zip(column_prompts, inferred_prompts, (pad_id, 0), strict=True):
        first, second = (pad(t, (width - t.shape[1], 0), value=tensors[2]) for t in tensors[:2])
        differs |= (first != second).any(1)
    _refuse_rows(
        differs & has_completion, "have other `prompts` than the tokens before the trained ones in input_ids"
    )


def _refuse_rows(is_invalid: Tensor, reason: str) -> None:
    """Raise ValueError with `reason` and the indices of the invalid rows, if there are any."""
    if is_invalid.any():
        raise ValueError(
            f"rows {is_invalid.nonzero().flatten().tolist()} of the data collator's batch {reason}"
        )
