"""What one optimizer step trains on: the coin, the rollout, and the loss of each cell (Algorithm 1, Eq. 2).

Shapes: K cells, S distinct seeds, B rows a cell, C completion tokens, V vocabulary, M teacher blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.distill.config import CellArguments
from gkd_lab.distill.divergence import generalized_jsd
from gkd_lab.models.forward import Sequences


@dataclass(frozen=True)
class StepBatch:
    """One micro-batch of a step, for all cells."""

    student: Sequences
    """(K*B) rows, cell after cell: what each student is trained on."""
    teacher: Sequences
    """(M*B) rows: what the teacher must read; cells that share their rows share a block."""
    block_of_cell: tuple[int, ...]
    on_policy: tuple[bool, ...]


def blocks(batch: Sequences, count: int) -> list[Sequences]:
    """A batch of `count` equal blocks of rows, one by one."""
    size = batch.rows // count

    def block(n: int) -> Sequences:
        return batch.map(lambda tensor: tensor[n * size : (n + 1) * size])

    return [block(n) for n in range(count)]


def joined(parts: Sequence[Sequences], pad_id: int) -> Sequences:
    """Blocks under each other; completions are padded to the longest."""
    width = max(part.completion_ids.shape[1] for part in parts)

    def padded(tensor: Tensor, value: int) -> Tensor:
        return functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    return Sequences(
        torch.cat([part.prompt_ids for part in parts]),
        torch.cat([part.prompt_mask for part in parts]),
        torch.cat([padded(part.completion_ids, pad_id) for part in parts]),
        torch.cat([padded(part.completion_mask, 0) for part in parts]),
    )


def step_batch(
    seeds: Sequence[int],
    cells: Sequence[CellArguments],
    fixed: Sequences,
    written: dict[int, Sequences],
    pad_id: int,
) -> StepBatch:
    """Put together the rows of all cells: `written` by those on policy, `fixed` (S*B rows) for the rest."""
    of_seed = dict(zip(seeds, blocks(fixed, len(seeds)), strict=True))
    student = [written[n] if n in written else of_seed[cell.seed] for n, cell in enumerate(cells)]
    distinct: dict[int, int] = {}
    for part in student:
        distinct.setdefault(id(part), len(distinct))
    unique = {id(part): part for part in student}
    return StepBatch(
        student=joined(student, pad_id),
        teacher=joined([unique[key] for key in distinct], pad_id),
        block_of_cell=tuple(distinct[id(part)] for part in student),
        on_policy=tuple(n in written for n in range(len(cells))),
    )


def trained_items(batch: StepBatch, cells: int, normalization: str) -> Tensor:
    """What a cell's loss is divided by, (K,): its sequences, or its tokens, that are trained on."""
    tokens = batch.student.completion_mask.view(cells, -1, batch.student.completion_mask.shape[1])
    per_row = tokens.sum(-1)
    return (per_row.sum(-1) if normalization == "token" else (per_row > 0).sum(-1)).double()


def cell_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    batch: StepBatch,
    cells: Sequence[CellArguments],
    items: Tensor,
    normalization: str,
) -> Tensor:
    """Loss of each cell, (K,), summed over this micro-batch and divided by the whole step's `items`.

    student_logits: (K*B, C, V); teacher_logits: (M*B, C, V).
    """
    count, (_, length, vocabulary) = len(cells), student_logits.shape
    student = student_logits.view(count, -1, length, vocabulary)
    teacher = teacher_logits.view(-1, student.shape[1], length, vocabulary)
    masks = batch.student.completion_mask.view(count, -1, length).bool()
    losses = []
    for n, cell in enumerate(cells):
        mask = masks[n]
        values = generalized_jsd(
            student[n][mask],
            teacher[batch.block_of_cell[n]][mask],
            cell.beta,
            student_temperature=cell.student_temperature,
            teacher_temperature=cell.teacher_temperature,
        )
        if normalization == "sequence":
            lengths = mask.sum(-1, keepdim=True).expand_as(mask)[mask]
            values = values / lengths
        losses.append(values.sum() / items[n].clamp_min(1))
    return torch.stack(losses)
