"""Generate completions: sampling with given noise, greedy search and beam search.

Models built like Llama or T5 sample and search greedily by fused decode steps. All others, beams and
calculators use transformers' `generate`, which prepares prompts, masks and its KV cache; its configuration is
complete, so nothing leaks in from the model's own.
Shapes: K cells of a pack, N rows (N/K a cell), T prompt tokens, C new tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from gkd_lab.config.artifact_specs import LengthPenaltyForm
from gkd_lab.models.forward import Sequences, eval_mode, make_completion_mask, unwrap_model
from gkd_lab.models.fused_check import build_fused_decoder
from gkd_lab.models.packed_layers import count_cells
from gkd_lab.training.fused_sampling import decode_completions
from gkd_lab.training.next_token import (
    InverseCdfSampler,
    TokenChooser,
    choose_most_likely,
    select_unfinished_rows,
)

_PER_ROW_INPUTS = ("attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids")


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
    length_penalty_form: LengthPenaltyForm = "transformers",
    vocabulary_size: int | None = None,
    wrap_chooser: Callable[[TokenChooser], TokenChooser] | None = None,
) -> Sequences:
    """Return the prompts with new completions: sampled by `uniforms` if given, else greedy or beam search.

    `uniforms` are (N, C). At most `max_new_tokens` are sampled at `temperature`, from the first
    `vocabulary_size` entries if given; without `uniforms` the search is greedy or with `num_beams`, whose
    scores are log-probabilities over length^`length_penalty` (`transformers`) or `WuLengthPenalty` (`wu`).
    `wrap_chooser` may replace single tokens, as a calculator does; ValueError if combined with beams.
    The completion's mask ends with the end of sequence; a row without one was cut at the limit.
    """
    if wrap_chooser is not None and num_beams > 1:
        raise ValueError(f"tokens of {num_beams} beams cannot be chosen for them: search greedily or sample")
    decoder = None
    if wrap_chooser is None and num_beams == 1:
        n_positions = prompts.prompt_ids.shape[1] + max_new_tokens
        decoder = build_fused_decoder(model, n_positions, None if uniforms is None else vocabulary_size)
    if decoder is not None:
        ids = decode_completions(
            decoder,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            pad_id=pad_id,
            uniforms=uniforms,
            temperature=temperature,
        )
        return _mask_completions(prompts, ids, end_ids, pad_id)
    config = build_generation_config(
        model,
        end_ids,
        pad_id,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **_build_length_penalty(length_penalty, length_penalty_form),
    )
    choose_tokens: TokenChooser = choose_most_likely
    if uniforms is not None:
        choose_tokens = InverseCdfSampler(uniforms, temperature, vocabulary_size)
    if wrap_chooser is not None:
        choose_tokens = wrap_chooser(choose_tokens)
    loop = DecodeLoop(choose_tokens, end_ids, pad_id, count_cells(model)) if num_beams == 1 else None
    # A mixture of experts would balance its load over the prompt's mask and one token's logits, and fail.
    has_router = getattr(model.config.get_text_config(), "output_router_logits", False)
    router_off = {"output_router_logits": False} if has_router else {}
    with eval_mode(model), override_generation_config(model, config):
        generated_ids = model.generate(
            input_ids=prompts.prompt_ids,
            attention_mask=prompts.prompt_mask,
            generation_config=config,
            custom_generate=loop,
            **router_off,
        )
    skip = 1 if model.config.is_encoder_decoder else prompts.prompt_ids.shape[1]
    return _mask_completions(prompts, generated_ids[:, skip:], end_ids, pad_id)


def _mask_completions(prompts: Sequences, ids: Tensor, end_ids: Tensor, pad_id: int) -> Sequences:
    """Return the prompts with completions (N, C) masked and padded after the first end of sequence."""
    mask = make_completion_mask(ids, end_ids.to(ids.device))
    return prompts.replace_completions(ids.masked_fill(~mask, pad_id), mask.long())


# ---- configuration ----


def build_generation_config(
    model: PreTrainedModel, end_ids: Tensor, pad_id: int, **overrides: Any
) -> GenerationConfig:
    """Build a configuration that states every choice, greedy with a cache by default, then `overrides`."""
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


class WuLengthPenalty(float):
    """Exponent p of a beam search for which `length ** p` is ((5 + length) / 6)^p.

    Wu et al. 2016 (arXiv 1609.08144, Eq. 14). transformers' beam search divides a text's log-probability by
    `length ** length_penalty`, the length in generated tokens with the end of sequence.
    """

    def __rpow__(self, length: float, modulus: None = None) -> float:
        """Return ((5 + length) / 6)^p."""
        return ((5 + length) / 6) ** float(self)


def _build_length_penalty(exponent: float, form: LengthPenaltyForm) -> dict[str, Any]:
    """Return the fields of a GenerationConfig for a length penalty and the rule that ends its search.

    `wu` is the beam search of T5X, which Raffel et al. 2020 use: it ends once no unfinished text could still
    win at the longest length. transformers' default rule assumes that texts grow no longer.
    """
    if form == "transformers":
        return {"length_penalty": exponent}
    return {"length_penalty": WuLengthPenalty(exponent), "early_stopping": "never"}


def _get_forced_first_token(model: PreTrainedModel) -> int | None:
    """Return the id that an encoder-decoder's outputs must begin with (mBART's language); None if any may."""
    if not model.config.is_encoder_decoder:
        return None
    configs = (model.generation_config, model.config)
    token_ids = (getattr(config, "forced_bos_token_id", None) for config in configs)
    return next((token_id for token_id in token_ids if token_id is not None), None)


def build_sampling_config(
    model: PreTrainedModel, end_ids: Tensor, pad_id: int, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Build the configuration of sampling from the full distribution (no top-k, top-p) at `temperature`.

    TRL's trainer shows it as `generation_config`; our own sampling does not use it.
    """
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
    """Return the distinct end-of-sequence ids of generation config, model config and tokenizer, (E,)."""
    ids: list[int | None] = []
    for config in (model.generation_config, model.config, tokenizer):
        end_id = getattr(config, "eos_token_id", None)
        ids += end_id if isinstance(end_id, list) else [end_id]
    return torch.tensor(list(dict.fromkeys(i for i in ids if i is not None)), dtype=torch.long)


