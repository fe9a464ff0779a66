"""Divergences from hidden states and heads, without the logits of all tokens ever being there at once.

The gradients of the hidden states and of the head are made in the forward pass, chunk by chunk, so that each
head is projected once; the backward pass only multiplies them by what comes in.

Shapes: K cells, M blocks of teacher rows, N tokens of a cell, n of them in a chunk, V vocabulary, H width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from gkd_lab.distill.divergence import Divergence
from gkd_lab.distill.objectives import (
    CrossEntropy,
    Measure,
    Term,
    Terms,
    reads_labels,
    reads_teacher,
    terms_of,
)
from gkd_lab.models.projection import Arithmetic, Projection

CHUNK_BYTES = 128 * 2**20
"""Size of a chunk's logits, those of a student and of the teacher together."""
SLICE_BYTES = 2**20
"""Size of the logits that a CPU turns into gradients at once, so that temporaries stay in its cache."""


@dataclass(frozen=True)
class CellSums:
    """What `divergence_sums` returns.

    losses: (K,), differentiable by the student's hidden states and by the weight and bias of its head.
    entropies: (K,), the student's entropy in nats, summed over the tokens with a weight above 0; no gradient.
    terms: (K, most terms of a cell), what each term adds to the loss; no gradient.
    """

    losses: Tensor
    entropies: Tensor
    terms: Tensor


@dataclass(frozen=True)
class _Call:
    """The arguments of `divergence_sums` that take no gradient."""

    teacher: Tensor | None
    teacher_head: Projection | None
    block_of_cell: tuple[int, ...]
    objectives: tuple[Terms, ...]
    weights: Tensor
    labels: Tensor | None
    vocabulary: int | None

    def is_one_divergence(self, cell: int) -> bool:
        """Whether the cell's loss is a divergence and nothing else."""
        terms = self.objectives[cell]
        return len(terms) == 1 and isinstance(terms[0].measure, Divergence)


def divergence_sums(
    student: Tensor,
    student_head: Projection,
    teacher: Tensor | None,
    teacher_head: Projection | None,
    block_of_cell: Sequence[int],
    divergences: Sequence[Measure | Sequence[Term]],
    weights: Tensor,
    *,
    labels: Tensor | None = None,
    vocabulary: int | None = None,
) -> CellSums:
    """Sum over tokens of weight * divergence, for each cell, or of a weighted list of terms.

    student: (K, N, H_s) last hidden states, any float dtype; its head's weight: (K, V, H_s), or (V, H_s).
    teacher: (M, N, H_t), M distinct blocks of rows, without gradient; its head's weight (V_t, H_t). None
        if no term compares with it.
    block_of_cell: for each cell its block, in range(M). divergences: a measure or its terms for each cell.
    weights: (K, N); 0 where nothing is trained. They take no gradient.
    labels: (K, N), the tokens themselves, for terms that read them.
    vocabulary: only so many first rows of both heads count, and probabilities are normalised over these;
        default: those that both have.

    Logits are float32 (float64 if hidden states are), also under autocast and for heads in bfloat16. The
    losses can be propagated back once. Raises ValueError for shapes that do not fit together.
    """
    objectives = tuple(terms_of(one) for one in divergences)
    call = _Call(teacher, teacher_head, tuple(block_of_cell), objectives, weights, labels, vocabulary)
    _check(student, student_head, call)
    # On CUDA TRL's kernel is fused Triton and keeps no temporaries. On a CPU it is plain PyTorch and projects
    # each head two or three times, ours once: 62 to 91 s and 2,825 MiB or more against 21 to 24 s and 148 MiB
    # at N = 2,048, V = 151,936, H = 512, fp32, one thread (benchmarks/loss.py).
    if student.is_cuda and _fits_trl(student, student_head, call):
        return _trl_sums(student, student_head, call)
    return _own_sums(student, student_head, call)


