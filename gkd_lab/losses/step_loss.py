"""What one optimizer step trains on and the loss of each cell (Algorithm 1, Eq. 2).

Shapes: K cells, S distinct seeds, B rows a cell, C completion tokens, V vocabulary, M teacher blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.fused_loss import CellLosses, compute_cell_losses
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherLogits, gather_positions
from gkd_lab.losses.terms import WeightedLosses
from gkd_lab.models.forward import Sequences
from gkd_lab.models.heads import UnprojectedOutput


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step, for all cells."""

    student: Sequences
    """(K*B) rows, cell after cell: what each student is trained on."""
    teacher: Sequences
    """(M*B) rows: what the teacher must read; cells that share their rows share a block."""
    block_of_cell: tuple[int, ...]
    on_policy: tuple[bool, ...]
    prompts_of_block: tuple[int, ...] = (0,)
    """Which of the seeds' prompts a block of teacher rows answers."""
    progress: float = 0.0
    """Share of the training's steps that lie behind, 1 in the last one."""
    scales: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)
    """(cell, number of its term) -> (B, C), a factor on the tokens' weights in this term, as a reward's."""
    step: int = 0
    """Optimizer steps done."""
    only_term: int | None = None
    """Number of the only term that counts, for its gradient alone; None: all of them."""

    def cell_terms(self, n: int, cell: CellArguments) -> WeightedLosses:
        """What the loss of cell `n` is made of here; what does not count weighs 0."""
        terms = cell.list_terms(on_policy=self.on_policy[n], progress=self.progress)
        if self.only_term is None:
            return terms
        return tuple(
            term if place == self.only_term else replace(term, weight=0.0) for place, term in enumerate(terms)
        )


SHARED_TENSORS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask"}
"""What all rows have."""


def split_blocks(batch: Sequences, count: int) -> list[Sequences]:
    """A batch of `count` equal blocks of rows, one by one."""
    size = batch.num_rows // count

    def block(n: int) -> Sequences:
        return batch.map_tensors(lambda tensor: tensor[n * size : (n + 1) * size])

    return [block(n) for n in range(count)]


def concatenate_blocks(parts: Sequence[Sequences], pad_id: int) -> Sequences:
    """Blocks under each other; completions are padded to the longest."""
    width = max(part.completion_ids.shape[1] for part in parts)

    def padded(tensor: Tensor, value: int) -> Tensor:
        return functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

    both = (set(part.named_tensors()) - SHARED_TENSORS for part in parts)
    more = {
        name: torch.cat([part.named_tensors()[name] for part in parts]) for name in set.intersection(*both)
    }
    return Sequences(
        torch.cat([part.prompt_ids for part in parts]),
        torch.cat([part.prompt_mask for part in parts]),
        torch.cat([padded(part.completion_ids, pad_id) for part in parts]),
        torch.cat([padded(part.completion_mask, 0) for part in parts]),
        **more,
    )


def build_micro_batch(
    seeds: Sequence[int],
    cells: Sequence[CellArguments],
    dataset_rows: Sequences,
    sampled_rows: dict[int, Sequences],
    pad_id: int,
) -> MicroBatch:
    """Put together the rows of all cells: `written` by those on policy, `fixed` (S*B rows) for the rest."""
    of_seed = dict(zip(seeds, split_blocks(dataset_rows, len(seeds)), strict=True))
    student = [sampled_rows[n] if n in sampled_rows else of_seed[cell.seed] for n, cell in enumerate(cells)]
    distinct: dict[int, int] = {}
    prompts: list[int] = []
    for part, cell in zip(student, cells, strict=True):
        if id(part) not in distinct:
            distinct[id(part)] = len(distinct)
            prompts.append(list(seeds).index(cell.seed))
    unique = {id(part): part for part in student}
    return MicroBatch(
        student=concatenate_blocks(student, pad_id),
        teacher=concatenate_blocks([unique[key] for key in distinct], pad_id),
        block_of_cell=tuple(distinct[id(part)] for part in student),
        on_policy=tuple(n in sampled_rows for n in range(len(cells))),
        prompts_of_block=tuple(prompts),
    )


def count_trained_items(batch: MicroBatch, cells: int, normalization: str) -> Tensor:
    """What a cell's loss is divided by, (K,): its sequences, or its tokens, that are trained on."""
    tokens = batch.student.completion_mask.view(cells, -1, batch.student.completion_mask.shape[1])
    per_row = tokens.sum(-1)
    return (per_row.sum(-1) if normalization == "token" else (per_row > 0).sum(-1)).double()


def cell_token_weights(batch: MicroBatch, cells: int, items: Tensor, normalization: str) -> Tensor:
    """Weight of each token in its cell's loss, (K, B, C); over all micro-batches of a step they sum to 1."""
    weights = token_weights(block_masks(batch, cells), normalization)
    return weights[list(batch.block_of_cell)] / items.to(weights.device).clamp_min(1)[:, None, None]


def block_masks(batch: MicroBatch, cells: int) -> Tensor:
    """Mask of the trained tokens of the teacher's rows, block after block, (M, B, C)."""
    mask = batch.teacher.completion_mask
    return mask.reshape(-1, batch.student.num_rows // cells, mask.shape[1])


def project_blocks(outputs: UnprojectedOutput, blocks: int) -> HiddenTeacherLogits:
    """What a teacher's forward pass over `blocks` blocks of rows says of their tokens."""
    return HiddenTeacherLogits(
        outputs.hidden.reshape(blocks, -1, outputs.hidden.shape[-1]), outputs.projection
    )


def token_weights(masks_MBC: Tensor, normalization: str) -> Tensor:
    """Weight of each token in the sum over a block that is still to be divided by its items, (M, B, C)."""
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
    """Loss and entropy of each cell, summed over this micro-batch; the loss is divided by the step's `items`.

    student: (K*B, C, H); guides: of M blocks of B*C tokens, by the teacher's number. Only positions that are
    trained on are projected.
    """
    count = len(cells)
    masks = block_masks(batch, count)
    weights = token_weights(masks, normalization).flatten(1)
    trained = max(1, int((weights > 0).sum(-1).max()))
    # Trained positions first, in their order; blocks with fewer of them keep some of weight 0.
    chosen = (weights > 0).int().argsort(dim=1, descending=True, stable=True)[:, :trained]
    block = torch.tensor(batch.block_of_cell, device=chosen.device)
    divisors = items.to(weights.device).clamp_min(1)[:, None]
    routes = None
    if batch.teacher.teacher_indices is not None:
        routes = batch.teacher.teacher_indices.view(masks.shape[:2])[..., None].expand_as(masks).flatten(1)
    return compute_cell_losses(
        gather_positions(student.hidden.reshape(count, -1, student.hidden.shape[-1]), chosen[block]),
        student.projection,
        None,
        None,
        batch.block_of_cell,
        [batch.cell_terms(n, cell) for n, cell in enumerate(cells)],
        weights.gather(1, chosen)[block] / divisors,
        teachers={number: guide.select_positions(chosen) for number, guide in teachers.items()},
        labels=batch.teacher.completion_ids.reshape(len(masks), -1).gather(1, chosen)[block],
        routes=None if routes is None else routes.gather(1, chosen),
        scales={
            (n, term): scale.to(chosen.device).flatten().gather(0, chosen[block[n]])
            for (n, term), scale in batch.scales.items()
        },
        vocabulary=vocabulary,
    )
