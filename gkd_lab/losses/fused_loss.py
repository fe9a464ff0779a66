"""Divergences from hidden states and heads, without the logits of all tokens ever being there at once.

The gradients of the hidden states and of the head are made in the forward pass, chunk by chunk, so that each
head is projected once; the backward pass only multiplies them by what comes in.

Shapes: K cells, M blocks of teacher rows, N tokens of a cell, n of them in a chunk, V vocabulary, H width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.loss import LabelLoss, Loss, TeacherLoss
from gkd_lab.losses.teacher_targets import (
    HiddenTeacherLogits,
    LogitReader,
    TeacherLogits,
    TeacherTarget,
    project_hidden,
)
from gkd_lab.losses.terms import (
    FIRST_TEACHER_TARGET,
    WeightedLoss,
    WeightedLosses,
    list_terms,
    required_teachers,
)
from gkd_lab.models.projection import MatmulPrecision, Projection

CHUNK_BYTES = 128 * 2**20
"""Size of a chunk's logits, those of a student and of its teachers together."""
SLICE_BYTES = 2**20
"""Size of the logits that a CPU turns into gradients at once, so that temporaries stay in its cache."""


@dataclass(frozen=True)
class CellLosses:
    """What `divergence_sums` returns.

    losses: (K,), differentiable by the student's hidden states and by the weight and bias of its head.
    entropies: (K,), the student's entropy in nats, summed over the tokens with a weight above 0; no gradient.
    terms: (K, most terms of a cell), what each term adds to the loss; no gradient. 0 for those that are
        not computed from logits.
    """

    losses: Tensor
    entropies: Tensor
    terms: Tensor

    def add_terms(self, values: Mapping[tuple[int, int], Tensor]) -> "CellLosses":
        """The same with more terms: (cell, number of the term) -> value, ()."""
        losses, terms = list(self.losses.unbind()), self.terms.clone()
        for (cell, place), value in values.items():
            losses[cell] = losses[cell] + value.to(losses[cell].dtype)
            terms[cell, place] = value.detach().to(terms.dtype)
        return replace(self, losses=torch.stack(losses), terms=terms)


@dataclass(frozen=True)
class _LossArguments:
    """The arguments of `divergence_sums` that take no gradient."""

    teachers: Mapping[int, TeacherLogits]
    block_of_cell: tuple[int, ...]
    terms: tuple[WeightedLosses, ...]
    weights: Tensor
    labels: Tensor | None
    routes: Tensor | None
    scales: Mapping[tuple[int, int], Tensor]
    vocabulary: int | None

    def is_single_divergence(self, cell: int) -> bool:
        """Whether the cell's loss is a divergence from one teacher and nothing else."""
        terms = self.terms[cell]
        return (
            len(terms) == 1
            and isinstance(terms[0].loss, Divergence)
            and terms[0].target == FIRST_TEACHER_TARGET
            and not self.scales
        )

    def logit_terms(self, cell: int) -> list[tuple[int, WeightedLoss]]:
        """Those of the cell's terms that logits are made for, numbered; one at least, for the entropy."""
        found = [(n, term) for n, term in enumerate(self.terms[cell]) if term.is_token_loss]
        # What weighs nothing and is not the first is not computed.
        return [found[0], *((n, t) for n, t in found[1:] if t.weight)] if found else [(0, _ZERO_TERM)]


_ZERO_TERM = WeightedLoss(CrossEntropy(), 0.0)


