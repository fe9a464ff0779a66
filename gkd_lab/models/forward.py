"""Compute the logits of completion tokens given the prompt, by one function for every model family.

Shapes: N rows (K cells times B), P prompt tokens, C completion tokens, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gkd_lab.models.classifiers import add_label_axis, get_classifier_kind
from gkd_lab.models.packed_layers import count_cells


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of prompt and of completion tokens of N rows, padding left out, known on the host."""

    prompts: tuple[int, ...]
    completions: tuple[int, ...]

    def split_completions(self, count: int) -> list[tuple[int, ...]]:
        """Return the completion tokens of the rows of each of `count` blocks of equally many rows."""
        size = len(self.completions) // count
        return [self.completions[n * size : (n + 1) * size] for n in range(count)]

    def count_items(self, count: int, normalization: str) -> list[int]:
        """Return the completion tokens ("token") of each of `count` blocks, or its rows that have any."""
        blocks = self.split_completions(count)
        return [sum(block) if normalization == "token" else sum(n > 0 for n in block) for block in blocks]


@dataclass(frozen=True)
class Sequences:
    """A batch of prompts and completions.

    prompt_ids, prompt_mask: (N, P); padded on the left for a decoder-only model.
    completion_ids, completion_mask: (N, C); padded on the right; the mask covers the trained tokens, up to
    and including the end of sequence.
    token_type_ids: (N, P), which text of a pair a prompt token belongs to; None for a single text.
    teacher_indices: (N, 1), index of the teacher that a row is routed to; None without routing.
    row_indices: (N, 1), position of a row in the dataset, the key of its cached teacher scores; or None.

    For a classifier the prompt is the text, padded on the right, and the completion holds its labels, one per
    row (C = 1) or one per token (C = P); for a regression numbers.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    token_type_ids: Tensor | None = None
    teacher_indices: Tensor | None = None
    row_indices: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows N."""
        return self.prompt_ids.shape[0]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Sequences":
        """Return new `Sequences`, with `function` applied to every tensor; None stays None."""
        return Sequences(**{name: function(tensor) for name, tensor in self.named_tensors().items()})

    def named_tensors(self) -> dict[str, Tensor]:
        """Return field name -> tensor, without the fields that are None."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    # Teacher, student and TRL's tensors need the same three, made once.

    @functools.cached_property
    def joined_ids(self) -> Tensor:
        """Ids of prompt and completion in one, (N, P + C)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @functools.cached_property
    def joined_mask(self) -> Tensor:
        """Mask of prompt and completion in one, (N, P + C)."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @functools.cached_property
    def joined_positions(self) -> Tensor:
        """Position ids of prompt and completion in one, (N, P + C)."""
        return compute_position_ids(self.joined_mask)

    @functools.cached_property
    def token_counts(self) -> TokenCounts:
        """Numbers of tokens of each row; the first use waits for the device."""
        prompts, completions = torch.stack([self.prompt_mask.sum(-1), self.completion_mask.sum(-1)]).tolist()
        return TokenCounts(tuple(prompts), tuple(completions))

    def repeat_rows(self, times: int) -> "Sequences":
        """Return the whole batch repeated `times` times: row k * N + n is row n again, for cell k."""
        return self.map_tensors(lambda tensor: tensor.repeat(times, 1))

    def to(self, device: torch.device | str) -> "Sequences":
        """Return a batch with all tensors on `device`; the original is unchanged."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def replace_completions(self, ids: Tensor, mask: Tensor) -> "Sequences":
        """Return the same prompts with other completions, ids and mask (N, C)."""
        return replace(self, completion_ids=ids, completion_mask=mask)


def compute_position_ids(mask: Tensor) -> Tensor:
    """Return positions (N, T): 0 at the first token with mask 1, then 1, 2, ...; 0 for padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def compute_completion_logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Run the model and return the logits that predict each completion token, (N, C, V), differentiably.

    The model may be wrapped by DDP. For a classifier these are the logits of its labels.
    """
    inner = unwrap_model(model)
    return slice_completion_outputs(inner, model(**build_forward_arguments(inner, batch)).logits, batch)


