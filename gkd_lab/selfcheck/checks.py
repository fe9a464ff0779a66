"""What distillation takes for granted, measured on a user's own student, teacher and tokenizer.

Each check is a plain function of a Bench that returns a Finding; CHECKS lists them in the order of a report.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import StepBatch, cell_sums, projected, trained_items
from gkd_lab.models.forward import Sequences, completion_logits, evaluating
from gkd_lab.selfcheck.bench import TEXTS, Bench

WIDER = 5
"""Positions of padding that are added."""
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

PROBABILITY = 1e-4
"""Tolerance of a probability: float32 in products of other shapes moves it by about 1e-6."""
SUM = 1e-3
"""Tolerance of a loss or gradient, relative: the same float32 terms added in another order."""
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's or tokenizer's own code may raise."""


@dataclass(frozen=True)
class Finding:
    """What a check measured; it passed if `value` is at most `tolerance`, which no NaN is."""

    value: float
    tolerance: float
    shown: str
    """The measurement with its unit."""
    reason: str = ""
    """What it means if the check failed."""
    remark: str = ""
    """What to know of it even if it passed."""

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
        except ERRORS as error:
            return stopped(error)


def failed(reason: str, shown: str = "-") -> Finding:
    return Finding(math.inf, 0.0, shown, reason)


def stopped(error: Exception) -> Finding:
    return failed(f"{type(error).__name__}: {error}")


