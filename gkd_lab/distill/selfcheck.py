"""What distillation takes for granted, measured on a user's own student, teacher and tokenizer.

Each check is a plain function of a Bench that returns a Finding; CHECKS lists them in the order of a report.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd_lab.distill.bench import NEW_TOKENS, TEXTS, Bench
from gkd_lab.distill.sampling import evaluating
from gkd_lab.distill.steps import StepBatch, cell_sums, trained_items
from gkd_lab.distill.streams import is_on_policy
from gkd_lab.models.forward import Sequences, completion_logits
from gkd_lab.models.heads import Head
from gkd_lab.models.vocabulary import head_size

WIDER = 5
"""Positions of padding that are added."""
COINS = 4000
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

PROBABILITY = 1e-4
"""Tolerance of a probability: float32 in products of other shapes moves it by about 1e-6."""
SUM = 1e-3
"""Tolerance of a loss or gradient, relative: the same float32 terms added in another order."""


@dataclass(frozen=True)
class Finding:
    """What a check measured; it passed if `value` is at most `tolerance`, which no NaN is."""

    value: float
    tolerance: float
    shown: str
    """The measurement with its unit."""
    reason: str = ""
    """What it means if the check failed."""

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance


@dataclass(frozen=True)
class Check:
    name: str
    meaning: str
    measure: Callable[[Bench], Finding]

    def __call__(self, bench: Bench) -> Finding:
        """The finding; an error within the pair's own code is a check that failed."""
        try:
            return self.measure(bench)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return failed(f"{type(error).__name__}: {error}")


def failed(reason: str, shown: str = "-") -> Finding:
    return Finding(math.inf, 0.0, shown, reason)


# ---- what both read and write ----


def vocabulary(bench: Bench) -> Finding:
    sizes = head_size(bench.pair.student), head_size(bench.pair.teacher)
    padded = sum(sizes) - 2 * bench.vocabulary
    shown = f"{bench.vocabulary:,} shared" + (f", {padded:,} more" if padded else "")
    return Finding(0.0, 0.0, shown)


def rows(bench: Bench) -> Finding:
    if bench.refusal is not None:
        return failed(bench.refusal)
    longest = bench.rows.prompt_mask.sum(1).max() + bench.rows.completion_mask.sum(1).max()
    return Finding(0.0, 0.0, f"{len(TEXTS)} rows, {int(longest)} tokens")


def head_of(side: str) -> Callable[[Bench], Finding]:
    def measure(bench: Bench) -> Finding:
        model = getattr(bench, side)
        head: Head = getattr(bench.trainer, f"_{side}_head")
        if not head.is_linear:
            return failed(
                "hidden states times head are not the model's logits: the loss is right, but takes all "
                "logits at once and so more memory"
            )
        with torch.no_grad(), evaluating(model):
            own = completion_logits(model, bench.rows)
            parts = head.unprojected(bench.rows)
            gap = (parts.projection(parts.hidden) - own).abs().max() / own.abs().max()
        reason = "the loss would compare other distributions than the model's own"
        return Finding(float(gap), 1e-4, f"{float(gap):.1e} of largest", reason)

    return measure


# ---- what the models read ----


def padding_of(side: str) -> Callable[[Bench], Finding]:
    def measure(bench: Bench) -> Finding:
        model = getattr(bench, side)
        narrow, wide = (bench.probabilities(model, r) for r in (bench.rows, _wider(bench)))
        gap = float((narrow - wide).abs().max())
        reason = "the model reads padding, or counts it in its positions: rows would depend on their batch"
        return Finding(gap, PROBABILITY, f"p moves {gap:.1e}", reason)

    return measure


def _wider(bench: Bench) -> Sequences:
    """The same rows with more padding where the trainer puts it."""
    fill, rows = bench.trainer._limits.pad_id, bench.rows
    side = (0, WIDER) if bench.is_encoder_decoder else (WIDER, 0)
    pad = nn.functional.pad
    return Sequences(
        pad(rows.prompt_ids, side, value=fill),
        pad(rows.prompt_mask, side),
        pad(rows.completion_ids, (0, WIDER), value=fill),
        pad(rows.completion_mask, (0, WIDER)),
    )


def neighbours(bench: Bench) -> Finding:
    """Each row alone against all of them together."""
    together = bench.probabilities(bench.student, bench.rows)
    alone = [bench.probabilities(bench.student, bench.row(n)) for n in range(bench.rows.rows)]
    gap = float((torch.cat(alone) - together).abs().max())
    return Finding(gap, PROBABILITY, f"p moves {gap:.1e}", "a row's output depends on the rows beside it")


