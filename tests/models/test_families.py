"""Compute logits, sample and save with every model family, with padding and another width."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5ForConditionalGeneration

from gkd_lab.encoding.batches import collate_examples
from gkd_lab.losses.divergence import generalized_jsd
from gkd_lab.models.build import load_model
from gkd_lab.models.forward import Sequences, compute_completion_logits, compute_position_ids, shift_right
from gkd_lab.models.heads import mark_untied_head
from gkd_lab.models.rng import draw_uniforms
from gkd_lab.training.sampling import generate_completions

from .families import DECODERS, FAMILIES, make
from .tiny import END, PAD, tiny_examples

TOKENS = 6

each_family = pytest.mark.parametrize("name", FAMILIES)
each_decoder = pytest.mark.parametrize("name", DECODERS)


def batch(model: PreTrainedModel, rows: int = 6) -> Sequences:
    """Prompts of 2 to 6 tokens and completions of 2 to 6."""
    return collate_examples(tiny_examples(rows), PAD, is_encoder_decoder=model.config.is_encoder_decoder)


def add_padding(rows: Sequences, prompt: tuple[int, int], completion: tuple[int, int] = (0, 0)) -> Sequences:
    """Add positions of padding, (left, right)."""
    return Sequences(
        nn.functional.pad(rows.prompt_ids, prompt, value=PAD),
        nn.functional.pad(rows.prompt_mask, prompt, value=0),
        nn.functional.pad(rows.completion_ids, completion, value=PAD),
        nn.functional.pad(rows.completion_mask, completion, value=0),
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare up to rounding; norms are in float32 whatever the model's dtype."""
    tolerance = 2e-5 if expected.dtype == torch.float32 else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def compute_row_by_row(model: PreTrainedModel, rows: Sequences) -> Tensor:
    """Return the trained tokens' logits by one forward pass per row, without padding or our arguments."""
    logits = []
    for n in range(rows.num_rows):
        prompt = rows.prompt_ids[n, rows.prompt_mask[n].bool()][None]
        completion = rows.completion_ids[n, rows.completion_mask[n].bool()][None]
        if model.config.is_encoder_decoder:
            start = shift_right(model.config, completion)
            logits.append(model(input_ids=prompt, decoder_input_ids=start).logits[0])
        else:
            ids = torch.cat([prompt, completion], dim=1)
            logits.append(model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1])
    return torch.cat(logits)


def generate(
    model: PreTrainedModel, rows: Sequences, noise: Tensor | None = None, temperature: float = 1.0
) -> Sequences:
    return generate_completions(
        model,
        rows,
        max_new_tokens=TOKENS,
        end_ids=torch.tensor([END]),
        pad_id=PAD,
        uniforms=noise,
        temperature=temperature,
    )


@each_family
@torch.no_grad()
def test_completion_logits_equal_those_of_a_forward_pass_per_row(name: str) -> None:
    model = make(name, 0)
    rows = batch(model)
    assert_close(
        compute_completion_logits(model, rows)[rows.completion_mask.bool()], compute_row_by_row(model, rows)
    )


@each_family
@torch.no_grad()
def test_the_next_token_depends_on_the_whole_prompt(name: str) -> None:
    """Check that the other tests can fail."""
    model = make(name, 0)
    rows = batch(model)
    first = rows.prompt_mask.argmax(1, keepdim=True)
    other = rows.prompt_ids.scatter(1, first, rows.prompt_ids.gather(1, first) % 11 + 3)
    moved = compute_completion_logits(model, replace(rows, prompt_ids=other)) - compute_completion_logits(
        model, rows
    )
    assert (moved.abs().amax(-1) > 1e-3)[rows.completion_mask.bool()].all()


@each_family
@torch.no_grad()
def test_the_amount_of_padding_changes_nothing(name: str) -> None:
    model = make(name, 0)
    rows = batch(model)
    expected, mask = compute_completion_logits(model, rows), rows.completion_mask.bool()
    prompt = (0, 3) if model.config.is_encoder_decoder else (3, 0)
    for wide in (
        add_padding(rows, prompt),
        add_padding(rows, (0, 0), (0, 4)),
        add_padding(rows, prompt, (0, 4)),
    ):
        assert_close(compute_completion_logits(model, wide)[:, : mask.shape[1]][mask], expected[mask])


@each_decoder
@torch.no_grad()
def test_only_the_completion_s_positions_are_projected(name: str) -> None:
    model = make(name, 0)
    rows, read = batch(model), []
    model.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    compute_completion_logits(model, rows)
    assert read == [rows.completion_ids.shape[1] + 1]


