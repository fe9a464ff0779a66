"""Beam search against a search over all texts of a tiny vocabulary, with both length penalties."""

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import Family, LengthPenaltyForm
from gkd_lab.encoding.batches import Example, collate_examples
from gkd_lab.models.forward import compute_completion_logits, eval_mode
from gkd_lab.training.sampling import WuLengthPenalty, generate_completions

from ..models.tiny import END, FAMILIES, FIRST_WORD, PAD, tiny_examples, tiny_model

WORDS = range(FIRST_WORD, FIRST_WORD + 3)
LONGEST = 4
FORMS: tuple[LengthPenaltyForm, ...] = ("transformers", "wu")


def model_of_few_words(family: Family, seed: int, end_bias: float = 1) -> PreTrainedModel:
    """Return a tiny model in float64 whose other words have no probability that matters."""
    model = tiny_model(family, seed)
    head = model.get_output_embeddings()
    bias = torch.full((head.out_features,), -1e4, dtype=torch.float64)
    bias[[END, *WORDS]] = 0
    bias[END] = end_bias
    head.bias = torch.nn.Parameter(bias)
    return model.requires_grad_(False)


def score_texts(
    model: PreTrainedModel, family: Family, prompt: list[int], texts: list[list[int]]
) -> torch.Tensor:
    """Return the log-probability of each text after the prompt, (texts,), in float64."""
    batch = collate_examples(
        [Example(prompt, text) for text in texts], PAD, is_encoder_decoder=family == "encoder-decoder"
    )
    with torch.no_grad(), eval_mode(model):
        logp = compute_completion_logits(model, batch).log_softmax(-1)
    assert logp.dtype == torch.float64
    token_logp = logp.gather(-1, batch.completion_ids[..., None])[..., 0]
    return (token_logp * batch.completion_mask).sum(-1)


def divisor(length: int, form: LengthPenaltyForm, exponent: float) -> float:
    return length**exponent if form == "transformers" else ((5 + length) / 6) ** exponent


def search(model: PreTrainedModel, family: Family, prompt: list[int], **settings: object) -> list[int]:
    """Return the completion that `generate_completions` finds, without padding."""
    prompts = collate_examples([Example(prompt, [END])], PAD, is_encoder_decoder=family == "encoder-decoder")
    found = generate_completions(
        model,
        prompts,
        end_ids=torch.tensor([END]),
        pad_id=PAD,
        **settings,  # type: ignore[arg-type]
    )
    return found.completion_ids[0][found.completion_mask[0].bool()].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_enough_beams_the_best_of_all_texts_is_found(family: Family) -> None:
    """Texts that end, and those cut at the limit; which one wins depends on the form of the penalty."""
    texts = [[*words, END] for n in range(LONGEST) for words in itertools.product(WORDS, repeat=n)] + [
        list(words) for words in itertools.product(WORDS, repeat=LONGEST)
    ]
    winners: dict[LengthPenaltyForm, list[list[int]]] = {form: [] for form in FORMS}
    for seed, example in enumerate(tiny_examples(6)):
        model = model_of_few_words(family, seed)
        log_probabilities = score_texts(model, family, example.prompt_ids, texts)
        for form in FORMS:
            divisors = torch.tensor([divisor(len(text), form, 2) for text in texts], dtype=torch.float64)
            scores = log_probabilities / divisors
            first, second = scores.topk(2).values.tolist()
            assert first - second > 1e-4, "not a matter of rounding"
            best = texts[int(scores.argmax())]
            found = search(
                model,
                family,
                example.prompt_ids,
                max_new_tokens=LONGEST,
                num_beams=len(texts),
                length_penalty=2,
                length_penalty_form=form,
            )
            assert found == best
            winners[form].append(best)
    assert winners["transformers"] != winners["wu"]
    assert len({len(text) for text in winners["wu"]}) > 1


def search_by_hand(
    model: PreTrainedModel,
    family: Family,
    prompt: list[int],
    form: LengthPenaltyForm,
    *,
    exponent: float,
    beams: int,
    longest: int,
    ends_early: bool,
) -> list[int]:
    """Return the best text of a plain beam search in float64.

    ends_early: Stop once `beams` texts have ended and the best unfinished one scores less than all of them at
    its present length, transformers' rule; else go on to the longest length.
    """
    running: list[list[int]] = [[]]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, longest + 1):
        texts = [[*text, word] for text in running for word in (END, *WORDS)]
        scores = score_texts(model, family, prompt, texts).tolist()
        ranked = sorted(zip(scores, texts, strict=True), reverse=True)[: 2 * beams]
        for score, text in ranked[:beams]:
            if text[-1] == END or length == longest:
                finished.append((score / divisor(length, form, exponent), text))
        finished = sorted(finished, reverse=True)[:beams]
        open_texts = [(score, text) for score, text in ranked if text[-1] != END][:beams]
        running = [text for _, text in open_texts]
        is_full = len(finished) == beams
        if ends_early and is_full and open_texts[0][0] / divisor(length, form, exponent) <= finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_few_beams_find_what_a_plain_search_finds_and_wu_goes_on_while_a_text_could_win(
    family: Family,
) -> None:
    settings = {"exponent": 4, "beams": 2, "longest": 6}
    early_ends_matter = 0
    for seed, example in enumerate(tiny_examples(12)):
        model, prompt = model_of_few_words(family, seed, end_bias=2), example.prompt_ids
        for form in FORMS:
            found = search(
                model,
                family,
                prompt,
                max_new_tokens=6,
                num_beams=2,
                length_penalty=4,
                length_penalty_form=form,
            )
            ends_early = form == "transformers"
            assert found == search_by_hand(model, family, prompt, form, ends_early=ends_early, **settings)
            if form == "wu":
                hasty = search_by_hand(model, family, prompt, form, ends_early=True, **settings)
                early_ends_matter += found != hasty
    assert early_ends_matter


def test_a_length_to_the_power_of_wu_s_penalty_is_the_value_of_their_equation() -> None:
    assert 7 ** WuLengthPenalty(0.6) == pytest.approx(2**0.6)
    assert 1 ** WuLengthPenalty(0.6) == 1
    assert 13 ** WuLengthPenalty(-1.0) == pytest.approx(1 / 3)
    assert WuLengthPenalty(0.6) == 0.6
