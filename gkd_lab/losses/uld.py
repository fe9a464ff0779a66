"""Universal logit distillation: a loss between a teacher and a student with different tokenizers.

Both read the same text; their next-token probabilities are sorted and compared, the largest with the largest
(Boizard et al. 2024, arXiv:2402.12030). Where several tokens of one side cover fewer of the other, the chain
rule joins them: the distribution at the last of them, times the probabilities of the tokens before it
(`bayesian` in TRL's GOLD, huggingface/trl#5905).

Shapes: B rows of a cell, C completion tokens of the student's, D of the teacher's, G spans in a chunk, n of a
side's tokens in them, V vocabulary of a side, H width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from gkd_lab.config.loss_terms import ULDConfig
from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs
from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.losses.teacher_targets import TeacherLogits
from gkd_lab.losses.token_spans import Span
from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import Projection

CHUNK_BYTES = 128 * 2**20
"""Memory of the logits of a chunk of spans, of both sides together."""


@dataclass(frozen=True)
class TextTeacherLogits:
    """A teacher's distributions for the texts of a cell's rows.

    logits: of one block of B * D tokens. ids: (B, D), the teacher's tokens. spans: for each row, the tokens
        of both sides that cover the same stretch of text.
    """

    logits: TeacherLogits
    ids: Tensor
    spans: Sequence[Sequence[Span]]


class TextReader(Protocol):
    """A teacher that reads texts in its own tokens."""

    def activate(self) -> AbstractContextManager[Any]:
        """Return a context within which the teacher's weights are on the device."""
        ...

    def read_rows(self, rows: Sequences) -> TextTeacherLogits:
        """Return the teacher's logits and tokens for the texts of a student's rows, and the shared spans.

        Without gradient.
        """
        ...


@dataclass(frozen=True)
class ULD(AuxiliaryLoss):
    """L1 distance of the sorted probabilities, the shorter side's with zeros behind: mean over a row's spans.

    Spans share their row's weight evenly, so that with one tokenizer each token has its own. It compares how
    sure a teacher is, not of which token: put cross-entropy beside it, as the paper does.
    """

    config: ULDConfig

    config_class = ULDConfig
    log_name = "uld"
    reads_teacher = False
    reads_texts = True

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> "ULDModule":
        """Return the module of one cell, without parameters; its `teacher` has to be set before use."""
        return ULDModule(self.config)


class ULDModule(AuxiliaryModule):
    """Computes the loss of one cell; `teacher` is set before the first step."""

    teacher: TextReader | None = None

    def __init__(self, config: ULDConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, inputs: LossInputs) -> Tensor:
        """Return the weighted L1 distance of sorted probabilities, (); gradients are computed in this call.

        Raises ValueError if no teacher was set.
        """
        if self.teacher is None:
            raise ValueError("uld reads texts with a teacher of its own: give the module's `teacher` first")
        with self.teacher.activate():
            return sum_span_distances(self.config, inputs, self.teacher.read_rows(inputs.rows))