# ---- what the student writes ----


def cached(bench: Bench) -> Finding:
    """How much less likely the greedily written tokens are than the training forward's best ones."""
    answers = bench.written(bench.rows)
    found = bench.probabilities(bench.student, answers)
    ids = answers.completion_ids[answers.completion_mask.bool()]
    gap = float((found.amax(-1) - found.gather(1, ids[:, None])[:, 0]).max())
    reason = "`generate` with its cache and the training forward are two different models"
    return Finding(gap, PROBABILITY, f"{len(ids)} tokens, p {gap:.1e}", reason)


def sampling(bench: Bench) -> Finding:
    """How far the uniform numbers lie outside the spans that the drawn tokens have in the distribution."""
    noise = bench.noise()
    answers = bench.written(bench.rows, noise)
    mask = answers.completion_mask.bool()
    ids = answers.completion_ids[mask][:, None]
    found = bench.probabilities(bench.student, answers).double()
    high = found.cumsum(-1).gather(1, ids)[:, 0]
    low = high - found.gather(1, ids)[:, 0]
    drawn = noise.to(mask.device)[:, : mask.shape[1]][mask]
    gap = float(torch.maximum(low - drawn, drawn - high).clamp_min(0).max())
    reason = "samples do not follow the distribution that the loss trains"
    return Finding(gap, PROBABILITY, f"{len(ids)} tokens, p {gap:.1e}", reason)


def dropout(bench: Bench) -> Finding:
    """Modules in training mode while the student writes, although it was training before."""
    busy: list[int] = []
    bench.student.train()
    note = bench.student.register_forward_pre_hook(
        lambda module, _: busy.append(sum(m.training for m in module.modules()))
    )
    try:
        bench.written(bench.row(0), bench.noise()[:1])
    finally:
        note.remove()
    count = max(busy)
    return Finding(count, 0, f"{count} modules train", "dropout would act on the student's samples")


# ---- the loss ----


def loss(bench: Bench) -> Finding:
    """How far below 0 the loss of any divergence is; not a number fails."""
    found = [_compared(bench, bench.teacher, cell)[0] for cell in _cells(bench)]
    if not all(math.isfinite(value) for value in found):
        return failed("a loss is not finite: weights or logits hold NaN or inf", f"{found[0]:.3g}")
    low, high = min(found), max(found)
    return Finding(-low, 0.0, f"{low:.2g} to {high:.2g}", "a divergence is never negative")


def equal_loss(bench: Bench) -> Finding:
    found = [_compared(bench, bench.student, cell)[0] for cell in _cells(bench, teacher_temperature=1.0)]
    value = max(found, key=lambda x: math.inf if math.isnan(x) else abs(x))
    return Finding(value, 1e-6, f"{value:.1e} nats", "two forward passes of one model differ")


def equal_gradient(bench: Bench) -> Finding:
    """By the hidden states; total variation is left out, as it has a kink where both are equal."""
    cells = [cell for cell in _cells(bench, teacher_temperature=1.0) if cell.divergence == "jsd"]
    value = max(_compared(bench, bench.student, cell)[1] for cell in cells)
    return Finding(value, 1e-4, f"norm {value:.1e}", "there would be no rest where the student has learnt all")


def _cells(bench: Bench, **changes: Any) -> list[Any]:
    cell = replace(bench.trainer.cells[0], **changes)
    return [*(replace(cell, beta=beta) for beta in BETAS), replace(cell, divergence="tv")]


def _compared(bench: Bench, teacher: Any, cell: Any) -> tuple[float, float]:
    """Mean loss a token on the rows' own answers and the norm of its gradient by the hidden states."""
    batch = StepBatch(bench.rows, bench.rows, (0,), (False,))
    with torch.no_grad(), evaluating(bench.student):
        own, guide = (Head_of(bench, model).unprojected(bench.rows) for model in (bench.student, teacher))
    hidden = own.hidden.requires_grad_()
    items = trained_items(batch, 1, "token")
    sums = cell_sums(
        replace(own, hidden=hidden), guide, batch, [cell], items, "token", bench.vocabulary
    )
    (gradient,) = torch.autograd.grad(sums.losses.sum(), hidden)
    return float(sums.losses), float(gradient.norm())
