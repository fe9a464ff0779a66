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
from gkd_lab.losses.chunk_sums import ChunkSums, TeacherReaders
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.loss import Loss
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherLogits
from gkd_lab.losses.terms import WeightedLoss, list_terms
from gkd_lab.models.projection import MatmulPrecision, Projection


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
    lengths: Sequence[int] | None = None,
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
    lengths: for each block the number of its first tokens behind which all weights are 0; None: the weights
        are read for it, which on a GPU waits for them.

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
        lengths=None if lengths is None else tuple(lengths),
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
        vocabulary = shared_vocabulary(student, head, arguments)
        sums = ChunkSums(student, head, arguments, needs_gradient, arithmetic, vocabulary)
        readers = TeacherReaders(arguments, vocabulary, wide, sums.parts)
        stack.enter_context(torch.autocast(student.device.type, enabled=False))
        for part in sums.parts:
            sums.add_part(part, readers)
    return CellLosses(sums.terms.sum(1), sums.entropies, sums.terms), sums.gradients


def _head_parameters(head: Projection) -> list[torch.nn.Parameter]:
    """Return those of the head's weight and bias that are an `nn.Parameter`."""
    return [tensor for tensor in (head.weight, head.bias) if isinstance(tensor, torch.nn.Parameter)]


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