def _check(student: Tensor, head: Projection, call: _Call) -> None:
    cells, tokens = student.shape[:2]
    blocks = len(student if call.teacher is None else call.teacher)
    of_teacher = (blocks, tokens, 0) if call.teacher is None else tuple(call.teacher.shape)
    if of_teacher[:2] != (blocks, tokens) or call.weights.shape != (cells, tokens):
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {of_teacher} and weights "
            f"{tuple(call.weights.shape)} must be (K, N, H_s), (M, N, H_t) and (K, N)"
        )
    if len(call.block_of_cell) != cells or len(call.objectives) != cells:
        raise ValueError(
            f"{len(call.block_of_cell)} blocks and {len(call.objectives)} divergences for {cells} cells: "
            "give one of each a cell"
        )
    if call.teacher is None and any(reads_teacher(terms) for terms in call.objectives):
        raise ValueError("a divergence compares with a teacher: give its hidden states and head")
    if call.labels is None and any(reads_labels(terms) for terms in call.objectives):
        raise ValueError("cross-entropy reads the tokens themselves: give them as labels, (K, N)")
    if not set(call.block_of_cell) <= set(range(blocks)):
        raise ValueError(
            f"block_of_cell {call.block_of_cell} must lie in range({blocks}), the teacher's blocks"
        )
    if cells > 1 and head.weight is not None and head.weight.dim() != 3:
        raise ValueError(f"{cells} packed students need a head (K, V, H), got {tuple(head.weight.shape)}")
    if cells > 1 and head.bias is not None and head.bias.requires_grad and head.bias.shape[0] != cells:
        raise ValueError(f"{cells} packed students need a bias (K, V), got {tuple(head.bias.shape)}")
    of_teacher_head = None if call.teacher_head is None else call.teacher_head.weight
    for name, weight in (("student", head.weight), ("teacher", of_teacher_head)):
        if isinstance(weight, DTensor):
            raise ValueError(f"the {name}'s head is sharded as {weight.placements}: pass the full tensor")


def _own_sums(student: Tensor, head: Projection, call: _Call) -> CellSums:
    tensors = (student, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if any(wanted):
        return CellSums(*_Sums.apply(*tensors, replace(head, weight=None, bias=None), call, wanted))
    return _walk(student, head, call, wanted)[0]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Projection,
        call: _Call,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (student, weight, bias)]
        head = replace(head, weight=weight, bias=bias)
        sums, ctx.gradients = _walk(student, head, call, wanted)
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
            None if gradient is None else _times(gradient, incoming).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*whole, None, None, None)


def _times(gradient: Tensor, incoming: Tensor) -> Tensor:
    """A gradient of K cells' losses times what comes in for each, in place."""
    if len(incoming) == 1:
        return gradient.mul_(incoming[0])
    return gradient.mul_(incoming.view(-1, *[1] * (gradient.dim() - 1)))


def _walk(
    student: Tensor, head: Projection, call: _Call, wanted: Sequence[bool]
) -> tuple[CellSums, list[Tensor | None]]:
    """The sums, and the wanted ones of (student, weight, bias)'s gradients."""
    other = student if call.teacher is None else call.teacher
    wide = torch.promote_types(torch.promote_types(student.dtype, other.dtype), torch.float32)
    arithmetics = Arithmetic.of(student, wide), Arithmetic.of(other, wide)
    with (
        torch.no_grad(),
        torch.autocast(student.device.type, enabled=False),
        maybe_gather_lm_head_ctx(*_parameters(head)),
        maybe_gather_lm_head_ctx(*_parameters(call.teacher_head)),
    ):
        walk = _Walk(student, head, call, wanted, arithmetics)
        for block in sorted(set(call.block_of_cell)):
            walk.add_block(block)
    return CellSums(walk.losses, walk.entropies, walk.terms), walk.gradients


def _parameters(head: Projection | None) -> list[torch.nn.Parameter]:
    if head is None:
        return []
    return [tensor for tensor in (head.weight, head.bias) if isinstance(tensor, torch.nn.Parameter)]


def _vocabulary(student: Tensor, head: Projection, call: _Call) -> int:
    shared = head.rows(student)
    if call.teacher is not None and call.teacher_head is not None:
        shared = min(shared, call.teacher_head.rows(call.teacher))
    if call.vocabulary is not None and not 0 < call.vocabulary <= shared:
        raise ValueError(f"vocabulary {call.vocabulary} is not in 1 to {shared}, what both heads have")
    return shared if call.vocabulary is None else call.vocabulary


