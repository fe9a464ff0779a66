"""The micro-batches of an optimizer step and the loss of each cell on them (Algorithm 1, Eq. 2).

Shapes: K cells, S distinct seeds, B rows a cell, C completion tokens, V vocabulary, M teacher blocks.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherLogits, gather_positions
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.models.forward import Sequences
from gkd_lab.models.heads import UnprojectedOutput


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step, for all cells."""

    student: Sequences
    """(K*B) rows, cell after cell, that each student is trained on."""
    teacher: Sequences
    """(M*B) rows for the teacher; cells with the same rows share a block."""
    block_of_cell: tuple[int, ...]
    on_policy: tuple[bool, ...]
    prompts_of_block: tuple[int, ...] = (0,)
    """For each block of teacher rows the number of the seed that its prompts belong to."""
    progress: float = 0.0
    """Share of the training's steps that are finished, 1 in the last step."""
    scales: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    """(cell, number of its term) -> factors on the tokens' weights in it, (B, C), such as a reward's."""
    step: int = 0
    """Number of finished optimizer steps."""
    only_term: int | None = None
    """Number of the term whose gradient is measured; all others have weight 0. None: train on all terms."""

    def cell_terms(self, n: int, cell: CellArguments) -> WeightedLosses:
        """Return cell `n`'s terms, with weight 0 if inapplicable here or, if it is set, not `only_term`."""
        terms = cell.list_terms(on_policy=self.on_policy[n], progress=self.progress)
        if self.only_term is None:
            return terms
        return tuple(
            term if number == self.only_term else replace(term, weight=0.0)
            for number, term in enumerate(terms)
        )


SHARED_TENSORS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
"""Fields of `Sequences` that are always set."""


def split_blocks(batch: Sequences, count: int) -> list[Sequences]:
    """Split a batch into `count` consecutive blocks of equally many rows."""
    size = batch.num_rows // count

    def select_block(n: int) -> Sequences:
        """Return the rows of block `n`."""
        return batch.map_tensors(lambda tensor: tensor[n * size : (n + 1) * size])

    return [select_block(n) for n in range(count)]


def concatenate_blocks(parts: Sequence[Sequences], pad_id: int) -> Sequences:
    """Join blocks of rows in order; completions are padded on the right to the longest.

    Prompts have one width. An optional tensor is joined if all blocks have it, and left out otherwise.
    """
    if len(parts) == 1:
        return parts[0]
    width = max(part.completion_ids.shape[1] for part in parts)

    def pad_right(tensor: Tensor, value: int) -> Tensor:
        """Pad a tensor of completions on the right to the longest."""
        missing = width - tensor.shape[1]
        return functional.pad(tensor, (0, missing), value=value) if missing else tensor

    optional = set.intersection(*(set(part.named_tensors()) - SHARED_TENSORS for part in parts))
    optional_tensors = {name: torch.cat([part.named_tensors()[name] for part in parts]) for name in optional}
    return Sequences(
        torch.cat([part.prompt_ids for part in parts]),
        torch.cat([part.prompt_mask for part in parts]),
        torch.cat([pad_right(part.completion_ids, pad_id) for part in parts]),
        torch.cat([pad_right(part.completion_mask, 0) for part in parts]),
        **optional_tensors,
    )


def build_micro_batch(
    seeds: Sequence[int],
    cells: Sequence[CellArguments],
    dataset_rows: Sequences,
    sampled_rows: dict[int, Sequences],
    pad_id: int,
) -> MicroBatch:
    """Build all cells' micro-batch: a cell's sampled rows if it has any, else the dataset rows of its seed.

    dataset_rows: (S*B), seed after seed. sampled_rows: cell -> its rows; cells may share one object, and then
    a block of teacher rows.
    """
    rows_by_seed = dict(zip(seeds, split_blocks(dataset_rows, len(seeds)), strict=True))
    student = [sampled_rows.get(n, rows_by_seed[cell.seed]) for n, cell in enumerate(cells)]
    block_numbers: dict[int, int] = {}  # by the identity of the rows
    prompts: list[int] = []
    for part, cell in zip(student, cells, strict=True):
        if id(part) not in block_numbers:
            block_numbers[id(part)] = len(block_numbers)
            prompts.append(list(seeds).index(cell.seed))
    unique = {id(part): part for part in student}
    teacher = concatenate_blocks([unique[key] for key in block_numbers], pad_id)
    return MicroBatch(
        student=teacher if len(unique) == len(cells) else concatenate_blocks(student, pad_id),
        teacher=teacher,
        block_of_cell=tuple(block_numbers[id(part)] for part in student),
        on_policy=tuple(n in sampled_rows for n in range(len(cells))),
        prompts_of_block=tuple(prompts),
    )


