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
from gkd_lab.losses.step_loss import MicroBatch, compute_step_losses, count_trained_items, project_blocks
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode
from gkd_lab.selfcheck.bench import PROMPTS_AND_ANSWERS, PairBench

ADDED_PADDING = 5
"""Positions of padding that are added."""
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

PROBABILITY_TOLERANCE = 1e-4
"""Tolerance of a probability: float32 in products of other shapes moves it by about 1e-6."""
SUM_TOLERANCE = 1e-3
"""Tolerance of a loss or gradient, relative: the same float32 terms added in another order."""
PAIR_ERRORS = (
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
class InvarianceResult:
    """What a check measured; it passed if `value` is at most `tolerance`, which no NaN is."""

    value: float
    tolerance: float
    measurement: str
    """The measurement with its unit."""
    reason: str = ""
    """What it means if the check failed."""
    note: str = ""
    """What to know of it even if it passed."""

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance


@dataclass(frozen=True)
class InvarianceCheck:
    name: str
    meaning: str
    measure: Callable[[PairBench], InvarianceResult]

    def __call__(self, bench: PairBench) -> InvarianceResult:
        """The finding; an error within the pair's own code is a check that failed."""
        try:
            return self.measure(bench)
        except PAIR_ERRORS as error:
            return create_error_result(error)


def create_failed_result(reason: str, measurement: str = "-") -> InvarianceResult:
    return InvarianceResult(math.inf, 0.0, measurement, reason)


def create_error_result(error: Exception) -> InvarianceResult:
    return create_failed_result(f"{type(error).__name__}: {error}")


def _get_largest_value(values: Iterable[float]) -> float:
    """The largest, which a NaN is: `max` would return one or the other by their order."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))


# ---- what both read and write ----


def check_rows(bench: PairBench) -> InvarianceResult:
    if bench.chat_template_error is not None:
        return create_failed_result(bench.chat_template_error)
    longest = bench.rows.prompt_mask.sum(1).max() + bench.rows.completion_mask.sum(1).max()
    return InvarianceResult(0.0, 0.0, f"{len(PROMPTS_AND_ANSWERS)} rows, {int(longest)} tokens")


def build_head_check(side: str) -> Callable[[PairBench], InvarianceResult]:
    def measure(bench: PairBench) -> InvarianceResult:
        model, head = getattr(bench, side), bench.heads[side]
        if not head.is_linear:
            return create_failed_result(
                "hidden states times head are not the model's logits: the loss is right, but takes all "
                "logits at once and so more memory"
            )
        with torch.no_grad(), eval_mode(model):
            own = compute_completion_logits(model, bench.rows)
            parts = head.compute_unprojected(bench.rows)
            gap = (parts.projection(parts.hidden) - own).abs().max() / own.abs().max()
        reason = "the loss would compare other distributions than the model's own"
        return InvarianceResult(float(gap), 1e-4, f"{float(gap):.1e} of largest", reason)

    return measure


# ---- what the models read ----


def build_padding_check(side: str) -> Callable[[PairBench], InvarianceResult]:
    def measure(bench: PairBench) -> InvarianceResult:
        model = getattr(bench, side)
        narrow, wide = (bench.compute_probabilities(model, r) for r in (bench.rows, _add_padding(bench)))
        gap = float((narrow - wide).abs().max())
        reason = "the model reads padding, or counts it in its positions: rows would depend on their batch"
        return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"p moves {gap:.1e}", reason)

    return measure


def _add_padding(bench: PairBench) -> Sequences:
    """The same rows with more padding where the trainer puts it."""
    fill, rows = bench.trainer.generation_limits.pad_id, bench.rows
    side = (0, ADDED_PADDING) if bench.is_encoder_decoder else (ADDED_PADDING, 0)
    pad = nn.functional.pad
    return Sequences(
        pad(rows.prompt_ids, side, value=fill),
        pad(rows.prompt_mask, side),
        pad(rows.completion_ids, (0, ADDED_PADDING), value=fill),
        pad(rows.completion_mask, (0, ADDED_PADDING)),
    )


def check_neighbours(bench: PairBench) -> InvarianceResult:
    """Each row alone against all of them together."""
    together = bench.compute_probabilities(bench.student, bench.rows)
    alone = [
        bench.compute_probabilities(bench.student, bench.select_row(n)) for n in range(bench.rows.num_rows)
    ]
    gap = float((torch.cat(alone) - together).abs().max())
    return InvarianceResult(
        gap, PROBABILITY_TOLERANCE, f"p moves {gap:.1e}", "a row's output depends on the rows beside it"
    )


# ---- what the student writes ----


def check_cached_generation(bench: PairBench) -> InvarianceResult:
    """How much less likely the greedily written tokens are than the training forward's best ones."""
    answers = bench.generate_answers(bench.rows)
    found = bench.compute_probabilities(bench.student, answers)
    ids = answers.completion_ids[answers.completion_mask.bool()]
    gap = float((found.amax(-1) - found.gather(1, ids[:, None])[:, 0]).max())
    reason = "`generate` with its cache and the training forward are two different models"
    return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"{len(ids)} tokens, p {gap:.1e}", reason)


