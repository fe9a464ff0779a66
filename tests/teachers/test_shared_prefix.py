"""A teacher that reads prompts once for all who answer them says what it says when it reads all together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gkd_lab.losses.step_loss import MicroBatch, concatenate_blocks
from gkd_lab.models.forward import Sequences
from gkd_lab.models.heads import OutputHead
from gkd_lab.teachers import shared_prefix
from gkd_lab.teachers.shared_prefix import SharedPrefixReader

from ..models.families import FAMILIES
from ..models.tiny import PAD, tiny_model

SEEDS, ROWS, PROMPT, ANSWER = 2, 3, 5, 4


def block(prompts: Sequences, seed: int, length: int) -> Sequences:
    """Answers of different lengths to the prompts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 12, (ROWS, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([[length], [1], [length - 1]])).long()
    return prompts.replace_completions(ids.masked_fill(mask == 0, PAD), mask)


def step(
    *, left: bool, of: tuple[int, ...] = (0, 1, 0, 0, 1), lengths: tuple[int, ...] = (4, 2, 4, 1, 3)
) -> MicroBatch:
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 12, (SEEDS, ROWS, PROMPT), generator=generator)
    real = torch.arange(PROMPT) < torch.tensor([[5], [2], [4]])
    mask = (real.flip(1) if left else real).long().expand(SEEDS, -1, -1)
    none = ids[0, :, :0]
    prompts = [Sequences(i.masked_fill(m == 0, PAD), m, none, none) for i, m in zip(ids, mask, strict=True)]
    rows = concatenate_blocks(
        [block(prompts[p], n, c) for n, (p, c) in enumerate(zip(of, lengths, strict=True))], PAD
    )
    return MicroBatch(rows, rows, tuple(range(len(of))), (True,) * len(of), of)


def calls(model: PreTrainedModel) -> list[int]:
    """Tokens of each call of the model's decoder, from now on."""
    seen: list[int] = []
    body = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    body.register_forward_pre_hook(
        lambda _, args, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prompts_leave_the_hidden_states_of_each_family_unchanged(name: str) -> None:
    model = FAMILIES[name](16).eval()
    batch = step(left=not model.config.is_encoder_decoder)
    head = OutputHead(model)
    read = SharedPrefixReader(head)
    with torch.no_grad():
        expected, output = head.compute_unprojected(batch.teacher), read(batch)
    trained = batch.teacher.completion_mask.bool()
    torch.testing.assert_close(output.hidden[trained], expected.hidden[trained], rtol=1e-4, atol=1e-5)
    assert output.projection.weight is expected.projection.weight


@pytest.mark.parametrize("family", ["decoder-only", "encoder-decoder"])
def test_a_prompt_is_read_once(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, 0).eval()
    read = SharedPrefixReader(OutputHead(model))
    assert read.reuses_prompts
    seen, batch = calls(model), step(left=family == "decoder-only")
    read(batch)
    continued = ROWS * (ANSWER - 1 if family == "decoder-only" else ANSWER)
    is_decoder = family == "decoder-only"
    assert seen == [*[SEEDS * ROWS * PROMPT] * is_decoder, 5 * continued]
    prompts = [ROWS * PROMPT] * is_decoder
    for blocks, by_seed in ((3, ([3], [2])), (1, ([1] * 3, [1] * 2))):
        state_bytes = blocks * ROWS * ANSWER * model.config.get_text_config(decoder=True).hidden_size * 4
        monkeypatch.setattr(shared_prefix, "CPU_STATE_BYTES", state_bytes)
        seen.clear()
        read(batch)
        assert seen == [n for passes in by_seed for n in (*prompts, *(size * continued for size in passes))]


def test_blocks_that_share_no_prompts_are_read_in_one_pass() -> None:
    model = tiny_model("decoder-only", 0).eval()
    seen, batch = calls(model), step(left=True, of=(1, 0), lengths=(4, 4))
    expected = OutputHead(model).compute_unprojected(batch.teacher).hidden
    read = SharedPrefixReader(OutputHead(model))
    seen.clear()
    torch.testing.assert_close(read(batch).hidden, expected)
    assert seen == [2 * ROWS * (PROMPT + ANSWER)]


@pytest.mark.parametrize("of", [(0,), (1,)])
def test_a_single_block_is_read_with_its_prompt(of: tuple[int, ...]) -> None:
    model = tiny_model("decoder-only", 0).eval()
    read = SharedPrefixReader(OutputHead(model))
    seen = calls(model)
    read(step(left=True, of=of, lengths=(4,)))
    assert seen == [ROWS * (PROMPT + 4)]


def test_answers_of_one_token_need_no_second_pass() -> None:
    model = tiny_model("decoder-only", 0).eval()
    head = OutputHead(model)
    batch = step(left=True, of=(0, 0), lengths=(1, 1))
    output = SharedPrefixReader(head)(batch)
    torch.testing.assert_close(output.hidden, head.compute_unprojected(batch.teacher).hidden)


def remembering(model: PreTrainedModel) -> Callable[..., Any]:
    """A forward whose answer depends on more than keys and values: on how often it was called."""
    forward, count = model.model.forward, [0]

    def counted(**named: Any) -> Any:
        count[0] += 1
        output = forward(**named)
        output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * count[0])
        return output

    return counted


def test_a_model_that_cannot_go_on_from_its_prompts_reads_all_together() -> None:
    model = tiny_model("decoder-only", 0).eval()
    model.model.forward = remembering(model)
    assert not SharedPrefixReader(OutputHead(model)).reuses_prompts
