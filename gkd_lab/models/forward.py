"""One forward pass for both families: logits of the completion's tokens given the prompt.

Shapes: N rows (K cells times B), P prompt tokens, C completion tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Sequences:
    """Prompts and what was written after them.

    prompt_ids, prompt_mask: (N, P); padded on the left for a decoder-only model.
    completion_ids, completion_mask: (N, C); padded on the right; the mask covers what is trained on, up to
    and including the end of sequence.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @property
    def rows(self) -> int:
        return self.prompt_ids.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sequences":
        """The same change to all four tensors."""
        return Sequences(
            change(self.prompt_ids),
            change(self.prompt_mask),
            change(self.completion_ids),
            change(self.completion_mask),
        )

    def repeated(self, times: int) -> "Sequences":
        """The same rows `times` over, block after block: one block a cell."""
        return self.map(lambda tensor: tensor.repeat(times, 1))

    def to(self, device: torch.device | str) -> "Sequences":
        return self.map(lambda tensor: tensor.to(device))

    def with_completions(self, ids: Tensor, mask: Tensor) -> "Sequences":
        return replace(self, completion_ids=ids, completion_mask=mask)


def position_ids(mask: Tensor) -> Tensor:
    """Positions that start at 0 with the first real token, whatever the padding; (N, T)."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def completion_logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Logits that predict each completion token, (N, C, V). The model may be wrapped, as by DDP."""
    config = getattr(model, "module", model).config
    if config.is_encoder_decoder:
        return model(
            input_ids=batch.prompt_ids,
            attention_mask=batch.prompt_mask,
            decoder_input_ids=shifted_right(config, batch.completion_ids),
            use_cache=False,
        ).logits
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        logits_to_keep=batch.completion_ids.shape[1] + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1]


def shifted_right(config: PretrainedConfig, completion_ids: Tensor) -> Tensor:
    """What the decoder reads while it predicts `completion_ids`."""
    start = config.decoder_start_token_id
    if start is None:
        raise ValueError(f"{type(config).__name__} has no decoder_start_token_id")
    return torch.cat(
        [completion_ids.new_full((len(completion_ids), 1), start), completion_ids[:, :-1]], dim=1
    )


def until_end(ids: Tensor, end_ids: Tensor) -> Tensor:
    """Mask of the tokens up to and including the first end of sequence, (N, C)."""
    ended = torch.isin(ids, end_ids).long()
    return (ended.cumsum(-1) - ended) == 0
