"""Teacher forward pass of a micro-batch: each distinct sequence is read once, and a shared prompt once.

Cells of one seed answer the same prompts, so the teacher computes the keys and values of a prompt (for an
encoder-decoder: the encoder's output) once for all their completions. Completions are read a few blocks at a
time, so that the states between layers stay in a CPU's cache.

Shapes: M blocks of B rows, R rows of prompts, P prompt tokens, C completion tokens, H hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gkd_lab.losses.step_loss import MicroBatch, split_blocks
from gkd_lab.models.forward import Sequences, TokenCounts, compute_position_ids, shift_right
from gkd_lab.models.heads import OutputHead, UnprojectedOutput
from gkd_lab.models.padding import declare_counts, declare_mask

CPU_STATE_BYTES = 2**20
"""Size of one layer's hidden states that a CPU reads at once; a GPU reads all blocks of all seeds."""


class SharedPrefixReader:
    """Computes a teacher's hidden states for the blocks of a micro-batch.

    Whether prompts can be reused is tried once, on a few tokens: a model whose state is more than the keys
    and values of full attention reads prompt and completion together, as does one whose head is not linear.
    """

    def __init__(self, head: OutputHead) -> None:
        self.head = head
        self.is_encoder_decoder = bool(head.model.config.is_encoder_decoder)
        self.reuses_prompts = self._is_reuse_exact()

    def __call__(self, batch: MicroBatch) -> UnprojectedOutput:
        """Return hidden states, (M*B, C, H), and the head."""
        if not self.reuses_prompts or len(batch.prompts_of_block) == 1:
            return self._read_whole_rows(batch)
        blocks = split_blocks(batch.teacher, len(batch.prompts_of_block))
        blocks_of_seed: dict[int, list[int]] = {}
        for number, seed in enumerate(batch.prompts_of_block):
            blocks_of_seed.setdefault(seed, []).append(number)
        size = self._count_blocks_per_pass(blocks[0].completion_ids.numel())
        if size >= len(blocks) == len(blocks_of_seed):  # No two blocks share their prompts.
            return self._read_whole_rows(batch)
        seeds_at_once = max(1, size // max(map(len, blocks_of_seed.values())))
        hidden: dict[int, Tensor] = {}
        groups = list(blocks_of_seed.values())
        for first in range(0, len(groups), seeds_at_once):
            group = groups[first : first + seeds_at_once]
            numbered = [[(n, blocks[n]) for n in numbers] for numbers in group]
            hidden.update(self._read_blocks(numbered, size, batch.teacher.token_counts))
        states = torch.cat([hidden[n] for n in range(len(blocks))])
        return UnprojectedOutput(states, self.head.read_projection(), None)

    def _read_whole_rows(self, batch: MicroBatch) -> UnprojectedOutput:
        """Return hidden states and head of all rows, prompt and completion together."""
        with declare_counts(self.head.model, batch.teacher, batch.teacher.token_counts):
            return self.head.compute_unprojected(batch.teacher)

    def _read_blocks(
        self,
        blocks_of_seeds: Sequence[Sequence[tuple[int, Sequences]]],
        size: int,
        counts: TokenCounts,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, hidden states (B, C, H)) of numbered blocks, whose prompts are the same in a seed.

        The prompts of all seeds are read at once, then their completions, `size` blocks at a time.
        counts: of all blocks' rows.
        """
        firsts = [blocks[0][1] for blocks in blocks_of_seeds]
        prompt_ids = torch.cat([block.prompt_ids for block in firsts])
        prompt_mask = torch.cat([block.prompt_mask for block in firsts])
        is_encoder_decoder = self.is_encoder_decoder
        read_prompts = self._encode_prompts if is_encoder_decoder else self._cache_prompts
        read_blocks = self._decode_completions if is_encoder_decoder else self._read_from_cache
        rows = len(firsts[0].prompt_ids)

        def declare_prompts(numbers: Sequence[int]) -> AbstractContextManager[None]:
            """Return the context of a model that reads the mask of these blocks' prompts."""
            tokens = [n for number in numbers for n in counts.prompts[number * rows : (number + 1) * rows]]
            return declare_mask((len(tokens), prompt_mask.shape[1]), tokens)

        with declare_prompts([blocks[0][0] for blocks in blocks_of_seeds]):
            prompts = read_prompts(prompt_ids, prompt_mask)
        row_numbers = torch.arange(len(prompt_ids), device=prompt_ids.device).split(rows)
        numbered = [
            (number, block, row_numbers[seed])
            for seed, blocks in enumerate(blocks_of_seeds)
            for number, block in blocks
        ]
        for first in range(0, len(numbered), size):
            numbers, blocks, places = zip(*numbered[first : first + size], strict=True)
            # Not where a decoder's own mask of the completions would look like that of the prompts. (A
            # decoder-only model reads a longer mask, and looks at none of it.)
            is_distinct = blocks[0].completion_ids.shape[1] != prompt_mask.shape[1]
            with declare_prompts(numbers) if is_distinct else nullcontext():
                states = read_blocks(blocks, torch.cat(places), *prompts)
            yield from zip(numbers, states.split(rows), strict=True)

    def _count_blocks_per_pass(self, tokens: int) -> int:
        """Return how many blocks of `tokens` tokens to read at once: what fits a CPU's cache; a GPU all."""
        config = self.head.model.config.get_text_config(decoder=True)
        if self.head.model.device.type != "cpu":
            return 2**31
        return max(1, CPU_STATE_BYTES // (tokens * config.hidden_size * 4))

    # ---- decoder-only ----

    def _cache_prompts(self, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """Read prompts, (R, P); return the cache of keys and values, and the last hidden state, (R, 1, H)."""
        cache = DynamicCache(config=self.head.model.config.get_text_config(decoder=True))
        hidden = self.head.compute_hidden(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._build_position_arguments(compute_position_ids(mask)),
        )
        return cache, hidden[:, -1:]

    def _read_from_cache(
        self, blocks: Sequence[Sequences], places: Tensor, prompt_cache: DynamicCache, last: Tensor
    ) -> Tensor:
        """Return hidden states of the blocks' completions, (blocks * B, C, H), after prompts in a cache.

        places: the row of the cache of each completion's prompt, (blocks * B). last: the prompts' last state,
        which predicts the first completion token. The cache is copied, not changed.
        """
        width = blocks[0].prompt_ids.shape[1]
        if blocks[0].completion_ids.shape[1] == 1:
            return last[places]
        cache = DynamicCache(config=self.head.model.config.get_text_config(decoder=True))
        for number, layer in enumerate(prompt_cache.layers):
            cache.update(layer.keys[places], layer.values[places], number)
        mask = torch.cat([block.joined_mask[:, :-1] for block in blocks])
        hidden = self.head.compute_hidden(
            input_ids=torch.cat([block.completion_ids[:, :-1] for block in blocks]),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._build_position_arguments(compute_position_ids(mask)[:, width:]),
        )
        return torch.cat([last[places], hidden], dim=1)

    def _build_position_arguments(self, positions: Tensor) -> dict[str, Tensor]:
        """Return `position_ids` as a keyword argument, or none if the model's forward does not take it."""
        return {"position_ids": positions} if self.head.accepts_argument("position_ids") else {}

    # ---- encoder-decoder ----

    def _encode_prompts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the encoder's output for prompts, (R, P, H), and their mask, (R, P)."""
        encoder = self.head.model.get_encoder()
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def _decode_completions(
        self, blocks: Sequence[Sequences], places: Tensor, states: Tensor, mask: Tensor
    ) -> Tensor:
        """Return decoder states of the blocks' completions, (blocks * B, C, H), for encoded prompts.

        places: the row of the encoded prompts of each completion, (blocks * B).
        """
        ids = torch.cat([block.completion_ids for block in blocks])
        return self.head.compute_hidden(
            encoder_outputs=(states[places],),
            attention_mask=mask[places],
            decoder_input_ids=shift_right(self.head.model.config, ids),
            use_cache=False,
        )

    # ---- check ----

    def _is_reuse_exact(self) -> bool:
        """Run the model on a tiny batch; return whether reading prompts once gives the same hidden states.

        Up to rounding. False without a try for models that cannot reuse prompts.
        """
        model = self.head.model
        if (
            not self.head.is_linear
            or self.head.has_unavailable_weights()
            or self.head.outputs_router_logits()
        ):
            return False
        if not self.is_encoder_decoder and not _has_full_attention_cache(model):
            return False
        embeddings = model.get_input_embeddings()
        ids = torch.arange(28, device=embeddings.weight.device).view(4, 7) % embeddings.num_embeddings
        mask = torch.ones_like(ids)
        mask[1::2, 0 if not self.is_encoder_decoder else 2] = 0
        prompts = ids[:2, :3].repeat(2, 1)
        rows = Sequences(prompts, mask[:, :3], ids[:, 3:], mask[:, 3:])
        batch = MicroBatch(rows, rows, (0, 1), (True, True), (0, 0))
        with torch.no_grad():
            expected = self.head.compute_unprojected(rows).hidden
            try:
                self.reuses_prompts = True
                shared = self(batch).hidden
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return False
        gap = (shared - expected).abs().max() / expected.abs().max()
        return bool(gap <= torch.finfo(expected.dtype).eps ** 0.5)


def _has_full_attention_cache(model: Any) -> bool:
    """Whether every layer caches the keys and values of all tokens: no sliding window, no recurrent state."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)