def _worst(values: Iterable[float]) -> float:
    """The largest, which a NaN is: `max` would return one or the other by their order."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))


# ---- what both read and write ----


def rows(bench: Bench) -> Finding:
    if bench.refusal is not None:
        return failed(bench.refusal)
    longest = bench.rows.prompt_mask.sum(1).max() + bench.rows.completion_mask.sum(1).max()
    return Finding(0.0, 0.0, f"{len(TEXTS)} rows, {int(longest)} tokens")


def head_of(side: str) -> Callable[[Bench], Finding]:
    def measure(bench: Bench) -> Finding:
        model, head = getattr(bench, side), bench.heads[side]
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
    """Of each divergence, against the same from the models' own full logits in float64."""
    found = [_compared(bench, "teacher", cell)[0] for cell in _cells(bench)]
    if not all(math.isfinite(value) for value in found):
        return failed("a loss is not finite: weights or logits hold NaN or inf", f"{found[0]:.3g}")
    logits = [bench.logits(model, bench.rows).double() for model in (bench.student, bench.teacher)]
    expected = [float(cell.measure()(*logits).mean()) for cell in _cells(bench)]
    gap = _worst(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    return Finding(
        gap, SUM, f"off by {gap:.1e} of it", "hidden states times heads do not give the models' divergence"
    )


def equal_loss(bench: Bench) -> Finding:
    found = [_compared(bench, "student", cell)[0] for cell in _cells(bench, teacher_temperature=1.0)]
    value = abs(_worst(found))
    return Finding(value, 1e-6, f"{value:.1e} nats", "two forward passes of one model differ")


def equal_gradient(bench: Bench) -> Finding:
    """By the hidden states; total variation is left out, as it has a kink where both are equal."""
    cells = [cell for cell in _cells(bench, teacher_temperature=1.0) if cell.divergence == "jsd"]
    value = _worst(_compared(bench, "student", cell)[1] for cell in cells)
    return Finding(
        value, 1e-4, f"norm {value:.1e}", "there would be no rest where the student has learnt all"
    )


def _cells(bench: Bench, **changes: Any) -> list[CellArguments]:
    cell = replace(bench.trainer.cells[0], **changes)
    return [*(replace(cell, beta=beta) for beta in BETAS), replace(cell, divergence="tv")]


def _compared(bench: Bench, teacher: str, cell: CellArguments) -> tuple[float, float]:
    """Mean loss a token on the rows' own answers and the norm of its gradient by the hidden states."""
    batch = StepBatch(bench.rows, bench.rows, (0,), (False,))
    with torch.no_grad(), evaluating(bench.student):
        own, guide = (bench.heads[side].unprojected(bench.rows) for side in ("student", teacher))
    hidden = own.hidden.requires_grad_()
    items = trained_items(batch, 1, "token")
    guides = {0: projected(guide, 1)}
    sums = cell_sums(own, guides, batch, [cell], items, "token", bench.vocabulary)
    (gradient,) = torch.autograd.grad(sums.losses.sum(), hidden)
    return float(sums.losses.detach()), float(gradient.norm())


def bfloat16(bench: Bench) -> Finding:
    """Both models under autocast against float32: the loss off policy, and the mean shift of a distribution.

    The loss alone would not tell: any two random students are about equally far from their teacher.
    """
    (sample,) = bench.micro_batches([bench.rows], 0.0)
    losses, found = [], []
    for half in (False, True):
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            losses.append(float(bench.trainer.compute_loss(bench.student, sample)))
            both = [bench.probabilities(model, bench.rows) for model in (bench.student, bench.teacher)]
            found.append(torch.stack(both))
    gap = abs(losses[1] / losses[0] - 1)
    shift = float((found[0] - found[1]).abs().sum(-1).mean(-1).max()) / 2
    reason = "the pair is sensitive to rounding: train in float32"
    return Finding(_worst([gap, shift]), 0.1, f"{100 * gap:.1f} %, p by {100 * shift:.1f} %", reason)


# ---- the gradient of a step ----


def prompt(bench: Bench) -> Finding:
    """The largest gradient of a last hidden state that predicts nothing, in parts of the largest at all."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].retain_grad()
            kept.append(output[0])

    body = bench.student.get_decoder() if bench.is_encoder_decoder else bench.student.base_model
    note = body.register_forward_hook(keep)
    try:
        bench.backward(bench.micro_batches([bench.rows], 0.0))
    finally:
        note.remove()
        bench.student.zero_grad()
    if not kept or kept[0].grad is None:
        return failed("no gradient reaches the last hidden states, so nothing below the head would learn")
    sizes = kept[0].grad.abs().amax(-1)
    predicts = _predicts(bench)
    stray, silent = (sizes * ~predicts).max() / sizes.max(), (sizes[predicts] == 0).sum()
    value = float(stray) if not silent else math.inf
    shown = f"{int(predicts.sum())} of {predicts.numel()} positions"
    return Finding(
        value, 0.0, shown, f"{stray:.1e} of the gradient at others, {silent} trained ones have none"
    )


def _predicts(bench: Bench) -> Tensor:
    """Positions of the decoder whose next token is trained on."""
    trained = bench.rows.completion_mask.bool()
    if bench.is_encoder_decoder:
        return trained
    whole = torch.cat([torch.zeros_like(bench.rows.prompt_mask).bool(), trained], dim=1)
    return nn.functional.pad(whole[:, 1:], (0, 1))


def accumulated(lmbda: float, normalization: str) -> Callable[[Bench], Finding]:
    def measure(bench: Bench) -> Finding:
        """One gradient is subtracted from the other within the weights' own, which spares a copy."""
        parts = [bench.row(n) for n in range(bench.rows.rows)]
        bench.student.zero_grad()
        whole = bench.backward(bench.micro_batches([bench.rows], lmbda, normalization=normalization))
        gradients = [p.grad for p in bench.student.parameters() if p.grad is not None]
        norm = _norm(gradients)
        for gradient in gradients:
            gradient.neg_()
        split = bench.backward(bench.micro_batches(parts, lmbda, normalization=normalization))
        gaps = abs(split - whole) / abs(whole), _norm(gradients) / norm
        bench.student.zero_grad()
        reason = f"loss {whole:.6g} and {split:.6g}: the weight of a row depends on how a step is split"
        return Finding(_worst(gaps), SUM, f"gradient {gaps[1]:.1e}", reason)

    return measure


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def frozen(bench: Bench) -> Finding:
    """Weights of the teacher that could learn, or that are the student's own."""
    bench.backward(bench.micro_batches([bench.rows], 0.0))
    own = {p.data_ptr() for p in bench.student.parameters()}
    bench.student.zero_grad()
    weights = list(bench.teacher.parameters())
    moving = sum(p.requires_grad or p.grad is not None or p.data_ptr() in own for p in weights)
    return Finding(moving, 0, f"{moving} of {len(weights)} weights", "training would move the teacher")


# ---- what must not matter to a step ----


def references(bench: Bench) -> Finding:
    """On policy with all answers of the data, and with their first tokens alone."""
    ids, mask = bench.rows.completion_ids, bench.rows.completion_mask
    later = torch.arange(mask.shape[1], device=mask.device) > 0
    fill = bench.trainer._limits.pad_id
    cut = bench.rows.with_completions(ids.masked_fill(later, fill), mask.masked_fill(later, 0))
    found = [_what_is_trained(bench.micro_batches([r], 1.0)[0]) for r in (bench.rows, cut)]
    return _no_difference(found, "the data's answers leak into the student's own text or its weight")


def resumed(bench: Bench) -> Finding:
    """Step 3 as it comes after step 2, and as it comes first."""
    torch.manual_seed(1)
    found = [_what_is_trained(bench.micro_batches([bench.rows], 1.0, step=3)[0])]
    bench.micro_batches([bench.row(0)], 1.0, step=2)
    torch.rand(7)
    found.append(_what_is_trained(bench.micro_batches([bench.rows], 1.0, step=3)[0]))
    return _no_difference(found, "the model draws random numbers of its own: a resumed run would differ")


def _what_is_trained(sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    student = sample["batch"].student
    return student.completion_ids, student.completion_mask, sample["items"]


def _no_difference(found: list[tuple[Tensor, Tensor, Tensor]], reason: str) -> Finding:
    if any(one.shape != other.shape for one, other in zip(*found, strict=True)):
        return failed(reason, "lengths differ")
    count = int((found[0][0] != found[1][0]).sum())
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    return Finding(count if same else max(count, 1), 0, f"{count} tokens differ", reason)


CHECKS = (
    Check("rows", "a row begins with its prompt", rows),
    Check("student head", "hidden x head = its logits", head_of("student")),
    Check("teacher head", "hidden x head = its logits", head_of("teacher")),
    Check("student padding", f"{WIDER} more pads change nothing", padding_of("student")),
    Check("teacher padding", f"{WIDER} more pads change nothing", padding_of("teacher")),
    Check("neighbours", "a row alone = in its batch", neighbours),
    Check("cache", "generate = training forward", cached),
    Check("sampling", "samples follow that forward", sampling),
    Check("dropout", "is off while student writes", dropout),
    Check("loss", "betas, TV = by full logits", loss),
    Check("equal, loss", "0 with student as teacher", equal_loss),
    Check("equal, gradient", "0 with student as teacher", equal_gradient),
    Check("prompt", "only answers get a gradient", prompt),
    Check("accumulation", "1 x 4 rows = 4 x 1, on data", accumulated(0.0, "token")),
    Check("on policy", "1 x 4 rows = 4 x 1, own text", accumulated(1.0, "sequence")),
    Check("teacher", "frozen, apart from student", frozen),
    Check("references", "leave no trace on policy", references),
    Check("resume", "a step needs its number only", resumed),
)
BFLOAT16 = Check("bfloat16", "autocast loss = float32's", bfloat16)
