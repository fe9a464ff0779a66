"""Fused decode steps write what transformers' `generate` writes, with one wait for the device in 8 tokens."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.step_loss import split_blocks
from gkd_lab.models.forward import Sequences
from gkd_lab.models.fused_check import build_fused_decoder
from gkd_lab.models.fused_decoder import FusedDecoder
from gkd_lab.models.fused_t5 import FusedT5Decoder
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.fused_sampling import CHECK_INTERVAL, FIRST_SLOTS, GraphedStep, RowEnds
from gkd_lab.training.next_token import SHRINK_THRESHOLD, select_unfinished_rows
from gkd_lab.training.sampling import generate_completions

from ..models.families import make
from ..models.test_fused_decoder import gemma
from ..models.tiny import FIRST_WORD, LAST_WORD, PAD, tiny_examples

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "t5")
ENDS = torch.tensor([FIRST_WORD, LAST_WORD])
ROWS, TOKENS = 12, 30
NO_END = torch.tensor([], dtype=torch.long)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return gemma(seed).to(dtype) if family == "gemma" else make(family, seed, dtype=dtype)


def prompts(count: int = ROWS, family: str = "llama") -> Sequences:
    return collate_examples(tiny_examples(count), PAD, is_encoder_decoder=family == "t5")


def write(model: PreTrainedModel, rows: Sequences, noise: Tensor | None, **more: Any) -> Sequences:
    options = {"max_new_tokens": TOKENS, "end_ids": ENDS, "pad_id": PAD, **more}
    return generate_completions(model, rows, uniforms=noise, **options)


def write_by_generate(
    model: PreTrainedModel, rows: Sequences, noise: Tensor | None, **more: Any
) -> Sequences:
    """A model with a hook has no fused steps."""
    hook = model.register_forward_hook(lambda *_: None)
    try:
        return write(model, rows, noise, **more)
    finally:
        hook.remove()


@contextmanager
def spy_on_steps(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """Yield a list of (rows, tokens of each) of every fused forward pass, filled as they happen.

    Without those of the model's comparison with its fused steps.
    """
    assert build_fused_decoder(model, 1) is not None
    shapes: list[tuple[int, int]] = []
    kind = FusedT5Decoder if model.config.is_encoder_decoder else FusedDecoder
    forward = kind.forward

    def record(decoder: Any, ids: Tensor, *args: Any) -> Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return forward(decoder, ids, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", record)
        yield shapes


def assert_equal(actual: Sequences, expected: Sequences) -> None:
    assert torch.equal(actual.completion_ids, expected.completion_ids)
    assert torch.equal(actual.completion_mask, expected.completion_mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["greedy", "sample"])
def test_the_tokens_are_those_of_generate(family: str, dtype: torch.dtype, way: str) -> None:
    model, rows = build(family, dtype=dtype), prompts(family=family)
    noise = None if way == "greedy" else draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    with spy_on_steps(model) as shapes:
        got = write(model, rows, noise, temperature=0.9)
    assert shapes[0] == (ROWS, 1 if family == "t5" else rows.prompt_ids.shape[1])
    assert {tokens for _, tokens in shapes[1:]} == {1}
    assert_equal(got, write_by_generate(model, rows, noise, temperature=0.9))
    assert way == "greedy" or got.completion_mask.sum(1).unique().numel() > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_fifteen_cells_in_one_pack_write_what_each_writes_alone(family: str) -> None:
    cells = 15
    members = [build(family, seed) for seed in range(cells)]
    pack, rows = Pack.build(members), prompts(4, family)
    noise = draw_uniforms(0, 0, "sampling", 4, TOKENS)
    temperatures = torch.linspace(0.5, 1.5, cells)
    together = write(
        pack.model,
        rows.repeat_rows(cells),
        noise.repeat(cells, 1),
        temperature=temperatures.repeat_interleave(4)[:, None],
    )
    for block, member, temperature in zip(
        split_blocks(together, cells), members, temperatures.tolist(), strict=True
    ):
        alone = write_by_generate(member, rows, noise, temperature=temperature)
        width = alone.completion_ids.shape[1]
        assert torch.equal(block.completion_ids[:, :width], alone.completion_ids)
        assert block.completion_mask[:, width:].sum() == 0


@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_some_cells_of_a_pack_write_alone(family: str) -> None:
    members = [build(family, seed) for seed in range(3)]
    pack, rows = Pack.build(members), prompts(family=family)
    noise = draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    with pack.select_cells([2, 0]) as model, spy_on_steps(model) as shapes:
        got = write(model, rows.repeat_rows(2), noise.repeat(2, 1))
        assert_equal(got, write_by_generate(model, rows.repeat_rows(2), noise.repeat(2, 1)))
    assert shapes[0][0] == 2 * ROWS


@pytest.mark.parametrize("vocabulary", [8, LAST_WORD + 1])
def test_only_the_first_vocabulary_entries_are_sampled(vocabulary: int) -> None:
    model, rows = build("llama"), prompts()
    noise = draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    got = write(model, rows, noise, vocabulary_size=vocabulary)
    assert_equal(got, write_by_generate(model, rows, noise, vocabulary_size=vocabulary))
    assert got.completion_ids.max() == vocabulary - 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_cache_grows_with_the_text(family: str) -> None:
    model, rows, tokens = build(family), prompts(3, family), 2 * FIRST_SLOTS + 11
    noise = draw_uniforms(0, 0, "sampling", 3, tokens)
    got = write(model, rows, noise, max_new_tokens=tokens, end_ids=NO_END)
    assert got.completion_ids.shape == (3, tokens)
    assert_equal(got, write_by_generate(model, rows, noise, max_new_tokens=tokens, end_ids=NO_END))


@pytest.mark.parametrize("tokens", [1, CHECK_INTERVAL - 1, CHECK_INTERVAL, CHECK_INTERVAL + 1])
def test_lengths_around_a_block(tokens: int) -> None:
    model, rows = build("llama"), prompts()
    noise = draw_uniforms(0, 0, "sampling", ROWS, tokens)
    for ends in (ENDS, NO_END, torch.arange(LAST_WORD + 1)):
        got = write(model, rows, noise, max_new_tokens=tokens, end_ids=ends)
        assert_equal(got, write_by_generate(model, rows, noise, max_new_tokens=tokens, end_ids=ends))


# ---- rows that have ended ----


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("cells", [1, 3])
def test_ended_rows_leave_after_each_block(family: str, cells: int) -> None:
    members = [build(family, seed) for seed in range(cells)]
    model = members[0] if cells == 1 else Pack.build(members).model
    rows, noise = (
        prompts(family=family).repeat_rows(cells),
        draw_uniforms(0, 0, "sampling", ROWS, TOKENS).repeat(cells, 1),
    )
    with spy_on_steps(model) as shapes:
        got = write(model, rows, noise)
    counts = [count for count, _ in shapes]
    lengths = got.completion_mask.sum(1).view(cells, ROWS)
    remaining = ROWS
    for first in range(0, len(counts), CHECK_INTERVAL):
        going_on = int((lengths > first).sum(1).max()) if first else ROWS
        remaining = going_on if going_on <= SHRINK_THRESHOLD * remaining else remaining
        assert set(counts[first : first + CHECK_INTERVAL]) <= {remaining * cells}
    assert counts[-1] < ROWS * cells / 2


def test_writing_stops_within_a_block_of_the_last_end() -> None:
    model, rows = build("llama"), prompts(2)
    with spy_on_steps(model) as shapes:
        got = write(model, rows, torch.zeros(2, TOKENS), end_ids=torch.arange(LAST_WORD + 1))
    assert got.completion_ids.shape == (2, 1)
    assert len(shapes) == CHECK_INTERVAL


def test_cells_go_on_with_equally_many_rows_in_their_order() -> None:
    ended = [True, False, True, True, *[True] * 3, False]
    assert select_unfinished_rows(ended, 1) == [1, 7]
    assert select_unfinished_rows(ended, 2) == [1, 7]
    assert select_unfinished_rows([False, True, True, False, *[True] * 4], 2) == [0, 3, 4, 5]
    assert select_unfinished_rows([True, False, False, False], 1) == [1, 2, 3]
    assert select_unfinished_rows([True, False, False, False, False], 1) is None


def test_ends_are_counted_over_blocks_and_rows_that_leave() -> None:
    ends = RowEnds(3, 1, torch.tensor([9]))
    assert ends.record_block(torch.tensor([[9, 1, 1], [1, 1, 9]]), 0) == [1]
    assert (ends.has_ended, ends.longest) == ([False], 2)
    assert ends.record_block(torch.tensor([[1], [9], [9]]), 2) is None
    assert ends.have_all_ended
    assert ends.count_tokens(5) == 4
    without = RowEnds(2, 1, NO_END)
    assert without.record_block(torch.tensor([[9, 9]]), 0) is None
    assert without.count_tokens(1) == 1


# ---- kernels and waits ----


class OperatorCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operator._schema.name.removeprefix("aten::")] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("cells", [1, 3])
def test_the_device_is_waited_for_once_in_eight_tokens(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Pack.build([build("llama", 0)] * cells).model
    rows, noise = prompts().repeat_rows(cells), draw_uniforms(0, 0, "sampling", ROWS * cells, TOKENS)
    write(model, rows, noise)
    waits, to_list = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waits.append(1) or to_list(tensor))
    with OperatorCounter() as counter:
        write(model, rows, noise, end_ids=torch.tensor([LAST_WORD + 5]))
    assert len(waits) == math.ceil(TOKENS / CHECK_INTERVAL)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
    assert [name for name in waiting if counter.counts[name]] == []
    assert counter.counts["bmm"] + counter.counts["mm"] + counter.counts["baddbmm_"] + counter.counts[
        "addmm_"
    ] <= TOKENS * (4 * model.config.num_hidden_layers + 1)


class ReplayedStep(GraphedStep):
    """The step of fixed shapes, run anew instead of replayed, as a CPU has no graphs."""

    def _record(self) -> Any:
        return self

    def replay(self) -> None:
        self.output = self._run_on_all_slots()


@pytest.mark.parametrize("family", ["llama", "qwen3", "t5"])
@pytest.mark.parametrize("cells", [1, 2])
def test_a_step_of_fixed_shapes_masks_what_is_not_written(
    family: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph records: the whole cache, written at a slot that is a tensor."""
    members = [build(family, seed) for seed in range(cells)]
    model, tokens = members[0] if cells == 1 else Pack.build(members).model, FIRST_SLOTS + 20
    rows = prompts(family=family).repeat_rows(cells)
    noise = draw_uniforms(0, 0, "sampling", ROWS, tokens).repeat(cells, 1)
    for module in ("fused_decoder", "fused_t5"):
        monkeypatch.setattr(
            f"gkd_lab.models.{module}.allocate_states",
            lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
        )
    monkeypatch.setattr("gkd_lab.training.fused_sampling.build_step", ReplayedStep)
    for ends in (ENDS, torch.tensor([LAST_WORD])):
        got = write(model, rows, noise, max_new_tokens=tokens, end_ids=ends)
        assert_equal(got, write_by_generate(model, rows, noise, max_new_tokens=tokens, end_ids=ends))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_writes_the_same_tokens() -> None:
    model, rows = build("llama", dtype=torch.float64).to("cuda"), prompts().to("cuda")
    noise = draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    assert_equal(write(model, rows, noise), write_by_generate(model, rows, noise))
