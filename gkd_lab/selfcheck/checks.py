"""Invariances that distillation relies on, measured on a user's own student, teacher and tokenizer.

Each check is a plain function of a `PairBench` that returns an `InvarianceResult`; CHECKS lists them in the
order of the report.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gkd_lab.losses.cell_arguments import CellArguments
from gkd_lab.losses.step_loss import (
    MicroBatch,
    build_teacher_logits,
    compute_step_losses,
    count_trained_items,
)
from gkd_lab.models.forward import Sequences, compute_completion_logits, eval_mode
from gkd_lab.selfcheck.bench import PROMPTS_AND_ANSWERS, PairBench
from gkd_lab.selfcheck.invariance import InvarianceCheck, InvarianceResult, create_failed_result

ADDED_PADDING = 5
"""Positions of padding that are added."""
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)

PROBABILITY_TOLERANCE = 1e-4
"""Of a probability: float32 in products of other shapes moves it by about 1e-6."""
SUM_TOLERANCE = 1e-3
"""Of a loss or gradient, relative: the same float32 terms added in another order."""


def _get_largest_value(values: Iterable[float]) -> float:
    """Return the signed value of largest magnitude, NaN before all: `max` would depend on the order."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else abs(value))


# ---- rows and heads ----


def check_rows(bench: PairBench) -> InvarianceResult:
    """Return a failed result with the chat template's error, if there was one; else a pass (error 0)."""
    if bench.chat_template_error is not None:
        return create_failed_result(bench.chat_template_error)
    max_tokens = int(bench.rows.prompt_mask.sum(1).max() + bench.rows.completion_mask.sum(1).max())
    measurement = f"{len(PROMPTS_AND_ANSWERS)} rows, {max_tokens} tokens"
    return InvarianceResult(0.0, 0.0, measurement, note=bench.length_note)


def build_head_check(side: str) -> Callable[[PairBench], InvarianceResult]:
    """Return the check for "student" or "teacher": hidden states times head equal the model's logits."""

    def check_head(bench: PairBench) -> InvarianceResult:
        """Return as error the largest gap of hidden x head to the logits, relative; nonlinear heads fail."""
        model, head = getattr(bench, side), bench.heads[side]
        if not head.is_linear:
            return create_failed_result(
                "hidden states times head are not the model's logits: the loss is right, but takes all "
                "logits at once and so more memory"
            )
        with torch.no_grad(), eval_mode(model):
            logits = compute_completion_logits(model, bench.rows)
            output = head.compute_unprojected(bench.rows)
            gap = (output.projection(output.hidden) - logits).abs().max() / logits.abs().max()
        reason = "the loss would compare other distributions than the model's own"
        return InvarianceResult(float(gap), 1e-4, f"{float(gap):.1e} of largest", reason)

    return check_head


# ---- forward passes ----


def build_padding_check(side: str) -> Callable[[PairBench], InvarianceResult]:
    """Return the check for "student" or "teacher": more padding does not change the probabilities."""

    def check_padding(bench: PairBench) -> InvarianceResult:
        """Return as error the largest change of a probability by ADDED_PADDING more pads."""
        model = getattr(bench, side)
        narrow = bench.compute_probabilities(model, bench.rows)
        wide = bench.compute_probabilities(model, _add_padding(bench))
        gap = float((narrow - wide).abs().max())
        reason = "the model reads padding, or counts it in its positions: rows would depend on their batch"
        return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"p moves {gap:.1e}", reason)

    return check_padding


def _add_padding(bench: PairBench) -> Sequences:
    """Return the rows with 5 more pads in the prompt, where the trainer pads it, and after the completion."""
    pad_id, rows = bench.pad_id, bench.rows
    side = (0, ADDED_PADDING) if bench.is_encoder_decoder else (ADDED_PADDING, 0)
    pad = nn.functional.pad
    return Sequences(
        pad(rows.prompt_ids, side, value=pad_id),
        pad(rows.prompt_mask, side),
        pad(rows.completion_ids, (0, ADDED_PADDING), value=pad_id),
        pad(rows.completion_mask, (0, ADDED_PADDING)),
    )


