"""Text out of a model: sampling with noise that the caller gives, greedy and beam search.

Sampling inverts the cumulative distribution at one uniform number per row and token, so that rows may be
batched, padded and packed in any way and still get the same tokens. `generate` of transformers prepares
prompts, masks and its KV cache; its configuration is complete, so nothing leaks in from the model's own.
Shapes: N rows, C new tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gkd_lab.models.forward import Sequences, eval_mode, make_completion_mask, unwrap_model
from gkd_lab.models.packed_layers import count_cells
from gkd_lab.training.decode_loop import DecodeLoop, InverseCdfSampler, TokenChooser, choose_most_likely


def build_generation_config(
    model: PreTrainedModel, end_ids: Tensor, pad_id: int, **overrides: Any
) -> GenerationConfig:
    """A configuration that states every choice; end of sequence as given."""
    ends = end_ids.tolist()
    return GenerationConfig(
        **{
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "length_penalty": 1.0,
            "early_stopping": False,
            "use_cache": True,
            "pad_token_id": pad_id,
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "decoder_start_token_id": getattr(model.config, "decoder_start_token_id", None),
            "forced_bos_token_id": _get_forced_first_token(model),
            **overrides,
        }
    )


def _get_forced_first_token(model: PreTrainedModel) -> int | None:
    """What an encoder-decoder's every text begins with: mBART's language, BART's `<s>`."""
    named = (getattr(c, "forced_bos_token_id", None) for c in (model.generation_config, model.config))
    return next((i for i in named if i is not None), None) if model.config.is_encoder_decoder else None


def build_sampling_config(
    model: PreTrainedModel, end_ids: Tensor, pad_id: int, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Plain sampling, as TRL's trainer shows it to its users; `write` itself draws from given noise."""
    return build_generation_config(
        model,
        end_ids,
        pad_id,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )


def collect_end_ids(model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """Every id that ends a sequence: those of the model's configurations and the tokenizer's, once each."""
    ids: list[int | None] = []
    for config in (model.generation_config, model.config, tokenizer):
        own = getattr(config, "eos_token_id", None)
        ids += own if isinstance(own, list) else [own]
    return torch.tensor(list(dict.fromkeys(i for i in ids if i is not None)), dtype=torch.long)


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    prompts: Sequences,
    *,
    max_new_tokens: int,
    end_ids: Tensor,
    pad_id: int,
    uniforms: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    vocabulary_size: int | None = None,
    wrap_chooser: Callable[[TokenChooser], TokenChooser] | None = None,
) -> Sequences:
    """The prompts with what the model writes after them, at most `max_new_tokens`.

    With `uniforms` (N, C) it samples at `temperature`, from the first `vocabulary` entries if that is given;
    without it searches, greedily or with `num_beams`.
    `assisted` may choose a token in the place of either, as a calculator does; ValueError for it with beams.
    The completion's mask ends with the end of sequence; a row without one was cut at the limit.
    """
    config = build_generation_config(
        model,
        end_ids,
        pad_id,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    if wrap_chooser is not None and num_beams > 1:
        raise ValueError(f"tokens of {num_beams} beams cannot be chosen for them: search greedily or sample")
    choose: TokenChooser = (
        choose_most_likely if uniforms is None else InverseCdfSampler(uniforms, temperature, vocabulary_size)
    )
    choose = choose if wrap_chooser is None else wrap_chooser(choose)
    loop = DecodeLoop(choose, end_ids, pad_id, count_cells(model)) if num_beams == 1 else None
    # A mixture of experts would balance its load over the prompt's mask and one token's logits, and fail.
    routes = getattr(model.config.get_text_config(), "output_router_logits", False)
    router_off = {"output_router_logits": False} if routes else {}
    with eval_mode(model), override_generation_config(model, config):
        written = model.generate(
            input_ids=prompts.prompt_ids,
            attention_mask=prompts.prompt_mask,
            generation_config=config,
            custom_generate=loop,
            **router_off,
        )
    skip = 1 if model.config.is_encoder_decoder else prompts.prompt_ids.shape[1]
    ids = written[:, skip:]
    mask = make_completion_mask(ids, end_ids.to(ids.device))
    return prompts.replace_completions(ids.masked_fill(~mask, pad_id), mask.long())


@contextmanager
def override_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within it the model's own generation configuration cannot fill what `config` leaves open."""
    # An adapter's `generate` puts its configuration into the model that it adapts.
    inner = unwrap_model(model)
    own = model.generation_config, inner.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config, inner.generation_config = own
