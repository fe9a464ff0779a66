"""What two tiny models of a family make of the same rows, as a term of a cell's loss sees it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.auxiliary_losses import LossInputs, ModelOutputs
from gkd_lab.models.forward import Sequences, build_forward_arguments
from gkd_lab.models.projection import Projection

from ..models.tiny import END, PAD

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
COMPLETIONS = [[5, END], [], [12, 3, END]]
"""Of the second row nothing is trained."""


def rows(family: Family) -> Sequences:
    """Prompts padded on the side that the family needs."""
    width = max(map(len, PROMPTS))
    left = family == "decoder-only"
    prompts = [_padded(ids, width, left=left) for ids in PROMPTS]
    completions = [_padded(ids, 4, left=False) for ids in COMPLETIONS]
    return Sequences(
        *map(torch.tensor, zip(*prompts, strict=True)), *map(torch.tensor, zip(*completions, strict=True))
    )


def _padded(ids: list[int], width: int, *, left: bool) -> tuple[list[int], list[int]]:
    pad, ones = [PAD] * (width - len(ids)), [1] * len(ids)
    return (pad + ids, [0] * len(pad) + ones) if left else (ids + pad, ones + [0] * len(pad))


def weights(batch: Sequences) -> Tensor:
    """Of each token, (B, C): mean over the tokens of a row, then over the rows that have any."""
    mask = batch.completion_mask.double()
    each = mask / mask.sum(1, keepdim=True).clamp_min(1)
    return each / (mask.sum(1) > 0).sum()


def passed(model: PreTrainedModel, batch: Sequences, asks: str) -> ModelOutputs:
    """The model's forward pass with what a measure asks for."""
    output_arguments: dict[str, Any] = {f"output_{asks}": True}
    output = model(**build_forward_arguments(model, batch), **output_arguments)
    named = {name: value for name, value in output.items() if name.endswith(asks)}
    return ModelOutputs(output.logits, named, model.config, Projection(None))


def seen(student: PreTrainedModel, teacher: PreTrainedModel, batch: Sequences, asks: str) -> LossInputs:
    """Both passes; the teacher's without gradient."""
    with torch.no_grad():
        guide = passed(teacher, batch, asks)
    return LossInputs(
        batch, passed(student, batch, asks), guide, weights(batch), on_policy=False, step=0, seed=0
    )


def labelled(batch: Sequences) -> Sequences:
    """The prompts alone, as a classifier reads them, with a label for each."""
    ones = torch.ones(batch.num_rows, 1, dtype=torch.long)
    return replace(batch, completion_ids=ones, completion_mask=ones)


def longer(batch: Sequences, extra: int) -> Sequences:
    """The same rows with more padding at the end of their completions."""
    pad = torch.zeros(batch.num_rows, extra, dtype=batch.completion_ids.dtype)
    return replace(
        batch,
        completion_ids=torch.cat([batch.completion_ids, pad + PAD], 1),
        completion_mask=torch.cat([batch.completion_mask, pad], 1),
    )
