"""One forward pass for both families: logits of the completion's tokens given the prompt.

Shapes: N rows (K cells times B), P prompt tokens, C completion tokens, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gkd_lab.models.classifiers import add_label_axis, get_classifier_kind
from gkd_lab.models.packed_layers import count_cells


@dataclass(frozen=True)
class Sequences:
    """Prompts and what was written after them.

    prompt_ids, prompt_mask: (N, P); padded on the left for a decoder-only model.
    completion_ids, completion_mask: (N, C); padded on the right; the mask covers what is trained on, up to
    and including the end of sequence.
    token_type_ids: (N, P), which of a pair of texts a prompt's token belongs to; None: there is one text.
    routes: (N, 1), the number of the teacher that a row is meant for; None: they are not told apart.
    numbers: (N, 1), a row's place in the data, by which scores that were kept of it are found; or None.

    Of a classifier the prompt is the text, padded on the right, and the completion its labels: one a row
    (C = 1) or one a token (C = P); of a regression numbers.
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
        return self.prompt_ids.shape[0]

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Sequences":
        """The same change to all tensors."""
        return Sequences(**{name: function(tensor) for name, tensor in self.named_tensors().items()})

    def named_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that are there."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def repeat_rows(self, times: int) -> "Sequences":
        """The same rows `times` over, block after block: one block a cell."""
        return self.map_tensors(lambda tensor: tensor.repeat(times, 1))

    def to(self, device: torch.device | str) -> "Sequences":
        return self.map_tensors(lambda tensor: tensor.to(device))

    def replace_completions(self, ids: Tensor, mask: Tensor) -> "Sequences":
        return replace(self, completion_ids=ids, completion_mask=mask)


def compute_position_ids(mask: Tensor) -> Tensor:
    """Positions that start at 0 with the first real token, whatever the padding; (N, T)."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def compute_completion_logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Logits that predict each completion token, (N, C, V). The model may be wrapped, as by DDP."""
    bare = unwrap_model(model)
    return slice_completion_outputs(bare, model(**build_forward_arguments(bare, batch)).logits, batch)


def build_forward_arguments(model: PreTrainedModel, batch: Sequences) -> dict[str, Any]:
    """What the forward pass of `model`, which is not wrapped, reads to predict the completion's tokens."""
    if get_classifier_kind(model) is not None:
        return _build_classifier_arguments(model, batch)
    if model.config.is_encoder_decoder:
        return {
            "input_ids": batch.prompt_ids,
            "attention_mask": batch.prompt_mask,
            "decoder_input_ids": shift_right(model.config, batch.completion_ids),
            "use_cache": False,
        }
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], dim=1)
    named: dict[str, Any] = {
        "input_ids": torch.cat([batch.prompt_ids, batch.completion_ids], dim=1),
        "attention_mask": mask,
        "use_cache": False,
    }
    # Without it absolute positions would count the padding; a model that has none takes no such argument.
    if accepts_argument(model, "position_ids"):
        named["position_ids"] = compute_position_ids(mask)
    if accepts_argument(model, "logits_to_keep"):
        named["logits_to_keep"] = batch.completion_ids.shape[1] + 1
    return named


def _build_classifier_arguments(model: PreTrainedModel, batch: Sequences) -> dict[str, Any]:
    """What a classifier reads. Positions are its own affair, but a pack must be told each row's: in order, as
    most models have them by themselves."""
    named = {"input_ids": batch.prompt_ids, "attention_mask": batch.prompt_mask}
    if batch.token_type_ids is not None and accepts_argument(model, "token_type_ids"):
        named["token_type_ids"] = batch.token_type_ids
    if count_cells(model) > 1 and accepts_argument(model, "position_ids"):
        ids = batch.prompt_ids
        named["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return named


def slice_completion_outputs(model: PreTrainedModel, outputs: Tensor, batch: Sequences) -> Tensor:
    """The part of a forward pass's outputs that predicts the completion, (N, T, ...) -> (N, C, ...).

    Of a classifier `outputs` are its logits.
    """
    kind = get_classifier_kind(model)
    if kind is not None:
        return add_label_axis(outputs, kind)
    if model.config.is_encoder_decoder:
        return outputs
    return outputs[:, -batch.completion_ids.shape[1] - 1 : -1]


def unwrap_model(model: Any) -> PreTrainedModel:
    """The model of transformers inside of DDP and an adapter."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if is_peft_model(inner) else inner


def accepts_argument(model: PreTrainedModel, argument: str) -> bool:
    """Whether the forward pass of `model`, which is not wrapped, has a parameter of this name."""
    return argument in _list_parameter_names(type(model).forward)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Dropout off within, and every module as it was afterwards."""
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
    return frozenset(inspect.signature(function).parameters)


def shift_right(config: PretrainedConfig, completion_ids: Tensor) -> Tensor:
    """What the decoder reads while it predicts `completion_ids`.

    Raises ValueError for a model that does not say what its decoder reads first.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(config).__name__}.decoder_start_token_id is None, so what the decoder reads first is not "
            "known: set `model.config.decoder_start_token_id`, for mBART to the id of the target language's "
            "token, for mBART-50 to that of the end of sequence"
        )
    return torch.cat(
        [completion_ids.new_full((len(completion_ids), 1), start), completion_ids[:, :-1]], dim=1
    )


def make_completion_mask(ids: Tensor, end_ids: Tensor) -> Tensor:
    """Mask of the tokens up to and including the first end of sequence, (N, C)."""
    ended = torch.isin(ids, end_ids).long()
    return (ended.cumsum(-1) - ended) == 0