def check_sampling_distribution(bench: PairBench) -> InvarianceResult:
    """How far the uniform numbers lie outside the spans that the drawn tokens have in the distribution."""
    noise = bench.draw_noise()
    answers = bench.generate_answers(bench.rows, noise)
    mask = answers.completion_mask.bool()
    ids = answers.completion_ids[mask][:, None]
    found = bench.compute_probabilities(bench.student, answers).double()
    high = found.cumsum(-1).gather(1, ids)[:, 0]
    low = high - found.gather(1, ids)[:, 0]
    drawn = noise.to(mask.device)[:, : mask.shape[1]][mask]
    gap = float(torch.maximum(low - drawn, drawn - high).clamp_min(0).max())
    reason = "samples do not follow the distribution that the loss trains"
    return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"{len(ids)} tokens, p {gap:.1e}", reason)


def check_dropout_is_off(bench: PairBench) -> InvarianceResult:
    """Modules in training mode while the student writes, although it was training before."""
    busy: list[int] = []
    bench.student.train()
    note = bench.student.register_forward_pre_hook(
        lambda module, _: busy.append(sum(m.training for m in module.modules()))
    )
    try:
        bench.generate_answers(bench.select_row(0), bench.draw_noise()[:1])
    finally:
        note.remove()
    count = max(busy)
    return InvarianceResult(count, 0, f"{count} modules train", "dropout would act on the student's samples")


# ---- the loss ----