def check_neighbours(bench: PairBench) -> InvarianceResult:
    """Return as error the largest change of a student's probability, row alone against whole batch."""
    batched = bench.compute_probabilities(bench.student, bench.rows)
    rows = [bench.select_row(n) for n in range(bench.rows.num_rows)]
    single = torch.cat([bench.compute_probabilities(bench.student, row) for row in rows])
    gap = float((single - batched).abs().max())
    reason = "a row's output depends on the rows beside it"
    return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"p moves {gap:.1e}", reason)


# ---- sampling ----


def check_cached_generation(bench: PairBench) -> InvarianceResult:
    """Return as error how far a greedy token's probability is below the training forward's best one."""
    answers = bench.generate_answers(bench.rows)
    probabilities = bench.compute_probabilities(bench.student, answers)
    ids = answers.completion_ids[answers.completion_mask.bool()]
    gap = float((probabilities.amax(-1) - probabilities.gather(1, ids[:, None])[:, 0]).max())
    reason = "`generate` with its cache and the training forward are two different models"
    return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"{len(ids)} tokens, p {gap:.1e}", reason)


def check_sampling_distribution(bench: PairBench) -> InvarianceResult:
    """Return as error how far a uniform number lies outside its sampled token's interval of the CDF."""
    noise = bench.draw_noise()
    answers = bench.generate_answers(bench.rows, noise)
    mask = answers.completion_mask.bool()
    ids = answers.completion_ids[mask][:, None]
    probabilities = bench.compute_probabilities(bench.student, answers).double()
    high = probabilities.cumsum(-1).gather(1, ids)[:, 0]
    low = high - probabilities.gather(1, ids)[:, 0]
    uniforms = noise.to(mask.device)[:, : mask.shape[1]][mask]
    gap = float(torch.maximum(low - uniforms, uniforms - high).clamp_min(0).max())
    reason = "samples do not follow the distribution that the loss trains"
    return InvarianceResult(gap, PROBABILITY_TOLERANCE, f"{len(ids)} tokens, p {gap:.1e}", reason)


def check_dropout_is_off(bench: PairBench) -> InvarianceResult:
    """Return as error the number of the student's modules in training mode while it samples; limit 0."""
    counts: list[int] = []
    bench.student.train()
    hook = bench.student.register_forward_pre_hook(
        lambda module, _: counts.append(sum(m.training for m in module.modules()))
    )
    try:
        bench.generate_answers(bench.select_row(0), bench.draw_noise()[:1])
    finally:
        hook.remove()
    count = max(counts)
    return InvarianceResult(count, 0, f"{count} modules train", "dropout would act on the student's samples")


# ---- loss ----


def check_divergence_values(bench: PairBench) -> InvarianceResult:
    """Return as error the largest relative gap of the loss (each beta, TV) to float64 on full logits."""
    cells = _build_divergence_cells(bench)
    losses = [_compute_loss_and_gradient_norm(bench, "teacher", cell)[0] for cell in cells]
    if not all(math.isfinite(loss) for loss in losses):
        reason = "a loss is not finite: weights or logits hold NaN or inf"
        return create_failed_result(reason, f"{losses[0]:.3g}")
    logits = [bench.compute_logits(model, bench.rows).double() for model in (bench.student, bench.teacher)]
    expected = [float(cell.build_divergence()(*logits).mean()) for cell in cells]
    gap = _get_largest_value(
        abs(loss / reference - 1) for loss, reference in zip(losses, expected, strict=True)
    )
    reason = "hidden states times heads do not give the models' divergence"
    return InvarianceResult(gap, SUM_TOLERANCE, f"off by {gap:.1e} of it", reason)


def check_equal_models_loss(bench: PairBench) -> InvarianceResult:
    """Return as error the largest loss, in nats, with the student as its own teacher; it should be 0."""
    cells = _build_divergence_cells(bench, teacher_temperature=1.0)
    losses = [_compute_loss_and_gradient_norm(bench, "student", cell)[0] for cell in cells]
    value = abs(_get_largest_value(losses))
    return InvarianceResult(value, 1e-6, f"{value:.1e} nats", "two forward passes of one model differ")


