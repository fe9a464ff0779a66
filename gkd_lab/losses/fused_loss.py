"""The loss of all cells from hidden states and heads, chunk by chunk, so that few logits exist at once.

The forward pass computes the gradients of hidden states and head, so that each head is projected once; the
backward pass only multiplies them by the incoming gradient.

Shapes: K cells, M blocks of teacher rows, N tokens of a cell, n of them in a chunk, V vocabulary, H width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from gkd_lab.losses.cell_losses import CellLosses, LossArguments, check_shapes, shared_vocabulary
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.loss import LabelLoss, Loss, TeacherLoss
from gkd_lab.losses.teacher_targets import (
    HiddenTeacherLogits,
    LogitReader,
    TeacherLogits,
    TeacherTarget,
    project_hidden,
)
from gkd_lab.losses.terms import WeightedLoss, list_terms
from gkd_lab.models.projection import MatmulPrecision, Projection

CHUNK_BYTES = 128 * 2**20
"""Memory of a chunk's logits, of a student and its teachers together."""
SLICE_BYTES = 2**20
"""Memory of the logits that a CPU turns into gradients at once, so that temporaries stay in its cache."""


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
    """Return `CellLosses`: per cell sum(weight * loss) over tokens and terms, the entropy, each term's part.

    student: (K, N, H_s) last hidden states, any float dtype; its head's weight: (K, V, H_s), or (V, H_s).
    teacher: (M, N, H_t), M distinct blocks of rows, without gradient; its head's weight (V_t, H_t). None
        if no term compares with it.
    block_of_cell: for each cell its block, in range(M). terms: for each cell a loss, or a list of terms.
    weights: (K, N); 0 where nothing is trained. They take no gradient.
    teachers: by number, where there are several or they have no hidden states; `teacher` is number 0.
    labels: (K, N), the tokens themselves, for terms that read them.
    routes: (M, N), the number of each token's teacher, for routed targets.
    scales: (cell, number of the term) -> (N,), a factor on the weights in this term.
    vocabulary: probabilities are normalised over so many first tokens; default: those of all heads.

    Logits are float32 (float64 if hidden states are), also under autocast and for heads in bfloat16. The
    losses can be propagated back once. Raises ValueError for shapes that do not fit together.
    """
    all_teachers = dict(teachers or {})
    if teacher is not None and teacher_head is not None:
        all_teachers[0] = HiddenTeacherLogits(teacher, teacher_head)
    arguments = LossArguments(
        teachers=all_teachers,
        block_of_cell=tuple(block_of_cell),
        terms=tuple(list_terms(terms_of_cell) for terms_of_cell in terms),
        weights=weights,
        labels=labels,
        routes=routes,
        scales=scales or {},
        vocabulary=vocabulary,
    )
    check_shapes(student, student_head, arguments)
    # On CUDA TRL's kernel is fused Triton and keeps no temporaries. On a CPU it is plain PyTorch and projects
    # each head two or three times, ours once: 62 to 91 s and 2,825 MiB or more against 21 to 24 s and 148 MiB
    # at N = 2,048, V = 151,936, H = 512, fp32, one thread (benchmarks/loss.py).
    if student.is_cuda and _is_trl_computable(student, student_head, arguments):
        return _compute_by_trl(student, student_head, arguments)
    return _compute_in_chunks(student, student_head, arguments)


def _compute_in_chunks(student: Tensor, head: Projection, arguments: LossArguments) -> CellLosses:
    """Return the losses by our chunked code, differentiable if any tensor of the student needs a gradient."""
    tensors = (student, head.weight, head.bias)
    needs_gradient = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if any(needs_gradient):
        return CellLosses(
            *_FusedLoss.apply(*tensors, replace(head, weight=None, bias=None), arguments, needs_gradient)
        )
    return _sum_chunks(student, head, arguments, needs_gradient)[0]


