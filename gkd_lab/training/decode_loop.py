"""A decoding loop for `generate` of transformers: rows that have ended leave the batch.

Prompts, caches, masks and positions stay those of `generate`, which calls the loop with what it has prepared.
Shapes: K cells of a pack, N rows (N/K a cell), V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TokenChooser = Callable[[Tensor, Tensor, int], Tensor]
"""Scores (n, V) of rows (n,) of the first batch at a token's position -> tokens (n,)."""

SHRINK_THRESHOLD = 0.75
"""Rows leave once at most this share of the batch is left: each time copies the cache once."""

_PER_ROW_INPUTS = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids")


def choose_most_likely(scores: Tensor, rows: Tensor, position: int) -> Tensor:
    """Greedy search."""
    return scores.argmax(-1)


@dataclass(frozen=True)
class InverseCdfSampler:
    """Draws the token where the cumulative distribution passes the row's uniform number.

    Attributes:
        uniforms: (N, C), one number a row and new token.
        temperature: Of all rows, or (N, 1).
        vocabulary: Only the first entries may be drawn; None: all.
    """

    uniforms: Tensor
    temperature: float | Tensor
    vocabulary: int | None = None

    def __call__(self, scores: Tensor, rows: Tensor, position: int) -> Tensor:
        allowed = scores[:, : self.vocabulary]
        wide = allowed if allowed.dtype == torch.float64 else allowed.float()
        temperature = torch.as_tensor(self.temperature).to(wide)
        if temperature.dim():
            temperature = temperature[rows]
        cumulative = (wide / temperature).softmax(-1).double().cumsum(-1)
        u = self.uniforms.to(scores.device)[rows, position, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, u, right=True)[:, 0].clamp_max(allowed.shape[-1] - 1)


@dataclass(frozen=True)
class DecodeLoop:
    """For `generate(custom_generate=...)`: ids (N, T) -> ids (N, T + new), padded where a row has ended.

    Attributes:
        choose: Which token a row gets.
        end_ids: (E,), the ids that end a row.
        pad_id: What follows an end.
        cells: K, whose blocks of rows must stay equally long.
    """

    choose_tokens: TokenChooser
    end_ids: Tensor
    pad_id: int
    n_cells: int = 1

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **state: Any,
    ) -> Tensor:
        first, most = input_ids.shape[1], generation_config.max_length
        written = input_ids.new_full((len(input_ids), most), self.pad_id)
        written[:, :first] = input_ids
        ends, ids = self.end_ids.to(input_ids.device), input_ids
        rows = torch.arange(len(ids), device=ids.device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        output = model._prefill(ids, generation_config, state)
        for length in range(first, most):
            if length > first:
                given = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **state)
                output = model(**given, return_dict=True)
            state = model._update_model_kwargs_for_generation(
                output, state, is_encoder_decoder=model.config.is_encoder_decoder
            )
            scores = logits_processor(ids, output.logits[:, -1])
            tokens = self.choose_tokens(scores, rows, length - first).masked_fill(ended, self.pad_id)
            written[rows, length] = tokens
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            ended = ended | torch.isin(tokens, ends)
            # Sharded models compute together until the last rank's last row has ended.
            if not model._has_unfinished_sequences(bool(ended.all()), synced_gpus, device=ids.device):
                return written[:, : length + 1]
            if (
                not synced_gpus
                and (stay := self._select_unfinished_rows(ended)) is not None
                and _can_drop_rows(state)
            ):
                rows, ids, ended = rows[stay], ids[stay], ended[stay]
                _select_state_rows(state, stay)
        return written

    def _select_unfinished_rows(self, ended: Tensor) -> Tensor | None:
        """Rows that go on, with some that ended where other cells have more; None: not worth it yet."""
        by_cell = ended.view(self.n_cells, -1)
        longest, needed = by_cell.shape[1], int((~by_cell).sum(1).max())
        if needed > SHRINK_THRESHOLD * longest:
            return None
        # In their order, those that go on before those that ended.
        order = by_cell.int().argsort(dim=1, stable=True)[:, :needed].sort(dim=1).values
        offsets = torch.arange(self.n_cells, device=ended.device)[:, None] * longest
        return (order + offsets).flatten()


def _can_drop_rows(state: dict[str, Any]) -> bool:
    """Whether a cache can lose rows; recurrent states, say, have other forms."""
    return hasattr(state.get("past_key_values"), "batch_select_indices")


def _select_state_rows(state: dict[str, Any], rows: Tensor) -> None:
    """Only these rows in what the model is given with the next token."""
    state["past_key_values"].batch_select_indices(rows)
    for name in _PER_ROW_INPUTS:
        if state.get(name) is not None:
            state[name] = state[name][rows]
    encoded = state.get("encoder_outputs")
    if encoded is not None:
        state["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[rows])
