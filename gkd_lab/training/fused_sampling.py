"""Sample and search greedily with a `TokenDecoder`: fixed shapes, and one wait for the device in 8 tokens.

Noise, temperatures, positions and masks are on the device before the first token. A step takes tokens and
returns tokens; nothing of it reaches the host until, every `CHECK_INTERVAL` tokens, the ends of sequence are
looked for and rows that have ended leave. On a GPU the step is recorded as a CUDA graph.
Shapes: K cells, N rows (N/K a cell), n of them still in the batch, P prompt tokens, C new tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd_lab.models.forward import Sequences
from gkd_lab.models.fused_base import DecodeStart, StaticCache, TokenDecoder
from gkd_lab.training.next_token import invert_cumulative, select_unfinished_rows

CHECK_INTERVAL = 8
"""Tokens between two looks for rows that have ended."""
FIRST_SLOTS = 64
"""New tokens that the cache has room for at first; it grows as the texts do."""


@dataclass(frozen=True)
class DecodeState:
    """Inputs of a decode step for the n rows in the batch, on the device.

    rows: (n,), their numbers in the first batch.
    positions: (C, n, 1), of each new token in its row.
    uniforms: (C, n, 1); None: greedy search.
    temperature: (n, 1); None: 1.
    """

    rows: Tensor
    cache: StaticCache
    positions: Tensor
    uniforms: Tensor | None
    temperature: Tensor | None

    def select_rows(self, indices: Tensor) -> "DecodeState":
        """Return the state of the rows with these indices, in a copy."""
        temperature, uniforms = self.temperature, self.uniforms
        return DecodeState(
            self.rows[indices],
            self.cache.select_rows(indices),
            self.positions.index_select(1, indices),
            None if uniforms is None else uniforms.index_select(1, indices),
            None if temperature is None else temperature[indices],
        )

    def choose_tokens(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """Return the tokens (n,) that logits (n, V) and a step's uniforms (n, 1) give."""
        if uniforms is None:
            return logits.argmax(-1)
        temperature = 1.0 if self.temperature is None else self.temperature
        return invert_cumulative(logits, temperature, uniforms)


@torch.no_grad()
def decode_completions(
    decoder: TokenDecoder,
    prompts: Sequences,
    *,
    max_new_tokens: int,
    end_ids: Tensor,
    pad_id: int,
    uniforms: Tensor | None,
    temperature: float | Tensor,
) -> Tensor:
    """Return new tokens, (N, C) or as many as the longest row has; those after a row's end are arbitrary.

    Sampled by `uniforms` (N, C) at `temperature`, one or (N, 1); greedily without `uniforms`.
    """
    with torch.autocast(decoder.device.type, enabled=False):
        start, state = _read_prompts(decoder, prompts, max_new_tokens, uniforms, temperature)
        width = start.width
        output = prompts.prompt_ids.new_full((max_new_tokens, prompts.num_rows), pad_id)
        ends = RowEnds(prompts.num_rows, decoder.cells, end_ids.to(decoder.device))
        step: DecodeStep | None = None
        tokens = output[0]
        for first in range(0, max_new_tokens, CHECK_INTERVAL):
            last = min(first + CHECK_INTERVAL, max_new_tokens)
            if width + last > state.cache.count_slots():
                slots = state.cache.count_slots()
                added = max(min(slots, width + max_new_tokens - slots), CHECK_INTERVAL)
                state, step = replace(state, cache=state.cache.extend(added)), None
            step = step or build_step(decoder, state)
            block = []
            for n in range(first, last):
                noise = None if state.uniforms is None else state.uniforms[n]
                if n == 0:
                    tokens = state.choose_tokens(start.logits, noise)
                else:
                    tokens = step(tokens, state.positions[n - 1], noise, width + n)
                block.append(tokens)
            written = torch.stack(block)
            output[first:last].index_copy_(1, state.rows, written)
            remaining = ends.record_block(written, first)
            if ends.have_all_ended:
                break
            if remaining is not None and last < max_new_tokens:
                indices = torch.tensor(remaining, device=decoder.device)
                state, tokens, step = state.select_rows(indices), tokens[indices], None
    return output[: ends.count_tokens(max_new_tokens)].T.contiguous()


def _read_prompts(
    decoder: TokenDecoder,
    prompts: Sequences,
    max_new_tokens: int,
    uniforms: Tensor | None,
    temperature: float | Tensor,
) -> tuple[DecodeStart, DecodeState]:
    """Return the result of reading the prompts, and the state of all rows on the decoder's device."""
    device = decoder.device
    room = min(max_new_tokens, FIRST_SLOTS)
    start = decoder.read_prompts(prompts.prompt_ids, prompts.prompt_mask, room)
    return start, DecodeState(
        torch.arange(prompts.num_rows, device=device),
        start.cache,
        torch.arange(max_new_tokens, device=device)[:, None, None] + start.positions,
        None if uniforms is None else uniforms.to(device).T.contiguous()[..., None],
        _spread_temperature(temperature, prompts.num_rows, device),
    )