@dataclass(frozen=True)
class _SideTokens:
    """Tokens of one side in a chunk, (n,): positions in the flat rows, ids, numbers of their spans."""

    positions: Tensor
    ids: Tensor
    span: Tensor

    @property
    def is_span_end(self) -> Tensor:
        """Mask of the tokens that are the last of their span, (n,)."""
        following = self.span.roll(-1)
        following[-1] = -1
        return following != self.span

    def join_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Return each span's distribution at its last token, times the others' probabilities, (G, V)."""
        logs, last = log_probabilities(logits, temperature), self.is_span_end
        before = logs.gather(1, self.ids[:, None])[:, 0].masked_fill(last, 0)
        chain = before.new_zeros(int(last.sum())).index_add(0, self.span, before)
        return (logs[last] + chain[:, None]).exp()


@dataclass(frozen=True)
class _Chunk:
    """Spans whose logits exist at once, (G,) of them."""

    student: _SideTokens
    teacher: _SideTokens
    weights: Tensor
    """Of each span in the loss, (G,)."""


def sum_span_distances(config: ULDConfig, inputs: LossInputs, teacher: TextTeacherLogits) -> Tensor:
    """Return the sum of weight * distance over all spans, (), differentiable by the student's outputs.

    Computed chunk by chunk.
    """
    hidden, head = inputs.student.last_hidden, inputs.student.projection
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sizes = head.get_vocabulary_size(hidden), teacher.logits.vocabulary
    chunks = list(_iterate_chunks(inputs, teacher, sizes, wide))
    longest = max((len(chunk.teacher.positions) for chunk in chunks), default=1)
    read = teacher.logits.create_reader(sizes[1], wide, longest)

    def sum_chunk(chunk: _Chunk, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the sum of weight * distance over one chunk's spans, (); the teacher gets no gradient."""
        with torch.no_grad():
            logits = read(0, chunk.teacher.positions)
            target = chunk.teacher.join_probabilities(logits, config.teacher_temperature)
        rows = hidden.flatten(0, 1)[chunk.student.positions].to(wide)
        logits = _replace_head_weights(head, weight, bias, wide)(rows)
        student = chunk.student.join_probabilities(logits, config.student_temperature)
        return sorted_l1_distance(student, target) @ chunk.weights

    tensors = (hidden, head.weight, head.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total: Tensor = _ChunkedSum.apply(sum_chunk, chunks, *tensors)
        return total
    return sum((sum_chunk(chunk, *tensors) for chunk in chunks), hidden.new_zeros((), dtype=wide))


def sorted_l1_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the L1 distance of the rows, sorted, (G, V), (G, V') -> (G,); the shorter is zero-padded."""
    first, second = (rows.sort(dim=-1, descending=True).values for rows in (first, second))
    shared = min(first.shape[-1], second.shape[-1])
    tail = first[:, shared:].sum(-1) + second[:, shared:].sum(-1)
    return (first[:, :shared] - second[:, :shared]).abs().sum(-1) + tail


def _replace_head_weights(
    head: Projection, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Projection:
    """Return the head with this weight and bias, cast to `dtype`; its scale and cap stay."""
    return replace(
        head,
        weight=None if weight is None else weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
    )


def _iterate_chunks(
    inputs: LossInputs, teacher: TextTeacherLogits, vocabularies: tuple[int, int], dtype: torch.dtype
) -> Iterator[_Chunk]:
    """Yield all rows' spans in chunks whose logits fit into `CHUNK_BYTES`, with each span's weight."""
    rows = inputs.weights.sum(-1).to(dtype)
    ids = inputs.rows.completion_ids, teacher.ids
    all_spans = [(row, span) for row, spans in enumerate(teacher.spans) for span in spans]
    counts = torch.tensor([len(spans) for spans in teacher.spans], device=rows.device)
    share = rows / counts.clamp_min(1)
    for spans in _group_spans(all_spans, vocabularies, CHUNK_BYTES // dtype.itemsize):
        weights = share[[row for row, _ in spans]]
        yield _Chunk(_build_side(spans, 0, ids[0]), _build_side(spans, 1, ids[1]), weights)


def _group_spans(
    spans: Sequence[tuple[int, Span]], vocabularies: tuple[int, int], max_logits: int
) -> Iterator[list[tuple[int, Span]]]:
    """Yield lists of (row, span) with `max_logits` logits at most; a larger span comes alone."""
    group: list[tuple[int, Span]] = []
    logits_in_group = 0
    for row, span in spans:
        logits = sum(len(tokens) * size for tokens, size in zip(span, vocabularies, strict=True))
        if group and logits_in_group + logits > max_logits:
            yield group
            group, logits_in_group = [], 0
        group.append((row, span))
        logits_in_group += logits
    if group:
        yield group


def _build_side(spans: Sequence[tuple[int, Span]], side: int, ids: Tensor) -> _SideTokens:
    """Return flat positions, ids and span numbers of one side's tokens in these spans (1: the teacher's).

    ids: (B, C) or (B, D).
    """
    width = ids.shape[1]
    pairs = [(row * width + token, n) for n, (row, span) in enumerate(spans) for token in span[side]]
    positions, span_numbers = torch.tensor(pairs, device=ids.device).unbind(1)
    return _SideTokens(positions, ids.flatten()[positions], span_numbers)


class _ChunkedSum(torch.autograd.Function):
    """Sum over chunks; the forward pass computes gradients, so that one chunk's logits exist at once."""

    @staticmethod
    def forward(
        ctx: Any, chunk_value: Callable[..., Tensor], chunks: Sequence[_Chunk], *tensors: Tensor | None
    ) -> Tensor:
        """Return the sum of chunk_value(chunk, *tensors) over chunks, (); keep its gradients in `ctx`."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(needs_gradient)
            for tensor, needs_gradient in zip(tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        assert leaves[0] is not None, "hidden states are always given"
        total = leaves[0].new_zeros((), dtype=torch.promote_types(leaves[0].dtype, torch.float32))
        for chunk in chunks:
            with torch.enable_grad():
                value = chunk_value(chunk, *leaves)
            value.backward()
            total += value.detach()
        ctx.gradients = [None if leaf is None else leaf.grad for leaf in leaves]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times the incoming one."""
        gradients = (None if part is None else part * incoming.to(part.dtype) for part in ctx.gradients)
        return (None, None, *gradients)