def check_equal_models_gradient(bench: PairBench) -> InvarianceResult:
    """Return as error the largest gradient norm by hidden states, with the student as its own teacher.

    Total variation is left out, as it has a kink where both are equal.
    """
    cells = [
        cell for cell in _build_divergence_cells(bench, teacher_temperature=1.0) if cell.divergence == "jsd"
    ]
    value = _get_largest_value(_compute_loss_and_gradient_norm(bench, "student", cell)[1] for cell in cells)
    reason = "training would not rest where the student equals the teacher"
    return InvarianceResult(value, 1e-4, f"norm {value:.1e}", reason)


def _build_divergence_cells(bench: PairBench, **changes: Any) -> list[CellArguments]:
    """Return six cells, changed by `changes`: JSD at each of five betas, and total variation."""
    cell = replace(bench.trainer.cells[0], **changes)
    return [*(replace(cell, beta=beta) for beta in BETAS), replace(cell, divergence="tv")]


def _compute_loss_and_gradient_norm(
    bench: PairBench, teacher: str, cell: CellArguments
) -> tuple[float, float]:
    """Return (mean loss per token on the rows' completions, its gradient's norm by student hidden states).

    `teacher`: "teacher" or "student", the model to compare with.
    """
    batch = MicroBatch(bench.rows, bench.rows, (0,), (False,))
    with torch.no_grad(), eval_mode(bench.student):
        student_output, teacher_output = (
            bench.heads[side].compute_unprojected(bench.rows) for side in ("student", teacher)
        )
    hidden = student_output.hidden.requires_grad_()
    items = count_trained_items(batch, "token")
    logits = {0: build_teacher_logits(teacher_output, 1)}
    sums = compute_step_losses(student_output, logits, batch, [cell], items, "token", bench.vocabulary_size)
    (gradient,) = torch.autograd.grad(sums.losses.sum(), hidden)
    return float(sums.losses.detach()), float(gradient.norm())


def check_bfloat16(bench: PairBench) -> InvarianceResult:
    """Return as error bfloat16's relative loss change, or the mean shift of a distribution if larger.

    The loss alone would not tell: any two random students are about equally far from their teacher.
    """
    (sample,) = bench.build_micro_batches([bench.rows], 0.0)
    losses, probabilities = [], []
    for use_bfloat16 in (False, True):
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=use_bfloat16):
            losses.append(float(bench.trainer.compute_loss(bench.student, sample)))
            models = (bench.student, bench.teacher)
            pair = [bench.compute_probabilities(model, bench.rows) for model in models]
            probabilities.append(torch.stack(pair))
    gap = abs(losses[1] / losses[0] - 1)
    shift = float((probabilities[0] - probabilities[1]).abs().sum(-1).mean(-1).max()) / 2
    measurement = f"{100 * gap:.1f} %, p by {100 * shift:.1f} %"
    reason = "the pair is sensitive to rounding: train in float32"
    return InvarianceResult(_get_largest_value([gap, shift]), 0.1, measurement, reason)


# ---- gradient ----


def check_prompt_gradient(bench: PairBench) -> InvarianceResult:
    """Return as error the largest gradient at positions not predicting a trained token, over the largest.

    It is inf if a position that predicts a trained token gets no gradient. Clears the student's `.grad`.
    """
    outputs: list[Tensor] = []

    def retain_gradient(module: nn.Module, args: Any, output: Any) -> None:
        """Collect a layer's output in `outputs`, and let it keep its gradient after the backward pass."""
        if output[0].requires_grad:
            output[0].retain_grad()
            outputs.append(output[0])

    # Some models call a part of their base, as OPT does, so that the base's own hook sees nothing.
    hook = bench.student.get_decoder().register_forward_hook(retain_gradient)
    try:
        bench.accumulate_gradients(bench.build_micro_batches([bench.rows], 0.0))
    finally:
        hook.remove()
        bench.student.zero_grad()
    if not outputs or outputs[0].grad is None:
        return create_failed_result(
            "no gradient reaches the last hidden states, so nothing below the head would learn"
        )
    sizes = outputs[0].grad.abs().amax(-1)
    predicts = _mask_predicting_positions(bench)
    stray, silent = (sizes * ~predicts).max() / sizes.max(), (sizes[predicts] == 0).sum()
    return InvarianceResult(
        float(stray) if not silent else math.inf,
        0.0,
        f"{int(predicts.sum())} of {predicts.numel()} positions",
        f"{stray:.1e} of the gradient at others, {silent} trained ones have none",
    )