def _spread_temperature(temperature: float | Tensor, n_rows: int, device: torch.device) -> Tensor | None:
    """Return each row's temperature on the device, (N, 1); None if it is 1 for all."""
    if not isinstance(temperature, Tensor) and temperature == 1:
        return None
    return torch.as_tensor(temperature).to(device).expand(n_rows, 1)


class RowEnds:
    """Host's record of which rows have ended and how long they are; one wait for the device a block.

    Args:
        n_rows: Rows of the first batch.
        n_cells: Cells, whose blocks of rows must stay equally long.
        end_ids: Ids that end a row, on the device.
    """

    def __init__(self, n_rows: int, n_cells: int, end_ids: Tensor) -> None:
        self.n_cells, self.end_ids = n_cells, end_ids
        self.has_ended = [False] * n_rows
        """Of each row in the batch."""
        self.longest = 0
        """Tokens of the longest row that has ended."""

    @property
    def have_all_ended(self) -> bool:
        """Whether no row in the batch goes on."""
        return all(self.has_ended)

    def count_tokens(self, written: int) -> int:
        """Return the tokens of the longest row, of `written` ones."""
        return self.longest if self.have_all_ended else written

    def record_block(self, tokens: Tensor, first: int) -> list[int] | None:
        """Record the ends in tokens (block, n) from number `first` on; return the rows to go on with.

        Indices of the batch; None: all rows stay. Otherwise the record forgets the others.
        """
        if not self.end_ids.numel():
            return None
        for n, is_end in enumerate(torch.isin(tokens, self.end_ids).T.tolist()):
            if not self.has_ended[n] and True in is_end:
                self.has_ended[n] = True
                self.longest = max(self.longest, first + is_end.index(True) + 1)
        remaining = None if self.have_all_ended else select_unfinished_rows(self.has_ended, self.n_cells)
        if remaining is not None:
            self.has_ended = [self.has_ended[n] for n in remaining]
        return remaining


# ---- steps ----


class DecodeStep:
    """One token of every row in the batch."""

    def __init__(self, decoder: TokenDecoder, state: DecodeState) -> None:
        self.decoder, self.state = decoder, state

    def __call__(self, tokens: Tensor, positions: Tensor, uniforms: Tensor | None, length: int) -> Tensor:
        """Read tokens (n,) at positions (n, 1) into slot `length` - 1; return the next tokens (n,).

        Chosen by `uniforms` (n, 1), or greedily without.
        """
        return self._run(tokens, positions, uniforms, length)

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        uniforms: Tensor | None,
        length: int,
        slot: Tensor | None = None,
    ) -> Tensor:
        logits = self.decoder.forward(tokens[:, None], positions, self.state.cache, length, slot)
        return self.state.choose_tokens(logits, uniforms)


class GraphedStep(DecodeStep):
    """The same step, recorded once as a CUDA graph: a few launches a token. Not yet tried on a GPU."""

    def __init__(self, decoder: TokenDecoder, state: DecodeState) -> None:
        super().__init__(decoder, state)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.slots = torch.arange(state.cache.count_slots(), device=decoder.device)

    def __call__(self, tokens: Tensor, positions: Tensor, uniforms: Tensor | None, length: int) -> Tensor:
        """Record the step at the first call; replay it with these inputs."""
        noise = [] if uniforms is None else [uniforms]
        inputs = [tokens, positions, self.slots[length - 1 : length], *noise]
        if self.graph is None:
            self.state.cache.close_slots(length - 1)
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = self._record()
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.output.clone()

    def _record(self) -> torch.cuda.CUDAGraph:
        """Run the step once on another stream, as CUDA graphs require, then record it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run_on_all_slots()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.output = self._run_on_all_slots()
        return graph

    def _run_on_all_slots(self) -> Tensor:
        """Run a step of fixed shapes: it attends to the whole cache, whose free slots are masked."""
        tokens, positions, slot, *noise = self.inputs
        cache = self.state.cache
        cache.mask.index_fill_(3, slot, 0.0)
        return self._run(tokens, positions, noise[0] if noise else None, cache.count_slots(), slot)


def build_step(decoder: TokenDecoder, state: DecodeState) -> DecodeStep:
    """Return the step of these rows: a CUDA graph on a GPU, else PyTorch's operators one by one."""
    return (GraphedStep if decoder.device.type == "cuda" else DecodeStep)(decoder, state)