def compute_cell_losses(
    student: Tensor,
    student_head: Projection,
    teacher: Tensor | None,
    teacher_head: Projection | None,
    block_of_cell: Sequence[int],
    terms: Sequence[Loss | Sequence[WeightedLoss]],
    weights: Tensor,
    *,
    teachers: Mapping[int, TeacherLogits] | None = None,
    labels: Tensor | None = None,
    routes: Tensor | None = None,
    scales: Mapping[tuple[int, int], Tensor] | None = None,
    vocabulary: int | None = None,
) -> CellLosses:
    """Sum over tokens of weight * divergence, for each cell, or of a weighted list of terms.

    student: (K, N, H_s) last hidden states, any float dtype; its head's weight: (K, V, H_s), or (V, H_s).
    teacher: (M, N, H_t), M distinct blocks of rows, without gradient; its head's weight (V_t, H_t). None
        if no term compares with it.
    block_of_cell: for each cell its block, in range(M). divergences: a measure or its terms for each cell.
    weights: (K, N); 0 where nothing is trained. They take no gradient.
    guides: teachers by number, where there are several or they have no hidden states; `teacher` is number 0.
    labels: (K, N), the tokens themselves, for terms that read them.
    routes: (M, N), the number of the teacher that a token's row is meant for, for targets that are routed.
    scales: (cell, number of the term) -> (N,), a factor on the weights in this term.
    vocabulary: only so many first rows of both heads count, and probabilities are normalised over these;
        default: those that both have.

    Logits are float32 (float64 if hidden states are), also under autocast and for heads in bfloat16. The
    losses can be propagated back once. Raises ValueError for shapes that do not fit together.
    """
    known = dict(teachers or {})
    if teacher is not None and teacher_head is not None:
        known[0] = HiddenTeacherLogits(teacher, teacher_head)
    call = _LossArguments(
        teachers=known,
        block_of_cell=tuple(block_of_cell),
        terms=tuple(list_terms(one) for one in terms),
        weights=weights,
        labels=labels,
        routes=routes,
        scales=scales or {},
        vocabulary=vocabulary,
    )
    _check_shapes(student, student_head, call)
    # On CUDA TRL's kernel is fused Triton and keeps no temporaries. On a CPU it is plain PyTorch and projects
    # each head two or three times, ours once: 62 to 91 s and 2,825 MiB or more against 21 to 24 s and 148 MiB
    # at N = 2,048, V = 151,936, H = 512, fp32, one thread (benchmarks/loss.py).
    if student.is_cuda and _is_trl_computable(student, student_head, call):
        return _compute_by_trl(student, student_head, call)
    return _compute_on_cpu(student, student_head, call)


def _check_shapes(student: Tensor, head: Projection, arguments: _LossArguments) -> None:
    cells, tokens = student.shape[:2]
    shapes = [guide.shape for guide in arguments.teachers.values()]
    blocks = shapes[0][0] if shapes else cells
    for of_teacher in shapes:
        if of_teacher != (blocks, tokens):
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {of_teacher} must be (K, N, H_s) and (M, N)"
            )
    if arguments.weights.shape != (cells, tokens):
        raise ValueError(
            f"student {tuple(student.shape)} and weights {tuple(arguments.weights.shape)} must be "
            "(K, N, H_s) and (K, N)"
        )
    if len(arguments.block_of_cell) != cells or len(arguments.terms) != cells:
        raise ValueError(
            f"{len(arguments.block_of_cell)} blocks and {len(arguments.terms)} lists of terms for {cells} "
            "cells: give one of each a cell"
        )
    of_logits = [tuple(t for t in terms if t.is_token_loss) for terms in arguments.terms]
    missing = sorted(set(required_teachers(of_logits)) - set(arguments.teachers))
    if missing:
        which = "" if missing == [0] else f" (number {missing[0]} is not there)"
        raise ValueError(f"a divergence compares with a teacher: give its hidden states and head{which}")
    if arguments.labels is None and any(term.reads_labels for terms in of_logits for term in terms):
        raise ValueError("cross-entropy reads the tokens themselves: give them as labels, (K, N)")
    if not set(arguments.block_of_cell) <= set(range(blocks)):
        raise ValueError(
            f"block_of_cell {arguments.block_of_cell} must lie in range({blocks}), the teacher's blocks"
        )
    if cells > 1 and head.weight is not None and head.weight.dim() != 3:
        raise ValueError(f"{cells} packed students need a head (K, V, H), got {tuple(head.weight.shape)}")
    if cells > 1 and head.bias is not None and head.bias.requires_grad and head.bias.shape[0] != cells:
        raise ValueError(f"{cells} packed students need a bias (K, V), got {tuple(head.bias.shape)}")
    heads = [
        guide.head.weight for guide in arguments.teachers.values() if isinstance(guide, HiddenTeacherLogits)
    ]
    for name, weight in (("student", head.weight), *(("teacher", weight) for weight in heads)):
        if isinstance(weight, DTensor):
            raise ValueError(f"the {name}'s head is sharded as {weight.placements}: pass the full tensor")


def _compute_on_cpu(student: Tensor, head: Projection, arguments: _LossArguments) -> CellLosses:
    tensors = (student, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if any(wanted):
        return CellLosses(
            *_FusedLoss.apply(*tensors, replace(head, weight=None, bias=None), arguments, wanted)
        )
    return _sum_chunks(student, head, arguments, wanted)[0]


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Projection,
        arguments: _LossArguments,
        needs_gradient: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (student, weight, bias)]
        head = replace(head, weight=weight, bias=bias)
        sums, ctx.gradients = _sum_chunks(student, head, arguments, needs_gradient)
        ctx.mark_non_differentiable(sums.entropies, sums.terms)
        return sums.losses, sums.entropies, sums.terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "divergence_sums makes its gradients in the forward pass and gives them away in the first "
                "backward pass: call it again for a second one"
            )
        gradients, ctx.gradients = ctx.gradients, None
        whole = [
            None if gradient is None else _scale_by_cell(gradient, incoming).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*whole, None, None, None)