def check_completions(batch: MicroBatch, failed: Collection[int]) -> None:
    """Raise ValueError if the rows of an off-policy cell that has not failed include some without completion.

    failed: Numbers of cells.
    """
    tokens_of_block = batch.teacher.token_counts.split_completions(len(batch.prompts_of_block))
    cells = enumerate(zip(batch.block_of_cell, batch.on_policy, strict=True))
    blocks = {block for n, (block, on_policy) in cells if n not in failed and not on_policy}
    tokens = [n for block in blocks for n in tokens_of_block[block]]
    if 0 in tokens:
        raise ValueError(
            f"{tokens.count(0)} of {len(tokens)} rows of a batch have no completion, which off-policy steps "
            "train on; set lmbda=1 to train on the student's own text, or seq_kd=True to let the teacher "
            "write"
        )


def count_trained_items(batch: MicroBatch, normalization: str) -> Tensor:
    """Return the divisor of each cell's loss, (K,): its number of trained tokens ("token") or sequences."""
    items_of_block = batch.teacher.token_counts.count_items(len(batch.prompts_of_block), normalization)
    items = [items_of_block[block] for block in batch.block_of_cell]
    return torch.tensor(items, dtype=torch.double, device=batch.student.completion_mask.device)


def cell_token_weights(batch: MicroBatch, cells: int, items: Tensor, normalization: str) -> Tensor:
    """Return each token's weight in its cell's loss, (K, B, C); over a whole step each cell's sum to 1."""
    weights = token_weights(block_masks(batch, cells), normalization)
    return weights[list(batch.block_of_cell)] / items.to(weights.device).clamp_min(1)[:, None, None]


def block_masks(batch: MicroBatch, cells: int) -> Tensor:
    """Return the mask of trained tokens of each block of teacher rows, (M, B, C)."""
    mask = batch.teacher.completion_mask
    return mask.reshape(-1, batch.student.num_rows // cells, mask.shape[1])


def build_teacher_logits(outputs: UnprojectedOutput, blocks: int) -> HiddenTeacherLogits:
    """Arrange hidden states of a forward pass in `blocks` blocks as teacher logits, projected when read."""
    return HiddenTeacherLogits(
        outputs.hidden.reshape(blocks, -1, outputs.hidden.shape[-1]), outputs.projection
    )


def token_weights(masks_MBC: Tensor, normalization: str) -> Tensor:
    """Return token weights before division by the items, (M, B, C): 1 each ("token"), or 1 / row's length."""
    masks = masks_MBC.double()
    return masks if normalization == "token" else masks / masks.sum(-1, keepdim=True).clamp_min(1)


def compute_step_losses(
    student: UnprojectedOutput,
    teachers: Mapping[int, TeacherLogits],
    batch: MicroBatch,
    cells: Sequence[CellArguments],
    items: Tensor,
    normalization: str,
    vocabulary: int | None = None,
) -> CellLosses:
    """Return this micro-batch's `CellLosses`: per cell the loss divided by `items`, entropy and terms.

    student: (K*B, C, H). teachers: by number, each of M blocks of B*C tokens. items: divisors of the whole
    step, (K,). Only positions that are trained on are projected.
    """
    count = len(cells)
    masks = block_masks(batch, count)
    weights = token_weights(masks, normalization).flatten(1)
    is_trained = weights > 0
    lengths = batch.teacher.token_counts.count_items(len(masks), "token")
    # Trained positions first, in their order; blocks with fewer of them keep some of weight 0.
    positions = is_trained.argsort(dim=1, descending=True, stable=True)[:, : max(1, *lengths)]
    block = torch.tensor(batch.block_of_cell, device=positions.device)
    divisors = items.to(weights.device).clamp_min(1)[:, None]
    routes = None
    if batch.teacher.teacher_indices is not None:
        routes = batch.teacher.teacher_indices.view(masks.shape[:2])[..., None].expand_as(masks).flatten(1)
    terms = [batch.cell_terms(n, cell) for n, cell in enumerate(cells)]
    labels = None
    if any(term.reads_labels for cell_terms in terms for term in cell_terms):
        labels = batch.teacher.completion_ids.reshape(len(masks), -1).gather(1, positions)[block]
    return compute_cell_losses(
        gather_positions(student.hidden.reshape(count, -1, student.hidden.shape[-1]), positions[block]),
        student.projection,
        None,
        None,
        batch.block_of_cell,
        terms,
        weights.gather(1, positions)[block] / divisors,
        teachers={number: logits.select_positions(positions) for number, logits in teachers.items()},
        labels=labels,
        routes=None if routes is None else routes.gather(1, positions),
        scales={
            (n, term): scale.to(positions.device).flatten().gather(0, positions[block[n]])
            for (n, term), scale in batch.scales.items()
        },
        vocabulary=vocabulary,
        lengths=lengths,
    )
