"""Sampling inverts the model's own distribution; only the model, the noise and the temperature decide."""

import math

import pytest
import torch
from torch import Tensor

from gkd_lab.config.artifact_specs import Family
from gkd_lab.encoding.batches import collate_examples
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode, make_completion_mask
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.next_token import InverseCdfSampler
from gkd_lab.training.sampling import collect_end_ids, generate_completions

from ..models.tiny import END, FAMILIES, PAD, tiny_examples, tiny_model, tiny_tokenizer

TOKENS = 7


def prompts(family: Family, count: int = 6) -> Sequences:
    return collate_examples(tiny_examples(count), PAD, is_encoder_decoder=family == "encoder-decoder")


def sampled(model: object, rows: Sequences, noise: Tensor | None, **more: object) -> Sequences:
    return generate_completions(
        model,  # type: ignore[arg-type]
        rows,
        max_new_tokens=TOKENS,
        end_ids=torch.tensor([END]),
        pad_id=PAD,
        uniforms=noise,
        **more,  # type: ignore[arg-type]
    )


def drawn(logits: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """The tokens that `InverseCdfSampler` draws from one row of logits with many uniforms."""
    scores = logits.expand(len(noise), -1)
    return InverseCdfSampler(noise[:, None], temperature)(scores, torch.arange(len(noise)), 0)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_token_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 20_000 * (logits / temperature).softmax(-1)
    noise = draw_uniforms(0, 0, "sampling", 20_000, 1)[:, 0]
    counts = torch.bincount(drawn(logits, noise, temperature), minlength=8)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 24.32  # the 99.9 % point with 7 degrees of freedom


def test_evenly_spread_noise_gives_the_probabilities_up_to_the_grid() -> None:
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    noise = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    share = torch.bincount(drawn(logits, noise), minlength=4) / 100_000
    torch.testing.assert_close(share.double(), logits.softmax(-1), rtol=0, atol=1e-5)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert drawn(logits, edges).tolist() == [1, 1, 3, 3, 3]


def test_each_row_has_its_own_temperature() -> None:
    model, rows = tiny_model("decoder-only", 0), prompts("decoder-only")
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS)
    cold = torch.tensor([1e-6, 1.0] * (rows.num_rows // 2))[:, None]
    mixed = sampled(model, rows, noise, temperature=cold).completion_ids
    greedy = sampled(model, rows, None).completion_ids
    warm = sampled(model, rows, noise).completion_ids
    assert torch.equal(mixed[::2], greedy[::2])
    assert torch.equal(mixed[1::2], warm[1::2])
    assert not torch.equal(greedy, warm)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_follows_from_the_training_forward_s_distribution_and_the_noise(
    family: Family,
) -> None:
    """With the KV cache, left padding and positions of `generate`, as without them."""
    model, rows = tiny_model(family, 0), prompts(family)
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS)
    answers = sampled(model, rows, noise, temperature=0.8)
    with torch.no_grad():
        cumulative = (compute_completion_logits(model, answers) / 0.8).softmax(-1).cumsum(-1)
    width = answers.completion_ids.shape[1]
    again = (cumulative <= noise[:, :width, None]).sum(-1)
    mask = answers.completion_mask.bool()
    assert torch.equal(again[mask], answers.completion_ids[mask])
    assert mask.sum() > rows.num_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_order_and_padding_change_nothing(family: Family) -> None:
    model, rows = tiny_model(family, 0), prompts(family)
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS)
    together = sampled(model, rows, noise)
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    moved = sampled(model, rows.map_tensors(lambda t: t[order]), noise[order])
    assert torch.equal(moved.completion_ids, together.completion_ids[order])
    for n, example in enumerate(tiny_examples(rows.num_rows)):
        row = collate_examples([example], PAD, is_encoder_decoder=family == "encoder-decoder")
        ids = sampled(model, row, noise[n : n + 1]).completion_ids[0]
        assert torch.equal(ids, together.completion_ids[n, : len(ids)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ("greedy", "sample", "beam"))
def test_the_model_s_own_generation_settings_do_not_leak(family: Family, way: str) -> None:
    model, rows = tiny_model(family, 0), prompts(family)
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS) if way == "sample" else None
    beams = 3 if way == "beam" else 1
    expected = sampled(model, rows, noise, num_beams=beams)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = True, 5.0, 1, 0.1
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.min_p = 1.5, 2, 0.5
    settings.forced_eos_token_id, settings.suppress_tokens = END, [4, 5, 6]
    settings.min_new_tokens, settings.max_length, settings.num_beams = TOKENS, 3, 2
    settings.bad_words_ids = [[7], [8]]
    got = sampled(model, rows, noise, num_beams=beams)
    assert torch.equal(got.completion_ids, expected.completion_ids)
    assert model.generation_config is settings


def test_the_model_s_generation_settings_return_after_an_error() -> None:
    model = tiny_model("decoder-only", 0)
    settings = model.generation_config
    rows = prompts("decoder-only")
    with pytest.raises(IndexError):
        sampled(model, rows, torch.zeros(rows.num_rows, 0))
    assert model.generation_config is settings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", (True, False))
def test_dropout_is_off_while_writing_and_as_it_was_afterwards(family: Family, training: bool) -> None:
    model, rows = tiny_model(family, 0, dropout=0.5), prompts(family)
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS)
    expected = sampled(model.eval(), rows, noise)
    model.train(training)
    before = torch.random.get_rng_state()
    assert torch.equal(sampled(model, rows, noise).completion_ids, expected.completion_ids)
    assert model.training == training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluating_restores_the_mode_after_an_error() -> None:
    model = tiny_model("decoder-only", 0).train()
    with pytest.raises(RuntimeError, match="broken on purpose"), eval_mode(model):
        raise RuntimeError("broken on purpose")
    assert model.training


def test_the_mask_ends_with_the_first_end_of_sequence() -> None:
    ids = torch.tensor([[5, 1, 5, 1], [1, 1, 0, 0], [5, 5, 5, 5], [5, 9, 1, 0]])
    assert make_completion_mask(ids, torch.tensor([1, 9])).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
        [True, True, False, False],
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_end_of_sequence_is_padding(family: Family) -> None:
    model, rows = tiny_model(family, 0), prompts(family, 30)
    answers = sampled(model, rows, draw_uniforms(0, 0, "sampling", 30, TOKENS))
    lengths = answers.completion_mask.sum(-1)
    assert lengths.min() >= 1
    assert lengths.min() < lengths.max()
    for ids, mask, length in zip(answers.completion_ids, answers.completion_mask, lengths, strict=True):
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert (ids[: length - 1] != END).all()
        assert (ids[length:] == PAD).all()
        assert length == len(ids) or ids[length - 1] == END


def test_ends_are_merged_from_tokenizer_and_configurations() -> None:
    model, tokenizer = tiny_model("decoder-only", 0), tiny_tokenizer()
    assert collect_end_ids(model, tokenizer).tolist() == [END]
    model.generation_config.eos_token_id = [END, 7]
    model.config.eos_token_id = 9
    assert collect_end_ids(model, tokenizer).tolist() == [END, 7, 9]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert collect_end_ids(model, tokenizer).tolist() == [END]
