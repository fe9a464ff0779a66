"""Universal logit distillation: a teacher and a student that do not speak of the same tokens.

Both have read the same text; what they say of it next is compared by size alone, largest probability with
largest (Boizard et al. 2024, arXiv:2402.12030). Where several tokens of one side cover what is fewer of the
other, the chain rule joins them: the distribution at the last of them, times the probabilities of the tokens
before it (`bayesian` in TRL's GOLD, huggingface/trl#5905).

Shapes: B rows of a cell, C completion tokens of the student's, D of the teacher's, G spans in a chunk, n of a
side's tokens in them, V vocabulary of a side, H width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from gkd_lab.losses.auxiliary_losses import AuxiliaryLoss, AuxiliaryModule, LossInputs
from gkd_lab.losses.divergence import log_probabilities
from gkd_lab.losses.teacher_targets import TeacherLogits
from gkd_lab.losses.token_spans import Span
from gkd_lab.models.forward import Sequences
from gkd_lab.models.projection import Projection

CHUNK_BYTES = 128 * 2**20
"""Size of the logits of a chunk of spans, those of both sides together."""


@dataclass(frozen=True)
class TextTeacherLogits:
    """What a teacher made of the texts of a cell's rows.

    guide: its distributions for one block of B * D tokens. ids: (B, D), its own tokens. spans: of each row.
    """

    logits: TeacherLogits
    ids: Tensor
    spans: Sequence[Sequence[Span]]


class TextReader(Protocol):
    """A teacher that reads texts, in whatever tokens."""

    def activate(self) -> AbstractContextManager[Any]:
        """Its weights are on the device within."""
        ...

    def read_rows(self, rows: Sequences) -> TextTeacherLogits:
        """What it makes of the texts of a student's rows, without gradient."""
        ...


@dataclass(frozen=True)
class ULD(AuxiliaryLoss):
    """L1 distance of the sorted probabilities, the shorter side's with zeros behind: mean over a row's spans.

    Spans share their row's weight evenly, so that with one tokenizer each token has its own. It knows how
    sure a teacher is, not of what: put cross-entropy beside it, as the paper does.
    """

    kind: ClassVar[str] = "uld"
    reads_teacher: ClassVar[bool] = False
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"uld: {name} {value} divides logits: choose a positive number")

    def create_module(
        self, student: PretrainedConfig, teacher: PretrainedConfig | None, seed: int
    ) -> "ULDModule":
        return ULDModule(self)


OF_ULD = ("student_temperature", "teacher_temperature")
"""Its fields in a configuration."""


class ULDModule(AuxiliaryModule):
    """The term of one cell; `teacher` is set before the first step."""

    teacher: TextReader | None = None

    def __init__(self, loss: ULD) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, inputs: LossInputs) -> Tensor:
        """The term's value, (); gradients are made here, while the teacher is at work."""
        if self.teacher is None:
            raise ValueError("uld reads texts with a teacher of its own: give the module's `teacher` first")
        with self.teacher.activate():
            reading = self.teacher.read_rows(inputs.rows)
            return sum_span_distances(self.loss, inputs, reading)


@dataclass(frozen=True)
class _SideTokens:
    """Tokens of one side in a chunk: places in the flat rows, (n,), their ids, and each one's span."""

    positions: Tensor
    ids: Tensor
    span: Tensor

    @property
    def is_span_end(self) -> Tensor:
        """(n,), of each span's last token."""
        following = self.span.roll(-1)
        following[-1] = -1
        return following != self.span

    def join_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Each span's, (G, V): what may stand as its last token, times the probability of those before it."""
        logs, last = log_probabilities(logits, temperature), self.is_span_end
        before = logs.gather(1, self.ids[:, None])[:, 0].masked_fill(last, 0)
        chain = before.new_zeros(int(last.sum())).index_add(0, self.span, before)
        return (logs[last] + chain[:, None]).exp()


@dataclass(frozen=True)
class _Chunk:
    student: _SideTokens
    teacher: _SideTokens
    weights: Tensor
    """(G,)"""