@torch.no_grad()
def test_pitfall_15_absolute_positions_start_at_the_first_token_whatever_the_padding() -> None:
    """GPT-2 without `position_ids` counts the padding on the left, which `generate` does not."""
    model = make("gpt2", 0)
    rows = batch(model)
    wide, mask = add_padding(rows, (5, 0)), rows.completion_mask.bool()
    assert_close(compute_completion_logits(model, wide)[mask], compute_completion_logits(model, rows)[mask])
    ids = torch.cat([wide.prompt_ids, wide.completion_ids], dim=1)
    attention = torch.cat([wide.prompt_mask, wide.completion_mask], dim=1)
    length = wide.completion_ids.shape[1]
    naive = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    assert (naive - compute_completion_logits(model, rows)).abs()[mask].max() > 1
    right = model(
        input_ids=ids, attention_mask=attention, position_ids=compute_position_ids(attention)
    ).logits
    assert_close(right[:, -length - 1 : -1][mask], compute_completion_logits(model, rows)[mask])


@each_family
@torch.no_grad()
def test_greedy_search_generates_the_likeliest_tokens_of_the_training_forward(name: str) -> None:
    model = make(name, 0)
    answers = generate(
        model, add_padding(batch(model), (0, 2) if model.config.is_encoder_decoder else (2, 0))
    )
    best, mask = compute_completion_logits(model, answers).argmax(-1), answers.completion_mask.bool()
    assert torch.equal(best[mask], answers.completion_ids[mask])
    assert mask.sum() > 2 * answers.num_rows


@each_family
@torch.no_grad()
def test_sampling_draws_from_the_training_forward_s_distributions(name: str) -> None:
    model = make(name, 0)
    rows = batch(model)
    noise = draw_uniforms(0, 0, "sampling", rows.num_rows, TOKENS)
    answers = generate(model, rows, noise, temperature=0.8)
    cumulative = (compute_completion_logits(model, answers) / 0.8).double().softmax(-1).cumsum(-1)
    expected = (cumulative <= noise[:, : cumulative.shape[1], None]).sum(-1)
    mask = answers.completion_mask.bool()
    assert torch.equal(expected[mask], answers.completion_ids[mask])
    assert mask.sum() > 2 * answers.num_rows


@each_family
@torch.no_grad()
def test_a_saved_model_loads_with_equal_weights_and_logits(name: str, tmp_path: Path) -> None:
    model = make(name, 0)
    rows = batch(model)
    model.save_pretrained(tmp_path)
    family = "encoder-decoder" if model.config.is_encoder_decoder else "decoder-only"
    precision = "fp32" if model.dtype == torch.float32 else "fp64"
    loaded = load_model(tmp_path, family, precision).eval()
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    if name == "gemma2":
        loaded.set_attn_implementation("eager")
    # Weights read from a file lie elsewhere in memory, and products are rounded accordingly.
    assert_close(compute_completion_logits(loaded, rows), compute_completion_logits(model, rows))


@torch.no_grad()
def test_an_untied_t5_keeps_its_head_and_unscaled_output_when_saved(tmp_path: Path) -> None:
    model = make("t5", 0)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "encoder-decoder", "fp64")
    assert isinstance(loaded, T5ForConditionalGeneration)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is not loaded.shared.weight
    assert not torch.equal(loaded.lm_head.weight, loaded.shared.weight)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert not loaded.config.scale_decoder_outputs


def test_an_untied_head_is_not_tied_again() -> None:
    """transformers would tie it in `tie_weights`, which `resize_token_embeddings` and FSDP call."""
    model = make("t5", 0)
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = True
    mark_untied_head(model)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, head)
    assert model.encoder.embed_tokens.weight is model.shared.weight
    tied = make("qwen2", 0)
    mark_untied_head(tied)
    assert tied.config.tie_word_embeddings


@each_family
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_wider_teacher_gives_every_weight_of_the_student_a_gradient(name: str, beta: float) -> None:
    student, teacher = make(name, 0), make(name, 1, width=32)
    rows = batch(student)
    mask = rows.completion_mask.bool()
    with torch.no_grad():
        target = compute_completion_logits(teacher, rows)[mask]
    loss = generalized_jsd(compute_completion_logits(student, rows)[mask], target, beta).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_a_model_without_a_decoder_start_token_is_refused() -> None:
    model = make("mbart", 0)
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"MBartConfig\.decoder_start_token_id"):
        compute_completion_logits(model, batch(model))