def check_divergence_values(bench: PairBench) -> InvarianceResult:
    """Of each divergence, against the same from the models' own full logits in float64."""
    found = [
        _compute_loss_and_gradient_norm(bench, "teacher", cell)[0] for cell in _build_divergence_cells(bench)
    ]
    if not all(math.isfinite(value) for value in found):
        return create_failed_result(
            "a loss is not finite: weights or logits hold NaN or inf", f"{found[0]:.3g}"
        )
    logits = [bench.compute_logits(model, bench.rows).double() for model in (bench.student, bench.teacher)]
    expected = [float(cell.build_divergence()(*logits).mean()) for cell in _build_divergence_cells(bench)]
    gap = _get_largest_value(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    return InvarianceResult(
        gap,
        SUM_TOLERANCE,
        f"off by {gap:.1e} of it",
        "hidden states times heads do not give the models' divergence",
    )


def check_equal_models_loss(bench: PairBench) -> InvarianceResult:
    found = [
        _compute_loss_and_gradient_norm(bench, "student", cell)[0]
        for cell in _build_divergence_cells(bench, teacher_temperature=1.0)
    ]
    value = abs(_get_largest_value(found))
    return InvarianceResult(value, 1e-6, f"{value:.1e} nats", "two forward passes of one model differ")


def check_equal_models_gradient(bench: PairBench) -> InvarianceResult:
    """By the hidden states; total variation is left out, as it has a kink where both are equal."""
    cells = [
        cell for cell in _build_divergence_cells(bench, teacher_temperature=1.0) if cell.divergence == "jsd"
    ]
    value = _get_largest_value(_compute_loss_and_gradient_norm(bench, "student", cell)[1] for cell in cells)
    return InvarianceResult(
        value, 1e-4, f"norm {value:.1e}", "there would be no rest where the student has learnt all"
    )


def _build_divergence_cells(bench: PairBench, **changes: Any) -> list[CellArguments]:
    cell = replace(bench.trainer.cells[0], **changes)
    return [*(replace(cell, beta=beta) for beta in BETAS), replace(cell, divergence="tv")]


def _compute_loss_and_gradient_norm(
    bench: PairBench, teacher: str, cell: CellArguments
) -> tuple[float, float]:
    """Mean loss a token on the rows' own answers and the norm of its gradient by the hidden states."""
    batch = MicroBatch(bench.rows, bench.rows, (0,), (False,))
    with torch.no_grad(), eval_mode(bench.student):
        own, guide = (bench.heads[side].compute_unprojected(bench.rows) for side in ("student", teacher))
    hidden = own.hidden.requires_grad_()
    items = count_trained_items(batch, 1, "token")
    guides = {0: project_blocks(guide, 1)}
    sums = compute_step_losses(own, guides, batch, [cell], items, "token", bench.vocabulary_size)
    (gradient,) = torch.autograd.grad(sums.losses.sum(), hidden)
    return float(sums.losses.detach()), float(gradient.norm())


def check_bfloat16(bench: PairBench) -> InvarianceResult:
    """Both models under autocast against float32: the loss off policy, and the mean shift of a distribution.

    The loss alone would not tell: any two random students are about equally far from their teacher.
    """
    (sample,) = bench.build_micro_batches([bench.rows], 0.0)
    losses, found = [], []
    for half in (False, True):
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            losses.append(float(bench.trainer.compute_loss(bench.student, sample)))
            both = [
                bench.compute_probabilities(model, bench.rows) for model in (bench.student, bench.teacher)
            ]
            found.append(torch.stack(both))
    gap = abs(losses[1] / losses[0] - 1)
    shift = float((found[0] - found[1]).abs().sum(-1).mean(-1).max()) / 2
    reason = "the pair is sensitive to rounding: train in float32"
    return InvarianceResult(
        _get_largest_value([gap, shift]), 0.1, f"{100 * gap:.1f} %, p by {100 * shift:.1f} %", reason
    )


# ---- the gradient of a step ----


def check_prompt_gradient(bench: PairBench) -> InvarianceResult:
    """The largest gradient of a last hidden state that predicts nothing, in parts of the largest at all."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].retain_grad()
            kept.append(output[0])

    body = bench.student.get_decoder() if bench.is_encoder_decoder else bench.student.base_model
    note = body.register_forward_hook(keep)
    try:
        bench.compute_loss_and_gradient(bench.build_micro_batches([bench.rows], 0.0))
    finally:
        note.remove()
        bench.student.zero_grad()
    if not kept or kept[0].grad is None:
        return create_failed_result(
            "no gradient reaches the last hidden states, so nothing below the head would learn"
        )
    sizes = kept[0].grad.abs().amax(-1)
    predicts = _mask_predicting_positions(bench)
    stray, silent = (sizes * ~predicts).max() / sizes.max(), (sizes[predicts] == 0).sum()
    value = float(stray) if not silent else math.inf
    shown = f"{int(predicts.sum())} of {predicts.numel()} positions"
    return InvarianceResult(
        value, 0.0, shown, f"{stray:.1e} of the gradient at others, {silent} trained ones have none"
    )


def _mask_predicting_positions(bench: PairBench) -> Tensor:
    """Positions of the decoder whose next token is trained on."""
    trained = bench.rows.completion_mask.bool()
    if bench.is_encoder_decoder:
        return trained
    whole = torch.cat([torch.zeros_like(bench.rows.prompt_mask).bool(), trained], dim=1)
    return nn.functional.pad(whole[:, 1:], (0, 1))


def build_accumulation_check(lmbda: float, normalization: str) -> Callable[[PairBench], InvarianceResult]:
    def measure(bench: PairBench) -> InvarianceResult:
        """One gradient is subtracted from the other within the weights' own, which spares a copy."""
        parts = [bench.select_row(n) for n in range(bench.rows.num_rows)]
        bench.student.zero_grad()
        whole = bench.compute_loss_and_gradient(
            bench.build_micro_batches([bench.rows], lmbda, normalization=normalization)
        )
        gradients = [p.grad for p in bench.student.parameters() if p.grad is not None]
        norm = _compute_norm(gradients)
        for gradient in gradients:
            gradient.neg_()
        split = bench.compute_loss_and_gradient(
            bench.build_micro_batches(parts, lmbda, normalization=normalization)
        )
        gaps = abs(split - whole) / abs(whole), _compute_norm(gradients) / norm
        bench.student.zero_grad()
        reason = f"loss {whole:.6g} and {split:.6g}: the weight of a row depends on how a step is split"
        return InvarianceResult(_get_largest_value(gaps), SUM_TOLERANCE, f"gradient {gaps[1]:.1e}", reason)

    return measure


def _compute_norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def check_teacher_is_frozen(bench: PairBench) -> InvarianceResult:
    """Weights of the teacher that could learn, or that are the student's own."""
    bench.compute_loss_and_gradient(bench.build_micro_batches([bench.rows], 0.0))
    own = {p.data_ptr() for p in bench.student.parameters()}
    bench.student.zero_grad()
    weights = list(bench.teacher.parameters())
    moving = sum(p.requires_grad or p.grad is not None or p.data_ptr() in own for p in weights)
    return InvarianceResult(
        moving, 0, f"{moving} of {len(weights)} weights", "training would move the teacher"
    )


# ---- what must not matter to a step ----


def check_reference_independence(bench: PairBench) -> InvarianceResult:
    """On policy with all answers of the data, and with their first tokens alone."""
    ids, mask = bench.rows.completion_ids, bench.rows.completion_mask
    later = torch.arange(mask.shape[1], device=mask.device) > 0
    fill = bench.trainer.generation_limits.pad_id
    cut = bench.rows.replace_completions(ids.masked_fill(later, fill), mask.masked_fill(later, 0))
    found = [_list_trained_tensors(bench.build_micro_batches([r], 1.0)[0]) for r in (bench.rows, cut)]
    return _compare_trained_tensors(
        found, "the data's answers leak into the student's own text or its weight"
    )


def check_resumed_step(bench: PairBench) -> InvarianceResult:
    """Step 3 as it comes after step 2, and as it comes first."""
    torch.manual_seed(1)
    found = [_list_trained_tensors(bench.build_micro_batches([bench.rows], 1.0, step=3)[0])]
    bench.build_micro_batches([bench.select_row(0)], 1.0, step=2)
    torch.rand(7)
    found.append(_list_trained_tensors(bench.build_micro_batches([bench.rows], 1.0, step=3)[0]))
    return _compare_trained_tensors(
        found, "the model draws random numbers of its own: a resumed run would differ"
    )


def _list_trained_tensors(sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    student = sample["batch"].student
    return student.completion_ids, student.completion_mask, sample["items"]


def _compare_trained_tensors(found: list[tuple[Tensor, Tensor, Tensor]], reason: str) -> InvarianceResult:
    if any(one.shape != other.shape for one, other in zip(*found, strict=True)):
        return create_failed_result(reason, "lengths differ")
    count = int((found[0][0] != found[1][0]).sum())
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    return InvarianceResult(count if same else max(count, 1), 0, f"{count} tokens differ", reason)


CHECKS = (
    InvarianceCheck("rows", "a row begins with its prompt", check_rows),
    InvarianceCheck("student head", "hidden x head = its logits", build_head_check("student")),
    InvarianceCheck("teacher head", "hidden x head = its logits", build_head_check("teacher")),
    InvarianceCheck(
        "student padding", f"{ADDED_PADDING} more pads change nothing", build_padding_check("student")
    ),
    InvarianceCheck(
        "teacher padding", f"{ADDED_PADDING} more pads change nothing", build_padding_check("teacher")
    ),
    InvarianceCheck("neighbours", "a row alone = in its batch", check_neighbours),
    InvarianceCheck("cache", "generate = training forward", check_cached_generation),
    InvarianceCheck("sampling", "samples follow that forward", check_sampling_distribution),
    InvarianceCheck("dropout", "is off while student writes", check_dropout_is_off),
    InvarianceCheck("loss", "betas, TV = by full logits", check_divergence_values),
    InvarianceCheck("equal, loss", "0 with student as teacher", check_equal_models_loss),
    InvarianceCheck("equal, gradient", "0 with student as teacher", check_equal_models_gradient),
    InvarianceCheck("prompt", "only answers get a gradient", check_prompt_gradient),
    InvarianceCheck("accumulation", "1 x 4 rows = 4 x 1, on data", build_accumulation_check(0.0, "token")),
    InvarianceCheck("on policy", "1 x 4 rows = 4 x 1, own text", build_accumulation_check(1.0, "sequence")),
    InvarianceCheck("teacher", "frozen, apart from student", check_teacher_is_frozen),
    InvarianceCheck("references", "leave no trace on policy", check_reference_independence),
    InvarianceCheck("resume", "a step needs its number only", check_resumed_step),
)
BFLOAT16_CHECK = InvarianceCheck("bfloat16", "autocast loss = float32's", check_bfloat16)