def _scale_by_cell(gradient: Tensor, incoming: Tensor) -> Tensor:
    """A gradient of K cells' losses times what comes in for each, in place."""
    if len(incoming) == 1:
        return gradient.mul_(incoming[0])
    return gradient.mul_(incoming.view(-1, *[1] * (gradient.dim() - 1)))


def _sum_chunks(
    student: Tensor, head: Projection, arguments: _LossArguments, needs_gradient: Sequence[bool]
) -> tuple[CellLosses, list[Tensor | None]]:
    """The sums, and the wanted ones of (student, weight, bias)'s gradients."""
    wide = torch.promote_types(student.dtype, torch.float32)
    for guide in arguments.teachers.values():
        wide = torch.promote_types(wide, guide.dtype)
    heads = [guide.head for guide in arguments.teachers.values() if isinstance(guide, HiddenTeacherLogits)]
    arithmetic = MatmulPrecision.create(student, wide)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for one in (head, *heads):
            stack.enter_context(maybe_gather_lm_head_ctx(*_head_parameters(one)))
        readers = _TeacherReaders(arguments, _shared_vocabulary(student, head, arguments), wide)
        stack.enter_context(torch.autocast(student.device.type, enabled=False))
        walk = _ChunkSums(student, head, arguments, needs_gradient, arithmetic, readers)
        for block in sorted(set(arguments.block_of_cell)):
            walk.add_block(block)
    return CellLosses(walk.losses, walk.entropies, walk.terms), walk.gradients


def _head_parameters(head: Projection | None) -> list[torch.nn.Parameter]:
    if head is None:
        return []
    return [tensor for tensor in (head.weight, head.bias) if isinstance(tensor, torch.nn.Parameter)]


def _shared_vocabulary(student: Tensor, head: Projection, arguments: _LossArguments) -> int:
    shared = head.get_vocabulary_size(student)
    for guide in arguments.teachers.values():
        shared = min(shared, guide.vocabulary)
    if arguments.vocabulary is not None and not 0 < arguments.vocabulary <= shared:
        raise ValueError(f"vocabulary {arguments.vocabulary} is not in 1 to {shared}, what both heads have")
    return shared if arguments.vocabulary is None else arguments.vocabulary


