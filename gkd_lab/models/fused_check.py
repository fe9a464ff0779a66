"""Build a model's fused decoder if its logits equal those of the model's own forward pass.

The comparison runs once for each model, on a few random tokens, always in float32 or float64: rounding in
half precision would hide a difference in structure. A model that differs samples with transformers'
`generate`.
"""

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.models.decoder_parts import CannotFuse, DecoderParts, find_decoder_parts
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode
from gkd_lab.models.fused_base import TokenDecoder
from gkd_lab.models.fused_decoder import FusedDecoder
from gkd_lab.models.fused_t5 import FusedT5Decoder, T5Parts, find_t5_parts
from gkd_lab.models.heads import compute_relative_error
from gkd_lab.models.pack_check import get_tolerance, make_random_batch
from gkd_lab.models.packed_layers import PackedModule, count_cells
from gkd_lab.models.projection import get_product_dtype

logger = logging.getLogger(__name__)

NORM_OFFSETS = (0, 1)
"""Norms scale by their weight, or by 1 + weight as Gemma's do."""


@dataclass(frozen=True)
class FusedVerdict:
    """Result of comparing a model with its fused decoder: the norms' offset, or why it cannot be used."""

    norm_offset: int = 0
    reason: str | None = None


_verdicts: WeakKeyDictionary[PreTrainedModel, FusedVerdict] = WeakKeyDictionary()
_logged_reasons: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def build_fused_decoder(
    model: PreTrainedModel, n_positions: int, vocabulary: int | None = None
) -> TokenDecoder | None:
    """Return a decoder with the model's present weights; None if it must sample with `generate`.

    Compares the model with its decoder at the first call. The reason for None is logged once.
    """
    try:
        parts = find_parts(model, n_positions)
    except CannotFuse as error:
        _log_reason(model, logging.INFO, str(error))
        return None
    verdict = _verdicts.get(model)
    if verdict is None:
        verdict = _verdicts[model] = check_fused_decoder(model)
    if verdict.reason is not None:
        _log_reason(model, logging.WARNING, verdict.reason)
        return None
    if not _has_room(model):
        return None
    dtype = get_product_dtype(model.device, model.dtype)
    return _create_decoder(parts, dtype, verdict.norm_offset, n_positions, vocabulary=vocabulary)


def find_parts(model: PreTrainedModel, n_positions: int) -> DecoderParts | T5Parts:
    """Return the modules of a Llama-like decoder or a T5; CannotFuse with the reason for any other model."""
    try:
        if model.config.is_encoder_decoder:
            return find_t5_parts(model)
        return find_decoder_parts(model, n_positions)
    except AttributeError as error:  # of a module or configuration that another family names differently
        raise CannotFuse(f"it is built differently: {error}") from error


def _create_decoder(
    parts: DecoderParts | T5Parts,
    dtype: torch.dtype,
    norm_offset: int,
    n_positions: int,
    *,
    vocabulary: int | None = None,
) -> TokenDecoder:
    """Return a decoder with the present weights of a model's modules, of the class for them."""
    options: dict[str, Any] = {
        "norm_offset": norm_offset,
        "n_positions": n_positions,
        "vocabulary": vocabulary,
    }
    if isinstance(parts, T5Parts):
        return FusedT5Decoder(parts, dtype, **options)
    return FusedDecoder(parts, dtype, **options)


def check_fused_decoder(model: PreTrainedModel) -> FusedVerdict:
    """Compare a model's logits and likeliest tokens on random tokens with those of its fused decoder."""
    device = model.device.type
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), eval_mode(model):
            reference = _get_wide_model(model)
            batch = make_random_batch(reference, count_cells(reference))
            expected = compute_completion_logits(reference, batch)
            n_positions = batch.prompt_ids.shape[1] + batch.completion_ids.shape[1]
            parts = find_parts(reference, n_positions)
            errors = {
                offset: _compare_logits(
                    _create_decoder(parts, expected.dtype, offset, n_positions), batch, expected
                )
                for offset in NORM_OFFSETS
            }
    except torch.OutOfMemoryError:
        return FusedVerdict(reason="too little memory to compare its fused decode step")
    except (AttributeError, CannotFuse, RuntimeError, TypeError, ValueError) as error:
        return FusedVerdict(reason=f"its fused decode step does not run ({type(error).__name__}: {error})")
    offset = min(errors, key=lambda key: errors[key])
    if not errors[offset] <= get_tolerance(torch.float32, model.device):
        size = (
            f"by {errors[offset]:.0e} of the largest" if math.isfinite(errors[offset]) else "in the largest"
        )
        return FusedVerdict(reason=f"logits of a fused decode step differ from its own {size}")
    return FusedVerdict(offset)


def _compare_logits(decoder: TokenDecoder, batch: Sequences, expected: Tensor) -> float:
    """Return the relative error of a fused decoder's logits; inf if it prefers another token."""
    logits = compute_forced_logits(decoder, batch)
    if expected.isfinite().all() and not torch.equal(logits.argmax(-1), expected.argmax(-1)):
        return math.inf
    return compute_relative_error(logits, expected)


def compute_forced_logits(decoder: TokenDecoder, batch: Sequences) -> Tensor:
    """Return the logits of each completion token given those before it, (N, C, V), one step a token."""
    tokens = batch.completion_ids.shape[1]
    start = decoder.read_prompts(batch.prompt_ids, batch.prompt_mask, tokens)
    steps = [start.logits]
    for n in range(tokens - 1):
        ids = batch.completion_ids[:, n : n + 1]
        steps.append(decoder.forward(ids, start.positions + n, start.cache, start.width + n + 1))
    return torch.stack(steps, dim=1)


def _log_reason(model: PreTrainedModel, level: int, reason: str) -> None:
    """Log the first reason why this model samples with `generate`, in one line."""
    if model not in _logged_reasons:
        _logged_reasons[model] = reason
        logger.log(level, "%s samples with transformers' `generate`: %s", type(model).__name__, reason)


def _has_room(model: PreTrainedModel) -> bool:
    """Check whether a GPU has room for a copy of the weights and as much again; True on other devices."""
    if model.device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    needed = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    if free < needed:
        gib = 2**30
        reason = f"a copy of its weights needs {needed / gib:.1f} GiB, free are {free / gib:.1f}"
        _log_reason(model, logging.WARNING, reason)
    return free >= needed


def _get_wide_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or a copy of it in float32 if its products are in half precision, with all cells."""
    if model.dtype in (torch.float32, torch.float64) and not _has_cast_weights(model):
        return model
    wide = copy.deepcopy(model).float().eval()
    for module in wide.modules():
        if isinstance(module, PackedModule):
            module.select_all_cells()
    return wide


def _has_cast_weights(model: PreTrainedModel) -> bool:
    """Check whether selected cells of a pack have weights in another dtype than the trained ones."""
    return any(
        module.get_active_weight().dtype != module.weight.dtype
        for module in model.modules()
        if isinstance(module, PackedModule)
    )
