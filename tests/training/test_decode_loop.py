"""Rows that have ended leave the batch, and what is written stays what `generate` alone writes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.step_loss import split_blocks
from gkd_lab.models.forward import Sequences
from gkd_lab.models.packing import Pack
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.next_token import SHRINK_THRESHOLD
from gkd_lab.training.sampling import generate_completions

from ..models.families import make
from ..models.tiny import FIRST_WORD, LAST_WORD, PAD, tiny_examples

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "t5")
ENDS = torch.tensor([FIRST_WORD, FIRST_WORD + 1, LAST_WORD])
"""A fifth of the vocabulary, so that rows end here and there."""
ROWS, TOKENS = 12, 16


def prompts(model: PreTrainedModel, count: int = ROWS) -> Sequences:
    return collate_examples(tiny_examples(count), PAD, is_encoder_decoder=model.config.is_encoder_decoder)


def written(model: PreTrainedModel, rows: Sequences, noise: Tensor | None) -> Sequences:
    return generate_completions(model, rows, max_new_tokens=TOKENS, end_ids=ENDS, pad_id=PAD, uniforms=noise)


def rows_read(model: PreTrainedModel) -> list[int]:
    """How many rows each forward pass of the decoder has, filled as they happen."""
    row_counts: list[int] = []
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: row_counts.append(len(args[0] if args else kwargs["input_ids"])),
        with_kwargs=True,
    )
    return row_counts


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_shrinking_batch_equal_rows_decoded_alone(family: str) -> None:
    model = make(family, 0)
    rows = prompts(model)
    noise = draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    alone = [
        written(model, rows.map_tensors(lambda t, n=n: t[n : n + 1]), noise[n : n + 1]) for n in range(ROWS)
    ]  # type: ignore[misc]
    read = rows_read(model)
    together = written(model, rows, noise)
    for n, answer in enumerate(alone):
        length = int(answer.completion_mask.sum())
        assert together.completion_mask[n].sum() == length
        assert torch.equal(together.completion_ids[n, :length], answer.completion_ids[0, :length])
        assert (together.completion_ids[n, length:] == PAD).all()
    assert read[0] == ROWS
    assert read == sorted(read, reverse=True)
    assert read[-1] < ROWS / 2
    lengths = together.completion_mask.sum(1)
    for step, batch in enumerate(read):
        going_on = int((lengths > step).sum())
        assert going_on <= batch
        assert going_on > SHRINK_THRESHOLD * batch


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_search_equals_generate(family: str) -> None:
    model = make(family, 0)
    rows = prompts(model)
    got = written(model, rows, None)
    ids = model.generate(
        rows.prompt_ids,
        attention_mask=rows.prompt_mask,
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=ENDS.tolist(),
        pad_token_id=PAD,
    )[:, 1 if model.config.is_encoder_decoder else rows.prompt_ids.shape[1] :]
    assert torch.equal(got.completion_ids, ids)


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5"))
def test_a_pack_s_cells_keep_equally_many_rows(family: str) -> None:
    members = [make(family, seed) for seed in range(3)]
    rows, noise = prompts(members[0]), draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    pack = Pack.build(members)
    read = rows_read(pack.model)
    together = written(pack.model, rows.repeat_rows(3), noise.repeat(3, 1))
    assert all(batch % 3 == 0 for batch in read)
    assert read[-1] < read[0]
    for answers, member in zip(split_blocks(together, 3), members, strict=True):
        alone = written(member, rows, noise)
        width = alone.completion_ids.shape[1]
        assert torch.equal(answers.completion_ids[:, :width], alone.completion_ids)
        assert answers.completion_mask[:, width:].sum() == 0


def test_a_cache_that_cannot_lose_rows_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", 0)
    rows, noise = prompts(model), draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    expected = written(model, rows, noise)
    monkeypatch.setattr("gkd_lab.training.sampling._can_drop_rows", lambda state: False)
    read = rows_read(model)
    assert torch.equal(written(model, rows, noise).completion_ids, expected.completion_ids)
    assert set(read) == {ROWS}


def test_beam_search_refuses_a_token_chooser() -> None:
    model = make("llama", 0)
    with pytest.raises(ValueError, match="2 beams"):
        generate_completions(
            model,
            prompts(model),
            max_new_tokens=TOKENS,
            end_ids=ENDS,
            pad_id=PAD,
            num_beams=2,
            wrap_chooser=lambda choose: choose,
        )


def test_writing_stops_when_the_last_row_has_ended() -> None:
    model = make("llama", 0)
    rows = prompts(model, 2)
    read = rows_read(model)
    noise = torch.zeros(2, TOKENS, dtype=torch.float64)
    everything = torch.arange(model.config.vocab_size)
    answers = generate_completions(
        model, rows, max_new_tokens=TOKENS, end_ids=everything, pad_id=PAD, uniforms=noise
    )
    assert answers.completion_ids.shape == (2, 1)
    assert len(read) == 1


def make_hybrid(name: str) -> PreTrainedModel:
    """A tiny model with recurrent layers, whose cache cannot lose rows."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"vocab_size": LAST_WORD + 1, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": PAD},
    }
    if name == "qwen3_next":
        linear = {f"linear_{part}": 8 for part in ("key_head_dim", "value_head_dim")}
        heads = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
        experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        config: Any = Qwen3NextConfig(
            **sizes, **linear, **heads, **experts, shared_expert_intermediate_size=8
        )
        return Qwen3NextForCausalLM(config).eval()
    return FalconH1ForCausalLM(
        FalconH1Config(**sizes, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8)
    ).eval()


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_models_with_recurrent_layers_keep_all_rows_and_write_what_they_write_alone(name: str) -> None:
    model = make_hybrid(name)
    rows = prompts(model)
    noise = draw_uniforms(0, 0, "sampling", ROWS, TOKENS)
    together = written(model, rows, noise)
    lengths = together.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    for n in range(ROWS):
        answer = written(model, rows.map_tensors(lambda t, n=n: t[n : n + 1]), noise[n : n + 1])  # type: ignore[misc]
        length = int(answer.completion_mask.sum())
        assert together.completion_mask[n].sum() == length
        assert torch.equal(together.completion_ids[n, :length], answer.completion_ids[0, :length])