class _TeacherReaders:
    """The teachers' logits, chunk by chunk, in the arithmetic that holds where this is made."""

    def __init__(self, arguments: _LossArguments, vocabulary: int, dtype: torch.dtype) -> None:
        self.arguments, self.vocabulary = arguments, vocabulary
        self.targets = [
            [term.target for _, term in arguments.logit_terms(cell) if isinstance(term.loss, TeacherLoss)]
            for cell in range(len(arguments.terms))
        ]
        together = (1 + max(1, len(arguments.teachers))) * vocabulary * dtype.itemsize
        self.chunk_size = max(CHUNK_BYTES // together, 1)
        longest = min(self.chunk_size, arguments.weights.shape[1])
        self.readers: dict[int, LogitReader] = {
            number: guide.create_reader(vocabulary, dtype, longest)
            for number, guide in arguments.teachers.items()
        }

    def target_logits(self, block: int, rows: Tensor, cells: Sequence[int]) -> dict[TeacherTarget, Tensor]:
        """Logits (n, V) of everything that these cells compare with, each teacher's made once."""
        made: dict[int, Tensor] = {}

        def of_teacher(number: int) -> Tensor:
            if number not in made:
                made[number] = self.readers[number](block, rows)
            return made[number]

        routes = None if self.arguments.routes is None else self.arguments.routes[block, rows]
        targets = dict.fromkeys(target for cell in cells for target in self.targets[cell])
        return {target: target.combine_logits(of_teacher, routes) for target in targets}


class _ChunkSums:
    """What is summed over cells and chunks of tokens, and a buffer with a student's logits of a chunk."""

    def __init__(
        self,
        student: Tensor,
        head: Projection,
        arguments: _LossArguments,
        needs_gradient: Sequence[bool],
        arithmetic: MatmulPrecision,
        readers: _TeacherReaders,
    ) -> None:
        self.student, self.arguments, self.readers = student, arguments, readers
        self.vocabulary, self.chunk_size = readers.vocabulary, readers.chunk_size
        self.head = head.add_cell_axis().truncate_vocabulary(self.vocabulary)
        self.arithmetic = arithmetic
        self.logit_terms = [arguments.logit_terms(cell) for cell in range(len(student))]
        wide = self.arithmetic.result_dtype
        self.weights = arguments.weights.to(wide)
        self.losses, self.entropies = student.new_zeros(2, len(student), dtype=wide)
        most = max(len(terms) for terms in arguments.terms)
        self.terms = student.new_zeros(len(student), most, dtype=wide)
        self.gradients = [
            torch.zeros_like(tensor, dtype=wide) if want and tensor is not None else None
            for want, tensor in zip(needs_gradient, (student, head.weight, head.bias), strict=True)
        ]
        longest = min(self.chunk_size, arguments.weights.shape[1])
        self.logits_buffer = student.new_empty(longest * self.vocabulary, dtype=wide)

    def add_block(self, block: int) -> None:
        """Add the cells that share the teacher's rows `block`, whose logits are made once.

        Cells are projected one by one and only where they are trained: a batched product over all would let
        the tokens of one cell change the rounding of another's.
        """
        cells = [cell for cell, of_cell in enumerate(self.arguments.block_of_cell) if of_cell == block]
        used = self.weights[cells].ne(0).any(0).nonzero()[:, 0]
        for rows in used.split(self.chunk_size) if len(used) else ():
            targets = self.readers.target_logits(block, rows, cells)
            for cell in cells:
                self._add_chunk(cell, rows, targets)

    def _add_chunk(self, cell: int, rows: Tensor, targets: Mapping[TeacherTarget, Tensor]) -> None:
        """Add a cell's tokens `rows` to all sums."""
        hidden, head = self.student[cell, rows][None], _select_cell_head(self.head, cell)
        raw = project_hidden(hidden, head, self.vocabulary, self.arithmetic, self.logits_buffer)
        self._replace_logits_by_gradient(cell, raw[0], rows, targets)
        self._add_parameter_gradients(cell, rows, hidden, raw)

    def _replace_logits_by_gradient(
        self, cell: int, raw: Tensor, rows: Tensor, targets: Mapping[TeacherTarget, Tensor]
    ) -> None:
        """Add the values of a cell's tokens; replace `raw` by their gradient."""
        keep = any(g is not None for g in self.gradients)
        size = len(raw) if raw.is_cuda else max(SLICE_BYTES // (raw.shape[1] * raw.element_size()), 1)
        for first in range(0, len(raw), size):
            some = slice(first, first + size)
            part, weight = raw[some], self.weights[cell, rows[some]]
            logits = self.head.scale_and_cap(part)
            gradient = self._add_term_values(cell, logits, rows[some], some, targets, weight)
            if keep:
                torch.mul(self.head.compute_raw_gradient(gradient, logits), weight[:, None], out=part)

    def _add_term_values(
        self,
        cell: int,
        logits: Tensor,
        rows: Tensor,
        chunk_slice: slice,
        targets: Mapping[TeacherTarget, Tensor],
        weight: Tensor,
    ) -> Tensor:
        """Add the terms' values of the tokens `rows`, which are `some` of the chunk.

        Returns their gradient by the logits, (n, V), without the tokens' weights.
        """
        total: Tensor | None = None
        for place, (n, term) in enumerate(self.logit_terms[cell]):
            values, gradient, entropies = self._evaluate_term(cell, term, logits, rows, chunk_slice, targets)
            if place == 0:
                self.entropies[cell] += entropies @ (weight > 0).to(entropies.dtype)
            scale = self.arguments.scales.get((cell, n))
            if scale is not None:
                factor = scale[rows].to(values.dtype)
                values, gradient = values * factor, gradient.mul_(factor[:, None])
            value = values @ weight
            if term.weight != 1:
                value, gradient = term.weight * value, gradient.mul_(term.weight)
            self.terms[cell, n] += value
            self.losses[cell] += value
            total = gradient if total is None else total.add_(gradient)
        assert total is not None, "a loss has a term"
        return total

    def _evaluate_term(
        self,
        cell: int,
        term: WeightedLoss,
        logits: Tensor,
        rows: Tensor,
        chunk_slice: slice,
        targets: Mapping[TeacherTarget, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, gradients and entropies of a term's tokens."""
        if isinstance(term.loss, TeacherLoss):
            return term.loss.value_and_gradient(logits, targets[term.target][chunk_slice])
        assert isinstance(term.loss, LabelLoss)
        if self.arguments.labels is None:
            # Of weight 0, for the entropy alone: any tokens will do.
            return term.loss.value_and_gradient(logits, torch.zeros_like(rows))
        return term.loss.value_and_gradient(logits, self.arguments.labels[cell, rows])

    def _add_parameter_gradients(self, cell: int, rows: Tensor, hidden: Tensor, raw: Tensor) -> None:
        """`raw` is the loss's gradient by h W^T + b, (1, n, V)."""
        of_hidden, of_weight, of_bias = self.gradients
        if of_bias is not None:
            rows_of_bias = of_bias.view(-1, of_bias.shape[-1])
            rows_of_bias[cell % len(rows_of_bias), : self.vocabulary] += raw[0].sum(0)
        weight = _select_cell_head(self.head, cell).weight
        if weight is None:
            if of_hidden is not None:
                of_hidden[cell, rows, : self.vocabulary] = raw[0]
            return
        total = raw.new_zeros(hidden.shape)
        for span in self.arithmetic.split_rows(weight):
            if of_hidden is not None:
                self.arithmetic.multiply(raw[..., span], weight[:, span], total, accumulate=True)
            if of_weight is not None:
                part = of_weight.view(-1, *of_weight.shape[-2:])[cell : cell + 1, : self.vocabulary][:, span]
                self.arithmetic.multiply(raw[..., span].mT, hidden, part, accumulate=True)
        if of_hidden is not None:
            of_hidden[cell, rows] = total[0]


def _select_cell_head(head: Projection, cell: int) -> Projection:
    """A packed head's part, still with a cell axis; a bias may be common to all cells."""
    one = slice(cell, cell + 1)
    weight = None if head.weight is None else head.weight[one]
    bias = head.bias if head.bias is None or len(head.bias) == 1 else head.bias[one]
    return replace(head, weight=weight, bias=bias)


def _is_trl_computable(student: Tensor, head: Projection, arguments: _LossArguments) -> bool:
    """Whether TRL's kernel computes this: one cell, JSD or a KL, no float64, no infinite logits."""
    guide, divergence = arguments.teachers.get(0), arguments.terms[0][0].loss
    if not isinstance(guide, HiddenTeacherLogits) or not arguments.is_single_divergence(0):
        return False
    teacher, teacher_head = guide.hidden, guide.head
    if head.weight is None or teacher_head.weight is None or is_deepspeed_zero3_enabled():
        return False
    if len(student) != 1 or len(teacher) != 1 or head.weight.dim() != 2:
        return False
    if not isinstance(divergence, Divergence) or divergence.kind != "jsd":
        return False
    same = divergence.student_temperature == divergence.teacher_temperature
    tensors = (student, teacher, head.weight, teacher_head.weight)
    return (
        (same or teacher_head.softcap is None)
        and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
        and all(bias is None or bool(bias.isfinite().all()) for bias in (head.bias, teacher_head.bias))
    )


def _compute_by_trl(student: Tensor, head: Projection, arguments: _LossArguments) -> CellLosses:
    """The same by TRL's kernel, which projects each chunk again in the backward pass."""
    ((term,),), vocabulary = arguments.terms, _shared_vocabulary(student, head, arguments)
    divergence, guide = term.loss, arguments.teachers[0]
    assert isinstance(divergence, Divergence) and isinstance(guide, HiddenTeacherLogits)
    teacher, student_head, teacher_head = (
        guide.hidden,
        head.truncate_vocabulary(vocabulary),
        guide.head.truncate_vocabulary(vocabulary),
    )
    used = arguments.weights[0].nonzero()[:, 0]
    # It has one temperature: a scale on the teacher's logits makes up the difference.
    ratio = divergence.student_temperature / divergence.teacher_temperature
    values, entropies = ChunkedDivergenceFunction.apply(
        student[0, used],
        student_head.weight,
        student_head.bias,
        teacher[0, used],
        teacher_head.weight,
        teacher_head.bias,
        divergence.beta,
        divergence.student_temperature,
        head.scale,
        head.softcap,
        teacher_head.scale * ratio,
        teacher_head.softcap,
    )
    weights = arguments.weights[0, used].to(values.dtype)
    value = divergence.factor * values.clamp_min(0) @ weights
    entropy = entropies.detach() @ (weights > 0).to(values.dtype)
    loss = term.weight * value
    return CellLosses(loss[None], entropy[None], loss.detach()[None, None])
