"""The teacher reads what the cells train on: each distinct sequence once, and a prompt that they share once.

Cells of one seed answer the same prompts, so the teacher keeps its keys and values of a prompt (of an
encoder-decoder: the encoder's output) for all their answers. Answers are read a few blocks at a time, so
that what passes between layers stays in a CPU's cache.

Shapes: M blocks of B rows, P prompt tokens, C completion tokens, H hidden width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gkd_lab.losses.step_loss import MicroBatch, split_blocks
from gkd_lab.models.forward import Sequences, compute_position_ids, shift_right
from gkd_lab.models.heads import OutputHead, UnprojectedOutput

CPU_STATE_BYTES = 2**20
"""Size of one layer's hidden states that a CPU reads at once; a GPU reads all blocks of a seed."""


class SharedPrefixReader:
    """Hidden states of the teacher for the blocks of a step.

    Whether it may keep prompts is tried once, on a few tokens: a model whose state is more than the keys and
    values of full attention reads prompt and answer together, as does one whose head is not linear.
    """

    def __init__(self, head: OutputHead) -> None:
        self.head = head
        self.is_encoder_decoder = bool(head.model.config.is_encoder_decoder)
        self.reuses_prompts = self._is_reuse_exact()

    def __call__(self, batch: MicroBatch) -> UnprojectedOutput:
        """Hidden states, (M*B, C, H), and the head."""
        if not self.reuses_prompts or len(batch.prompts_of_block) == 1:
            return self.head.compute_unprojected(batch.teacher)
        parts = split_blocks(batch.teacher, len(batch.prompts_of_block))
        hidden: dict[int, Tensor] = {}
        for prompts in dict.fromkeys(batch.prompts_of_block):
            own = [n for n, of in enumerate(batch.prompts_of_block) if of == prompts]
            hidden.update(zip(own, self._read_completions([parts[n] for n in own]), strict=True))
        states = torch.cat([hidden[n] for n in range(len(parts))])
        return UnprojectedOutput(states, self.head.read_projection(), None)

    def _read_completions(self, parts: Sequence[Sequences]) -> Iterator[Tensor]:
        """Hidden states of blocks that have the same prompts, (B, C, H) each."""
        rows, length = parts[0].completion_ids.shape
        prompt = self._encode_prompts(parts[0]) if self.is_encoder_decoder else self._cache_prompts(parts[0])
        size = self._count_blocks_per_pass(rows * length)
        for first in range(0, len(parts), size):
            some = parts[first : first + size]
            read = self._decode_completions if self.is_encoder_decoder else self._read_from_cache
            yield from read(some, *prompt).split(rows)

    def _count_blocks_per_pass(self, tokens: int) -> int:
        config = self.head.model.config.get_text_config(decoder=True)
        if self.head.model.device.type != "cpu":
            return 2**31
        return max(1, CPU_STATE_BYTES // (tokens * config.hidden_size * 4))

    # ---- a decoder ----

    def _cache_prompts(self, part: Sequences) -> tuple[DynamicCache, Tensor]:
        """Keys and values of the prompts, and the last state, which predicts an answer's first token."""
        cache = DynamicCache(config=self.head.model.config.get_text_config(decoder=True))
        hidden = self.head.compute_hidden(
            input_ids=part.prompt_ids,
            attention_mask=part.prompt_mask,
            past_key_values=cache,
            use_cache=True,
            **self._build_position_arguments(compute_position_ids(part.prompt_mask)),
        )
        return cache, hidden[:, -1:]

    def _read_from_cache(self, parts: Sequence[Sequences], kept: DynamicCache, first: Tensor) -> Tensor:
        times, width = len(parts), parts[0].prompt_ids.shape[1]
        if parts[0].completion_ids.shape[1] == 1:
            return first.repeat(times, 1, 1)
        cache = DynamicCache(config=self.head.model.config.get_text_config(decoder=True))
        for number, layer in enumerate(kept.layers):
            keys, values = (states.repeat(times, 1, 1, 1) for states in (layer.keys, layer.values))
            cache.update(keys, values, number)
        mask = torch.cat([torch.cat([part.prompt_mask, part.completion_mask], 1)[:, :-1] for part in parts])
        hidden = self.head.compute_hidden(
            input_ids=torch.cat([part.completion_ids[:, :-1] for part in parts]),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._build_position_arguments(compute_position_ids(mask)[:, width:]),
        )
        return torch.cat([first.repeat(times, 1, 1), hidden], dim=1)

    def _build_position_arguments(self, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions} if self.head.accepts_argument("position_ids") else {}

    # ---- an encoder-decoder ----

    def _encode_prompts(self, part: Sequences) -> tuple[Tensor, Tensor]:
        encoder = self.head.model.get_encoder()
        states = encoder(input_ids=part.prompt_ids, attention_mask=part.prompt_mask).last_hidden_state
        return states, part.prompt_mask

    def _decode_completions(self, parts: Sequence[Sequences], states: Tensor, mask: Tensor) -> Tensor:
        ids = torch.cat([part.completion_ids for part in parts])
        return self.head.compute_hidden(
            encoder_outputs=(states.repeat(len(parts), 1, 1),),
            attention_mask=mask.repeat(len(parts), 1),
            decoder_input_ids=shift_right(self.head.model.config, ids),
            use_cache=False,
        )

    # ---- may it? ----

    def _is_reuse_exact(self) -> bool:
        """On two answers to two prompts of different lengths."""
        model = self.head.model
        if (
            not self.head.is_linear
            or self.head.has_unavailable_weights()
            or self.head.outputs_router_logits()
        ):
            return False
        if not self.is_encoder_decoder and not _has_full_attention_cache(model):
            return False
        device = model.get_input_embeddings().weight.device
        ids = torch.arange(28, device=device).view(4, 7) % model.get_input_embeddings().num_embeddings
        mask = torch.ones_like(ids)
        mask[1::2, 0 if not self.is_encoder_decoder else 2] = 0
        prompts = ids[:2, :3].repeat(2, 1)
        rows = Sequences(prompts, mask[:, :3], ids[:, 3:], mask[:, 3:])
        batch = MicroBatch(rows, rows, (0, 1), (True, True), (0, 0))
        with torch.no_grad():
            whole = self.head.compute_unprojected(rows).hidden
            try:
                self.reuses_prompts = True
                shared = self(batch).hidden
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return False
        gap = (shared - whole).abs().max() / whole.abs().max()
        return bool(gap <= torch.finfo(whole.dtype).eps ** 0.5)


def _has_full_attention_cache(model: Any) -> bool:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