def build_forward_arguments(model: PreTrainedModel, batch: Sequences) -> dict[str, Any]:
    """Return forward's keyword arguments with which an unwrapped model predicts the completion tokens."""
    if get_classifier_kind(model) is not None:
        return _build_classifier_arguments(model, batch)
    if model.config.is_encoder_decoder:
        return {
            "input_ids": batch.prompt_ids,
            "attention_mask": batch.prompt_mask,
            "decoder_input_ids": shift_right(model.config, batch.completion_ids),
            "use_cache": False,
        }
    arguments: dict[str, Any] = {
        "input_ids": batch.joined_ids,
        "attention_mask": batch.joined_mask,
        "use_cache": False,
    }
    # By default absolute positions would count the padding.
    if accepts_argument(model, "position_ids"):
        arguments["position_ids"] = batch.joined_positions
    if accepts_argument(model, "logits_to_keep"):
        arguments["logits_to_keep"] = batch.completion_ids.shape[1] + 1
    return arguments


def _build_classifier_arguments(model: PreTrainedModel, batch: Sequences) -> dict[str, Any]:
    """Return a classifier's keyword arguments for forward; a pack gets `position_ids` for all its rows."""
    arguments = {"input_ids": batch.prompt_ids, "attention_mask": batch.prompt_mask}
    if batch.token_type_ids is not None and accepts_argument(model, "token_type_ids"):
        arguments["token_type_ids"] = batch.token_type_ids
    if count_cells(model) > 1 and accepts_argument(model, "position_ids"):
        ids = batch.prompt_ids
        arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return arguments


def slice_completion_outputs(model: PreTrainedModel, outputs: Tensor, batch: Sequences) -> Tensor:
    """Select an unwrapped model's outputs that predict the completion: (N, T, ...) -> (N, C, ...).

    For a classifier `outputs` must be its logits.
    """
    kind = get_classifier_kind(model)
    if kind is not None:
        return add_label_axis(outputs, kind)
    if model.config.is_encoder_decoder:
        return outputs
    return outputs[:, -batch.completion_ids.shape[1] - 1 : -1]


def unwrap_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a DDP wrapper and a PEFT adapter, or the model itself."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if is_peft_model(inner) else inner


def is_decoder_only(model: PreTrainedModel) -> bool:
    """Return whether an unwrapped model reads prompt and completion as one text, padded on the left.

    False for encoder-decoders and classifiers.
    """
    return not model.config.is_encoder_decoder and get_classifier_kind(model) is None


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Check whether the forward function of an unwrapped model has a parameter of this name."""
    return argument in _list_parameter_names(type(model).forward)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Context manager: put models into eval mode within the block, then restore each module's own mode."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@functools.cache
def _list_parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the set of a function's parameter names, cached per function."""
    return frozenset(inspect.signature(function).parameters)


def shift_right(config: PretrainedConfig, completion_ids: Tensor) -> Tensor:
    """Return decoder inputs that predict `completion_ids`, (N, C): the start token, then all but the last id.

    Raises:
        ValueError: if the configuration has no `decoder_start_token_id`.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(config).__name__}.decoder_start_token_id is None, so the decoder's first input is "
            "unknown: set `model.config.decoder_start_token_id`, for mBART to the id of the target "
            "language's token, for mBART-50 to that of the end of sequence"
        )
    return torch.cat(
        [completion_ids.new_full((len(completion_ids), 1), start), completion_ids[:, :-1]], dim=1
    )


def make_completion_mask(ids: Tensor, end_ids: Tensor) -> Tensor:
    """Return a bool mask (N, C): True up to and including the first of `end_ids`, everywhere without one."""
    ended = torch.isin(ids, end_ids).long()
    return (ended.cumsum(-1) - ended) == 0