def _mask_predicting_positions(bench: PairBench) -> Tensor:
    """Return the mask of decoder positions whose next token is trained, (rows, decoder positions)."""
    trained = bench.rows.completion_mask.bool()
    if bench.is_encoder_decoder:
        return trained
    mask = torch.cat([torch.zeros_like(bench.rows.prompt_mask).bool(), trained], dim=1)
    return nn.functional.pad(mask[:, 1:], (0, 1))


def build_accumulation_check(lmbda: float, normalization: str) -> Callable[[PairBench], InvarianceResult]:
    """Return the check that four micro-batches of one row give the loss and gradient of one of four rows.

    `lmbda`: 0 for the data's completions, 1 for the student's own.
    """

    def check_accumulation(bench: PairBench) -> InvarianceResult:
        """Return as error the larger relative gap, of loss or gradient, between one micro-batch and four."""
        rows = [bench.select_row(n) for n in range(bench.rows.num_rows)]
        bench.student.zero_grad()
        whole = bench.accumulate_gradients(
            bench.build_micro_batches([bench.rows], lmbda, normalization=normalization)
        )
        # The second gradient is subtracted within the weights' own, which spares a copy.
        gradients = [p.grad for p in bench.student.parameters() if p.grad is not None]
        norm = _compute_norm(gradients)
        for gradient in gradients:
            gradient.neg_()
        split = bench.accumulate_gradients(
            bench.build_micro_batches(rows, lmbda, normalization=normalization)
        )
        gaps = abs(split - whole) / abs(whole), _compute_norm(gradients) / norm
        bench.student.zero_grad()
        reason = f"loss {whole:.6g} and {split:.6g}: the weight of a row depends on how a step is split"
        return InvarianceResult(_get_largest_value(gaps), SUM_TOLERANCE, f"gradient {gaps[1]:.1e}", reason)

    return check_accumulation


def _compute_norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm of all tensors joined together."""
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def check_teacher_is_frozen(bench: PairBench) -> InvarianceResult:
    """Return as error the number of teacher weights that can learn or are shared with the student."""
    bench.accumulate_gradients(bench.build_micro_batches([bench.rows], 0.0))
    student_weights = {p.data_ptr() for p in bench.student.parameters()}
    bench.student.zero_grad()
    weights = list(bench.teacher.parameters())
    moving = sum(p.requires_grad or p.grad is not None or p.data_ptr() in student_weights for p in weights)
    measurement = f"{moving} of {len(weights)} weights"
    return InvarianceResult(moving, 0, measurement, "training would move the teacher")


# ---- independence of a step ----


def check_reference_independence(bench: PairBench) -> InvarianceResult:
    """Return as error the sampled tokens that differ once the dataset's completions are cut to 1 token."""
    ids, mask = bench.rows.completion_ids, bench.rows.completion_mask
    is_later = torch.arange(mask.shape[1], device=mask.device) > 0
    truncated = bench.rows.replace_completions(
        ids.masked_fill(is_later, bench.pad_id), mask.masked_fill(is_later, 0)
    )
    full, short = (
        _get_trained_tensors(bench.build_micro_batches([rows], 1.0)[0]) for rows in (bench.rows, truncated)
    )
    reason = "the data's answers leak into the student's own text or its weight"
    return _compare_trained_tensors(full, short, reason)