class _FusedLoss(torch.autograd.Function):
    """Losses, entropies and terms; gradients of (student, weight, bias) are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Projection,
        arguments: LossArguments,
        needs_gradient: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses, entropies and terms; keep gradients of student, weight and bias in `ctx`."""
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (student, weight, bias)]
        head = replace(head, weight=weight, bias=bias)
        sums, ctx.gradients = _sum_chunks(student, head, arguments, needs_gradient)
        ctx.mark_non_differentiable(sums.entropies, sums.terms)
        return sums.losses, sums.entropies, sums.terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times each cell's incoming one; RuntimeError on a second call."""
        if ctx.gradients is None:
            raise RuntimeError(
                "compute_cell_losses computes gradients in the forward pass and frees them in the first "
                "backward pass: call it again for a second one"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else _scale_by_cell(gradient, incoming).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _scale_by_cell(gradient: Tensor, incoming: Tensor) -> Tensor:
    """Multiply a gradient, whose first axis is the cell, in place by each cell's incoming gradient, (K,).

    With a single cell there need be no such axis.
    """
    if len(incoming) == 1:
        return gradient.mul_(incoming[0])
    return gradient.mul_(incoming.view(-1, *[1] * (gradient.dim() - 1)))


def _sum_chunks(
    student: Tensor, head: Projection, arguments: LossArguments, needs_gradient: Sequence[bool]
) -> tuple[CellLosses, list[Tensor | None]]:
    """Return all cells' losses, and the gradients of student, weight and bias, None where not needed."""
    wide = torch.promote_types(student.dtype, torch.float32)
    teachers = arguments.teachers.values()
    for teacher in teachers:
        wide = torch.promote_types(wide, teacher.dtype)
    teacher_heads = [teacher.head for teacher in teachers if isinstance(teacher, HiddenTeacherLogits)]
    arithmetic = MatmulPrecision.create(student, wide)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for any_head in (head, *teacher_heads):
            stack.enter_context(maybe_gather_lm_head_ctx(*_head_parameters(any_head)))
        readers = _TeacherReaders(arguments, shared_vocabulary(student, head, arguments), wide)
        stack.enter_context(torch.autocast(student.device.type, enabled=False))
        sums = _ChunkSums(student, head, arguments, needs_gradient, arithmetic, readers)
        for block in sorted(set(arguments.block_of_cell)):
            sums.add_block(block)
    return CellLosses(sums.losses, sums.entropies, sums.terms), sums.gradients


def _head_parameters(head: Projection) -> list[torch.nn.Parameter]:
    """Return those of the head's weight and bias that are an `nn.Parameter`."""
    return [tensor for tensor in (head.weight, head.bias) if isinstance(tensor, torch.nn.Parameter)]


class _TeacherReaders:
    """Reads the teachers' logits chunk by chunk, in the arithmetic of the context that creates it."""

    def __init__(self, arguments: LossArguments, vocabulary: int, dtype: torch.dtype) -> None:
        self.arguments, self.vocabulary = arguments, vocabulary
        self.targets = [
            [term.target for _, term in arguments.logit_terms(cell) if isinstance(term.loss, TeacherLoss)]
            for cell in range(len(arguments.terms))
        ]
        bytes_of_token = (1 + max(1, len(arguments.teachers))) * vocabulary * dtype.itemsize
        self.chunk_size = max(CHUNK_BYTES // bytes_of_token, 1)
        longest = min(self.chunk_size, arguments.weights.shape[1])
        self.readers: dict[int, LogitReader] = {
            number: teacher.create_reader(vocabulary, dtype, longest)
            for number, teacher in arguments.teachers.items()
        }

    def target_logits(self, block: int, rows: Tensor, cells: Sequence[int]) -> dict[TeacherTarget, Tensor]:
        """Return target -> logits (n, V) at a block's `rows`, for these cells; each teacher is read once."""
        logits: dict[int, Tensor] = {}

        def read_teacher(number: int) -> Tensor:
            """Return a teacher's logits (n, V) at these rows, computed at its first use."""
            if number not in logits:
                logits[number] = self.readers[number](block, rows)
            return logits[number]

        routes = None if self.arguments.routes is None else self.arguments.routes[block, rows]
        targets = dict.fromkeys(target for cell in cells for target in self.targets[cell])
        return {target: target.combine_logits(read_teacher, routes) for target in targets}


class _ChunkSums:
    """Sums over cells and chunks of tokens, and a buffer for a student's logits of a chunk."""

    def __init__(
        self,
        student: Tensor,
        head: Projection,
        arguments: LossArguments,
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
        max_terms = max(len(terms) for terms in arguments.terms)
        self.terms = student.new_zeros(len(student), max_terms, dtype=wide)
        self.gradients = [
            torch.zeros_like(tensor, dtype=wide) if needed and tensor is not None else None
            for needed, tensor in zip(needs_gradient, (student, head.weight, head.bias), strict=True)
        ]
        longest = min(self.chunk_size, arguments.weights.shape[1])
        self.logits_buffer = student.new_empty(longest * self.vocabulary, dtype=wide)

    def add_block(self, block: int) -> None:
        """Add the losses and gradients of the cells that train on teacher block `block`; it is read once.

        Cells are projected one by one and only where they are trained: a batched product over all would let
        the tokens of one cell change the rounding of another's.
        """
        cells = [cell for cell, number in enumerate(self.arguments.block_of_cell) if number == block]
        trained = self.weights[cells].ne(0).any(0).nonzero()[:, 0]
        for rows in trained.split(self.chunk_size) if len(trained) else ():
            targets = self.readers.target_logits(block, rows, cells)
            for cell in cells:
                self._add_chunk(cell, rows, targets)

    def _add_chunk(self, cell: int, rows: Tensor, targets: Mapping[TeacherTarget, Tensor]) -> None:
        """Add the losses and gradients of a cell's tokens `rows` to the sums."""
        hidden, head = self.student[cell, rows][None], _select_cell_head(self.head, cell)
        raw = project_hidden(hidden, head, self.vocabulary, self.arithmetic, self.logits_buffer)
        self._replace_logits_by_gradient(cell, raw[0], rows, targets)
        self._add_parameter_gradients(cell, rows, hidden, raw)

    def _replace_logits_by_gradient(
        self, cell: int, raw: Tensor, rows: Tensor, targets: Mapping[TeacherTarget, Tensor]
    ) -> None:
        """Add the loss of a cell's tokens `rows`; overwrite `raw`, h W^T + b, (n, V), with its gradient.

        Nothing is written if no gradient is needed.
        """
        is_trained = any(gradient is not None for gradient in self.gradients)
        size = len(raw) if raw.is_cuda else max(SLICE_BYTES // (raw.shape[1] * raw.element_size()), 1)
        for first in range(0, len(raw), size):
            chunk_slice = slice(first, first + size)
            part, weight = raw[chunk_slice], self.weights[cell, rows[chunk_slice]]
            logits = self.head.scale_and_cap(part)
            gradient = self._add_term_values(cell, logits, rows[chunk_slice], chunk_slice, targets, weight)
            if is_trained:
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
        """Add all terms' values at the tokens `rows`; return their gradient by the logits, (n, V).

        The gradient has the terms' weights and scales, not yet the tokens' weights. chunk_slice: the position
        of `rows` in the chunk of the targets.
        """
        total: Tensor | None = None
        for order, (number, term) in enumerate(self.logit_terms[cell]):
            values, gradient, entropies = self._evaluate_term(cell, term, logits, rows, chunk_slice, targets)
            if order == 0:
                self.entropies[cell] += entropies @ (weight > 0).to(entropies.dtype)
            scale = self.arguments.scales.get((cell, number))
            if scale is not None:
                factor = scale[rows].to(values.dtype)
                values, gradient = values * factor, gradient.mul_(factor[:, None])
            value = values @ weight
            if term.weight != 1:
                value, gradient = term.weight * value, gradient.mul_(term.weight)
            self.terms[cell, number] += value
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
        """Return a term's values, (n,), gradient, (n, V), and entropies, (n,), all before weights."""
        if isinstance(term.loss, TeacherLoss):
            return term.loss.value_and_gradient(logits, targets[term.target][chunk_slice])
        assert isinstance(term.loss, LabelLoss)
        if self.arguments.labels is None:
            # The term has weight 0 and gives the entropy alone: any labels will do.
            return term.loss.value_and_gradient(logits, torch.zeros_like(rows))
        return term.loss.value_and_gradient(logits, self.arguments.labels[cell, rows])

    def _add_parameter_gradients(self, cell: int, rows: Tensor, hidden: Tensor, raw: Tensor) -> None:
        """Add a chunk's gradients of hidden states, weight and bias, where needed, to the cell's sums.

        raw: the gradient by h W^T + b, (1, n, V).
        """
        hidden_gradient, weight_gradient, bias_gradient = self.gradients
        if bias_gradient is not None:
            bias_rows = bias_gradient.view(-1, bias_gradient.shape[-1])
            bias_rows[cell % len(bias_rows), : self.vocabulary] += raw[0].sum(0)
        weight = _select_cell_head(self.head, cell).weight
        if weight is None:
            if hidden_gradient is not None:
                hidden_gradient[cell, rows, : self.vocabulary] = raw[0]
            return
        total = raw.new_zeros(hidden.shape)
        for span in self.arithmetic.split_rows(weight):
            if hidden_gradient is not None:
                self.arithmetic.multiply(raw[..., span], weight[:, span], total, accumulate=True)
            if weight_gradient is not None:
                part = weight_gradient.view(-1, *weight_gradient.shape[-2:])[
                    cell : cell + 1, : self.vocabulary
                ][:, span]
                self.arithmetic.multiply(raw[..., span].mT, hidden, part, accumulate=True)
        if hidden_gradient is not None:
            hidden_gradient[cell, rows] = total[0]


def _select_cell_head(head: Projection, cell: int) -> Projection:
    """Return one cell's head with a cell axis of size 1; a bias common to all cells is kept."""
    cells = slice(cell, cell + 1)
    weight = None if head.weight is None else head.weight[cells]
    bias = head.bias if head.bias is None or len(head.bias) == 1 else head.bias[cells]
    return replace(head, weight=weight, bias=bias)


def _is_trl_computable(student: Tensor, head: Projection, arguments: LossArguments) -> bool:
    """Whether TRL's kernel can compute this: one cell, one JSD or KL, no float64, no infinite bias."""
    first_teacher, divergence = arguments.teachers.get(0), arguments.terms[0][0].loss
    if not isinstance(first_teacher, HiddenTeacherLogits) or not arguments.is_single_divergence(0):
        return False
    teacher, teacher_head = first_teacher.hidden, first_teacher.head
    if head.weight is None or teacher_head.weight is None or is_deepspeed_zero3_enabled():
        return False
    if len(student) != 1 or len(teacher) != 1 or head.weight.dim() != 2:
        return False
    if not isinstance(divergence, Divergence) or divergence.kind != "jsd":
        return False
    same_temperature = divergence.student_temperature == divergence.teacher_temperature
    tensors = (student, teacher, head.weight, teacher_head.weight)
    return (
        (same_temperature or teacher_head.softcap is None)
        and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
        and all(bias is None or bool(bias.isfinite().all()) for bias in (head.bias, teacher_head.bias))
    )


def _compute_by_trl(student: Tensor, head: Projection, arguments: LossArguments) -> CellLosses:
    """Return the single cell's losses by TRL's kernel, which projects again in the backward pass."""
    ((term,),), vocabulary = arguments.terms, shared_vocabulary(student, head, arguments)
    divergence, first_teacher = term.loss, arguments.teachers[0]
    assert isinstance(divergence, Divergence) and isinstance(first_teacher, HiddenTeacherLogits)
    student_head = head.truncate_vocabulary(vocabulary)
    teacher_head = first_teacher.head.truncate_vocabulary(vocabulary)
    trained = arguments.weights[0].nonzero()[:, 0]
    # The kernel has one temperature: a scale on the teacher's logits makes up the difference.
    ratio = divergence.student_temperature / divergence.teacher_temperature
    values, entropies = ChunkedDivergenceFunction.apply(
        student[0, trained],
        student_head.weight,
        student_head.bias,
        first_teacher.hidden[0, trained],
        teacher_head.weight,
        teacher_head.bias,
        divergence.beta,
        divergence.student_temperature,
        head.scale,
        head.softcap,
        teacher_head.scale * ratio,
        teacher_head.softcap,
    )
    weights = arguments.weights[0, trained].to(values.dtype)
    # Rounding makes small values of the kernel negative; the clamp must not stop their gradients.
    values = values + values.detach().clamp_max(0).neg()
    value = divergence.factor * values @ weights
    entropy = entropies.detach() @ (weights > 0).to(values.dtype)
    loss = term.weight * value
    return CellLosses(loss[None], entropy[None], loss.detach()[None, None])