@contextmanager
def override_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Set the model's own generation configuration to `config` for the block, then restore it."""
    # An adapter's `generate` puts its configuration into the model that it adapts.
    inner = unwrap_model(model)
    originals = model.generation_config, inner.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config, inner.generation_config = originals


# ---- the loop over tokens ----


@dataclass(frozen=True)
class DecodeLoop:
    """Decoding loop for `generate(custom_generate=...)`, in which finished rows leave the batch.

    Prompts, caches, masks and positions stay those of `generate`, which calls the loop with what it has
    prepared.

    Attributes:
        choose_tokens: Chooses each row's next token.
        end_ids: (E,), the ids that end a row.
        pad_id: Fills a row after its end.
        n_cells: K, whose blocks of rows must stay equally long.
    """

    choose_tokens: TokenChooser
    end_ids: Tensor
    pad_id: int
    n_cells: int = 1

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Callable[[Tensor, Tensor], Tensor],
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **state: Any,
    ) -> Tensor:
        """Extend ids (N, T) to (N, T + new), padded where a row has ended."""
        first, max_length = input_ids.shape[1], generation_config.max_length
        output_ids = input_ids.new_full((len(input_ids), max_length), self.pad_id)
        output_ids[:, :first] = input_ids
        end_ids, ids = self.end_ids.to(input_ids.device), input_ids
        rows = torch.arange(len(ids), device=ids.device)
        is_finished = torch.zeros_like(rows, dtype=torch.bool)
        output = model._prefill(ids, generation_config, state)
        for length in range(first, max_length):
            if length > first:
                inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **state)
                output = model(**inputs, return_dict=True)
            state = model._update_model_kwargs_for_generation(
                output, state, is_encoder_decoder=model.config.is_encoder_decoder
            )
            scores = logits_processor(ids, output.logits[:, -1])
            tokens = self.choose_tokens(scores, rows, length - first).masked_fill(is_finished, self.pad_id)
            output_ids[rows, length] = tokens
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            is_finished = is_finished | torch.isin(tokens, end_ids)
            has_finished = is_finished.tolist()
            # Sharded models compute together until the last rank's last row has ended.
            if not model._has_unfinished_sequences(all(has_finished), synced_gpus, device=ids.device):
                return output_ids[:, : length + 1]
            indices = None if synced_gpus else select_unfinished_rows(has_finished, self.n_cells)
            if indices is not None and _can_drop_rows(state):
                remaining = torch.tensor(indices, device=ids.device)
                rows, ids, is_finished = rows[remaining], ids[remaining], is_finished[remaining]
                _select_state_rows(state, remaining)
        return output_ids


def _can_drop_rows(state: dict[str, Any]) -> bool:
    """Whether the cache can lose rows: each of its layers, of which those with recurrent states cannot."""
    cache = state.get("past_key_values")
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [part for part in parts if part is not None] or [cache]
    layers = [layer for part in caches for layer in getattr(part, "layers", ())]
    return all(hasattr(item, "batch_select_indices") for item in (cache, *layers)) and not any(
        # A layer that is both selects the rows of its attention alone.
        isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers
    )


def _select_state_rows(state: dict[str, Any], rows: Tensor) -> None:
    """Keep only the rows with these indices in the cache, masks and encoder outputs of `state`, in place."""
    state["past_key_values"].batch_select_indices(rows)
    for name in _PER_ROW_INPUTS:
        if state.get(name) is not None:
            state[name] = state[name][rows]
    encoded = state.get("encoder_outputs")
    if encoded is not None:
        state["encoder_outputs"] = type(encoded)(last_hidden_state=encoded.last_hidden_state[rows])