def check_resumed_step(bench: PairBench) -> InvarianceResult:
    """Return as error the sampled tokens that differ in step 3 if step 2 ran before."""
    torch.manual_seed(1)
    # The first only gives the other two the same batch before them.
    _, resumed, repeated = (
        _get_trained_tensors(bench.build_micro_batches([bench.rows], 1.0, step=3)[0]) for _ in range(3)
    )
    bench.build_micro_batches([bench.select_row(0)], 1.0, step=2)
    torch.rand(7)
    continued = _get_trained_tensors(bench.build_micro_batches([bench.rows], 1.0, step=3)[0])
    reason = "the model draws random numbers of its own: a resumed run would differ"
    if _compare_trained_tensors(resumed, repeated, reason).passed:
        reason = "the model keeps something of the batch before: a resumed run would differ"
    return _compare_trained_tensors(resumed, continued, reason)


TrainedTensors = tuple[Tensor, Tensor, Tensor]


def _get_trained_tensors(sample: dict[str, Any]) -> TrainedTensors:
    """Return a training sample's (completion ids, completion mask, divisors of the loss)."""
    student = sample["batch"].student
    return student.completion_ids, student.completion_mask, sample["items"]


def _compare_trained_tensors(first: TrainedTensors, second: TrainedTensors, reason: str) -> InvarianceResult:
    """Return a result whose error counts differing ids, at least 1 if masks or divisors differ.

    `reason`: the meaning of a difference. Different shapes fail without a count.
    """
    pairs = list(zip(first, second, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return create_failed_result(reason, "lengths differ")
    count = int((first[0] != second[0]).sum())
    is_equal = all(torch.equal(a, b) for a, b in pairs)
    return InvarianceResult(count if is_equal else max(count, 1), 0, f"{count} tokens differ", reason)


CHECKS = (
    InvarianceCheck("rows", "a row begins with its prompt", check_rows),
    InvarianceCheck("student head", "hidden x head = its logits", build_head_check("student")),
    InvarianceCheck("teacher head", "hidden x head = its logits", build_head_check("teacher")),
    InvarianceCheck(
        "student padding",
        f"{ADDED_PADDING} more pads change nothing",
        build_padding_check("student"),
        batched_models=("student",),
    ),
    InvarianceCheck(
        "teacher padding",
        f"{ADDED_PADDING} more pads change nothing",
        build_padding_check("teacher"),
        batched_models=("teacher",),
    ),
    InvarianceCheck(
        "neighbours", "a row alone = in its batch", check_neighbours, batched_models=("student",)
    ),
    InvarianceCheck(
        "cache", "generate = training forward", check_cached_generation, batched_models=("student",)
    ),
    InvarianceCheck(
        "sampling", "samples follow that forward", check_sampling_distribution, batched_models=("student",)
    ),
    InvarianceCheck("dropout", "is off while student writes", check_dropout_is_off),
    InvarianceCheck("loss", "betas, TV = by full logits", check_divergence_values),
    InvarianceCheck("equal, loss", "0 with student as teacher", check_equal_models_loss),
    InvarianceCheck("equal, gradient", "0 with student as teacher", check_equal_models_gradient),
    InvarianceCheck("prompt", "only answers get a gradient", check_prompt_gradient),
    InvarianceCheck(
        "accumulation",
        "1 x 4 rows = 4 x 1, on data",
        build_accumulation_check(0.0, "token"),
        batched_models=("student", "teacher"),
    ),
    InvarianceCheck(
        "on policy",
        "1 x 4 rows = 4 x 1, own text",
        build_accumulation_check(1.0, "sequence"),
        batched_models=("student", "teacher"),
    ),
    InvarianceCheck("teacher", "frozen, apart from student", check_teacher_is_frozen),
    InvarianceCheck(
        "references", "leave no trace on policy", check_reference_independence, batched_models=("student",)
    ),
    InvarianceCheck(
        "resume", "a step needs its number only", check_resumed_step, batched_models=("student",)
    ),
)
BFLOAT16_CHECK = InvarianceCheck("bfloat16", "autocast loss = float32's", check_bfloat16)