class _Walk:
    """What is summed over cells and chunks of tokens, and two buffers with the logits of a chunk."""

    def __init__(
        self,
        student: Tensor,
        head: Projection,
        call: _Call,
        wanted: Sequence[bool],
        arithmetics: tuple[Arithmetic, Arithmetic],
    ) -> None:
        self.student, self.call = student, call
        self.vocabulary = _vocabulary(student, head, call)
        self.head = head.packed().first(self.vocabulary)
        self.teacher_head = call.teacher_head and call.teacher_head.packed().first(self.vocabulary)
        self.with_student, self.with_teacher = arithmetics
        wide = self.with_student.results
        self.weights = call.weights.to(wide)
        self.losses, self.entropies = student.new_zeros(2, len(student), dtype=wide)
        most = max(len(terms) for terms in call.objectives)
        self.terms = student.new_zeros(len(student), most, dtype=wide)
        self.gradients = [
            torch.zeros_like(tensor, dtype=wide) if want and tensor is not None else None
            for want, tensor in zip(wanted, (student, head.weight, head.bias), strict=True)
        ]
        self.size = max(CHUNK_BYTES // (2 * self.vocabulary * self.losses.element_size()), 1)
        longest = min(self.size, call.weights.shape[1])
        self.raw, self.target = (student.new_empty(longest * self.vocabulary, dtype=wide) for _ in range(2))

    def add_block(self, block: int) -> None:
        """Add the cells that share the teacher's rows `block`, whose logits are made once.

        Cells are projected one by one and only where they are trained: a batched product over all would let
        the tokens of one cell change the rounding of another's.
        """
        cells = [cell for cell, of_cell in enumerate(self.call.block_of_cell) if of_cell == block]
        used = self.weights[cells].ne(0).any(0).nonzero()[:, 0]
        for rows in used.split(self.size) if len(used) else ():
            target = self._of_teacher(block, rows)
            for cell in cells:
                self._add(cell, rows, target)

    def _of_teacher(self, block: int, rows: Tensor) -> Tensor | None:
        """The teacher's logits, (n, V)."""
        if self.call.teacher is None or self.teacher_head is None:
            return None
        hidden = self.call.teacher[block, rows][None]
        raw = _project(hidden, self.teacher_head, self.vocabulary, self.with_teacher, self.target)
        return self.teacher_head.logits(raw)[0]

    def _add(self, cell: int, rows: Tensor, target: Tensor | None) -> None:
        """Add a cell's tokens `rows` to all sums."""
        hidden, head = self.student[cell, rows][None], _of_cell(self.head, cell)
        raw = _project(hidden, head, self.vocabulary, self.with_student, self.raw)
        labels = None if self.call.labels is None else self.call.labels[cell, rows]
        self._reduce(cell, raw[0], target, labels, self.weights[cell, rows])
        self._add_gradients(cell, rows, hidden, raw)

    def _reduce(
        self, cell: int, raw: Tensor, teacher: Tensor | None, labels: Tensor | None, weights: Tensor
    ) -> None:
        """Add the values of a cell's tokens; replace `raw` by their gradient."""
        keep = any(g is not None for g in self.gradients)
        size = len(raw) if raw.is_cuda else max(SLICE_BYTES // (raw.shape[1] * raw.element_size()), 1)
        for first in range(0, len(raw), size):
            some = slice(first, first + size)
            part, weight = raw[some], weights[some]
            logits = self.head.logits(part)
            gradient = self._sum_terms(
                cell,
                logits,
                None if teacher is None else teacher[some],
                None if labels is None else labels[some],
                weight,
            )
            if keep:
                torch.mul(self.head.raw_gradient(gradient, logits), weight[:, None], out=part)

    def _sum_terms(
        self, cell: int, logits: Tensor, teacher: Tensor | None, labels: Tensor | None, weight: Tensor
    ) -> Tensor:
        """Add the terms' values of some tokens; their weighted gradient by the logits, (n, V)."""
        total: Tensor | None = None
        for n, term in enumerate(self.call.objectives[cell]):
            if not term.weight and n > 0:
                continue
            other = labels if isinstance(term.measure, CrossEntropy) else teacher
            assert other is not None, "checked beforehand"
            values, gradient, entropies = term.measure.value_and_gradient(logits, other)
            if n == 0:
                self.entropies[cell] += entropies @ (weight > 0).to(entropies.dtype)
            value = values @ weight
            if term.weight != 1:
                value, gradient = term.weight * value, gradient.mul_(term.weight)
            self.terms[cell, n] += value
            self.losses[cell] += value
            total = gradient if total is None else total.add_(gradient)
        assert total is not None, "a loss has a term"
        return total

    def _add_gradients(self, cell: int, rows: Tensor, hidden: Tensor, raw: Tensor) -> None:
        """`raw` is the loss's gradient by h W^T + b, (1, n, V)."""
        of_hidden, of_weight, of_bias = self.gradients
        if of_bias is not None:
            rows_of_bias = of_bias.view(-1, of_bias.shape[-1])
            rows_of_bias[cell % len(rows_of_bias), : self.vocabulary] += raw[0].sum(0)
        weight = _of_cell(self.head, cell).weight
        if weight is None:
            if of_hidden is not None:
                of_hidden[cell, rows, : self.vocabulary] = raw[0]
            return
        total = raw.new_zeros(hidden.shape)
        for span in self.with_student.spans(weight):
            if of_hidden is not None:
                self.with_student.multiply(raw[..., span], weight[:, span], total, add=True)
            if of_weight is not None:
                part = of_weight.view(-1, *of_weight.shape[-2:])[cell : cell + 1, : self.vocabulary][:, span]
                self.with_student.multiply(raw[..., span].mT, hidden, part, add=True)
        if of_hidden is not None:
            of_hidden[cell, rows] = total[0]


def _of_cell(head: Projection, cell: int) -> Projection:
    """A packed head's part, still with a cell axis; a bias may be common to all cells."""
    one = slice(cell, cell + 1)
    weight = None if head.weight is None else head.weight[one]
    bias = head.bias if head.bias is None or len(head.bias) == 1 else head.bias[one]
    return replace(head, weight=weight, bias=bias)


def _project(
    hidden: Tensor, head: Projection, vocabulary: int, arithmetic: Arithmetic, buffer: Tensor
) -> Tensor:
    """h W^T + b of (K, n, H) hidden states, (K, n, V), in the beginning of the buffer."""
    raw = buffer[: hidden.shape[0] * hidden.shape[1] * vocabulary].view(*hidden.shape[:2], vocabulary)
    if head.weight is None:
        raw.copy_(hidden[..., :vocabulary])
    else:
        for span in arithmetic.spans(head.weight):
            arithmetic.multiply(hidden, head.weight[:, span].mT, raw[..., span])
    return raw if head.bias is None else raw.add_(head.bias[:, None])


def _fits_trl(student: Tensor, head: Projection, call: _Call) -> bool:
    """Whether TRL's kernel computes this: one cell, JSD or a KL, no float64, no infinite logits."""
    teacher, teacher_head, divergence = call.teacher, call.teacher_head, call.objectives[0][0].measure
    if teacher is None or teacher_head is None or not call.is_one_divergence(0):
        return False
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


def _trl_sums(student: Tensor, head: Projection, call: _Call) -> CellSums:
    """The same by TRL's kernel, which projects each chunk again in the backward pass."""
    ((term,),), vocabulary = call.objectives, _vocabulary(student, head, call)
    divergence, teacher = term.measure, call.teacher
    assert isinstance(divergence, Divergence) and teacher is not None and call.teacher_head is not None
    student_head, teacher_head = head.first(vocabulary), call.teacher_head.first(vocabulary)
    used = call.weights[0].nonzero()[:, 0]
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
    weights = call.weights[0, used].to(values.dtype)
    value = divergence.factor * values.clamp_min(0) @ weights
    entropy = entropies.detach() @ (weights > 0).to(values.dtype)
    loss = term.weight * value
    return CellSums(loss[None], entropy[None], loss.detach()[None, None])