def sum_span_distances(loss: ULD, inputs: LossInputs, teacher: TextTeacherLogits) -> Tensor:
    """Sum over spans of weight * distance, (), chunk by chunk; differentiable by the student's pass."""
    hidden, head = inputs.student.last_hidden, inputs.student.projection
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sizes = head.get_vocabulary_size(hidden), teacher.logits.vocabulary
    chunks = list(_iterate_chunks(inputs, teacher, sizes, wide))
    longest = max((len(chunk.teacher.positions) for chunk in chunks), default=1)
    read = teacher.logits.create_reader(sizes[1], wide, longest)

    def value(chunk: _Chunk, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        with torch.no_grad():
            said = read(0, chunk.teacher.positions)
            target = chunk.teacher.join_probabilities(said, loss.teacher_temperature)
        rows = hidden.flatten(0, 1)[chunk.student.positions].to(wide)
        own = chunk.student.join_probabilities(
            _replace_head_weights(head, weight, bias, wide)(rows), loss.student_temperature
        )
        return sorted_l1_distance(own, target) @ chunk.weights

    tensors = (hidden, head.weight, head.bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        total: Tensor = _ChunkedSum.apply(value, chunks, *tensors)
        return total
    return sum((value(chunk, *tensors) for chunk in chunks), hidden.new_zeros((), dtype=wide))


def sorted_l1_distance(one: Tensor, other: Tensor) -> Tensor:
    """L1 distance of the sorted rows, (G, V) and (G, V') -> (G,); what one has more counts as it is."""
    first, second = (rows.sort(dim=-1, descending=True).values for rows in (one, other))
    shared = min(first.shape[-1], second.shape[-1])
    rest = first[:, shared:].sum(-1) + second[:, shared:].sum(-1)
    return (first[:, :shared] - second[:, :shared]).abs().sum(-1) + rest


def _replace_head_weights(
    head: Projection, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Projection:
    """The same head with these weights, in the dtype that logits are made in."""
    return replace(
        head,
        weight=None if weight is None else weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
    )


def _iterate_chunks(
    inputs: LossInputs, teacher: TextTeacherLogits, vocabularies: tuple[int, int], dtype: torch.dtype
) -> Iterator[_Chunk]:
    """The spans of all rows, so many at once that their logits fit."""
    rows = inputs.weights.sum(-1).to(dtype)
    ids = inputs.rows.completion_ids, teacher.ids
    found: list[tuple[int, Span]] = [(row, one) for row, spans in enumerate(teacher.spans) for one in spans]
    counts = torch.tensor([len(spans) for spans in teacher.spans], device=rows.device)
    share = rows / counts.clamp_min(1)
    for some in _group_spans(found, vocabularies, CHUNK_BYTES // dtype.itemsize):
        yield _Chunk(
            _build_side(some, 0, ids[0]), _build_side(some, 1, ids[1]), share[[row for row, _ in some]]
        )


def _group_spans(
    spans: Sequence[tuple[int, Span]], vocabularies: tuple[int, int], max_logits: int
) -> Iterator[list[tuple[int, Span]]]:
    some: list[tuple[int, Span]] = []
    used = 0
    for row, one in spans:
        cost = sum(len(tokens) * size for tokens, size in zip(one, vocabularies, strict=True))
        if some and used + cost > max_logits:
            yield some
            some, used = [], 0
        some.append((row, one))
        used += cost
    if some:
        yield some


def _build_side(spans: Sequence[tuple[int, Span]], side: int, ids: Tensor) -> _SideTokens:
    width = ids.shape[1]
    listed = [(row * width + place, n) for n, (row, one) in enumerate(spans) for place in one[side]]
    places, span = torch.tensor(listed, device=ids.device).unbind(1)
    return _SideTokens(places, ids.flatten()[places], span)


class _ChunkedSum(torch.autograd.Function):
    """A sum over chunks whose gradients are made in the forward pass, so that only one's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, chunk_value: Callable[..., Tensor], chunks: Sequence[_Chunk], *tensors: Tensor | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        own = [
            None if tensor is None else tensor.detach().requires_grad_(want)
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        assert own[0] is not None, "there are hidden states"
        total = own[0].new_zeros((), dtype=torch.promote_types(own[0].dtype, torch.float32))
        for chunk in chunks:
            with torch.enable_grad():
                part = chunk_value(chunk, *own)
            part.backward()
            total += part.detach()
        ctx.gradients = [None if tensor is None else tensor.grad for tensor in own]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        whole = (None if one is None else one * incoming.to(one.dtype) for one in ctx.gradients)
        return (None, None, *whole)
