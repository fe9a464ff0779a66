"""Divergences from several teachers: their mixture, their sum, the one that a row is meant for."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab import Teacher
from gkd_lab.config.artifact_specs import Family
from gkd_lab.losses.divergence import Divergence, generalized_jsd
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherTarget
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses
from gkd_lab.models.projection import Projection

from ..losses.descriptions import parse
from ..losses.loss_problems import normal
from ..models.tiny import FAMILIES, tiny_model
from ..training.driving import assert_close, assert_identical, cell, distil

CELLS, BLOCKS, TOKENS, VOCABULARY = 2, 2, 7, 11
MEASURE = Divergence(beta=0.3)


def given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "student": normal(1, CELLS, TOKENS, 5).requires_grad_(),
        "student_head": Projection(normal(2, CELLS, VOCABULARY, 5).requires_grad_()),
        "teacher": None,
        "teacher_head": None,
        "teachers": {
            0: HiddenTeacherLogits(normal(3, BLOCKS, TOKENS, 4), Projection(normal(4, VOCABULARY, 4))),
            1: HiddenTeacherLogits(normal(5, BLOCKS, TOKENS, 8), Projection(normal(6, VOCABULARY + 3, 8))),
        },
        "block_of_cell": (1, 0),
        "weights": torch.rand(CELLS, TOKENS, generator=generator, dtype=torch.float64),
        "labels": torch.randint(VOCABULARY, (CELLS, TOKENS), generator=generator),
    }


def logits(one: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each cell's student, and of both teachers at the cell's rows."""
    students = [one["student"][n] @ one["student_head"].weight[n].T for n in range(CELLS)]
    teachers = []
    for n in range(CELLS):
        block = one["block_of_cell"][n]
        rows = [g.hidden[block] @ g.head.weight.T for g in one["teachers"].values()]
        teachers.append(torch.stack([row[:, :VOCABULARY] for row in rows]))
    return students, teachers


def assert_is(one: dict[str, Any], target: TeacherTarget, log_target: list[Tensor], **more: Any) -> None:
    """Values and gradients are those of the divergence from exp(log_target), by plain formulas."""
    sums = compute_cell_losses(terms=[(WeightedLoss(MEASURE, target=target),)] * CELLS, **one, **more)
    students, _ = logits(one)
    expected = torch.stack(
        [
            (generalized_jsd(students[n], log_target[n], MEASURE.beta) * one["weights"][n]).sum()
            for n in range(CELLS)
        ]
    )
    torch.testing.assert_close(sums.losses, expected)
    parameters = [one["student"], one["student_head"].weight]
    torch.testing.assert_close(
        torch.autograd.grad(sums.losses.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
    )


def test_a_mixture_is_of_probabilities_each_at_its_own_temperature() -> None:
    loss_arguments = given()
    _, teachers = logits(loss_arguments)
    target = TeacherTarget((0, 1), (0.7, 0.3), (0.5, 2.0))
    mixed = [
        (0.7 * (teacher_logits[0] / 0.5).softmax(-1) + 0.3 * (teacher_logits[1] / 2.0).softmax(-1)).log()
        for teacher_logits in teachers
    ]
    assert_is(loss_arguments, target, mixed)


def test_a_mixture_without_weights_is_the_mean() -> None:
    loss_arguments = given()
    mixed = [teacher_logits.softmax(-1).mean(0).log() for teacher_logits in logits(loss_arguments)[1]]
    assert_is(loss_arguments, TeacherTarget((0, 1)), mixed)


def test_a_routed_divergence_compares_each_row_with_its_own_teacher() -> None:
    loss_arguments = given()
    routes = torch.tensor([[0, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0, 1]])
    chosen = []
    for n, teacher_logits in enumerate(logits(loss_arguments)[1]):
        cell_routes = routes[loss_arguments["block_of_cell"][n]]
        chosen.append(
            torch.stack([teacher_logits[int(teacher), place] for place, teacher in enumerate(cell_routes)])
        )
    assert_is(loss_arguments, TeacherTarget((0, 1), routed=True), chosen, routes=routes)


def test_a_sum_of_divergences_is_that_of_each_alone() -> None:
    loss_arguments = given()
    lists: WeightedLosses = (
        WeightedLoss(MEASURE, 0.25),
        WeightedLoss(MEASURE, 2.0, target=TeacherTarget((1,))),
    )
    together = compute_cell_losses(terms=[lists] * CELLS, **loss_arguments)
    alone = [compute_cell_losses(terms=[(term,)] * CELLS, **loss_arguments).losses for term in lists]
    torch.testing.assert_close(together.losses, alone[0] + alone[1])
    torch.testing.assert_close(together.terms, torch.stack(alone, 1).detach())


def test_a_scale_weighs_the_tokens_of_one_term() -> None:
    loss_arguments = given()
    lists: WeightedLosses = (WeightedLoss(MEASURE), WeightedLoss(MEASURE, target=TeacherTarget((1,))))
    scale = normal(9, TOKENS)
    scaled = compute_cell_losses(terms=[lists] * CELLS, scales={(1, 0): scale}, **loss_arguments)
    plain = compute_cell_losses(terms=[lists] * CELLS, **loss_arguments)
    by_weights = {**loss_arguments, "weights": loss_arguments["weights"] * scale}
    weighed = compute_cell_losses(terms=[lists[:1]] * CELLS, **by_weights)
    torch.testing.assert_close(scaled.terms[0], plain.terms[0])
    torch.testing.assert_close(scaled.terms[1, 1], plain.terms[1, 1])
    torch.testing.assert_close(scaled.terms[1, 0], weighed.terms[1, 0])
    (ours,) = torch.autograd.grad(scaled.losses[1], loss_arguments["student"])
    (theirs,) = torch.autograd.grad(weighed.losses[1] + plain.terms[1, 1], loss_arguments["student"])
    second = compute_cell_losses(terms=[lists[1:]] * CELLS, **loss_arguments).losses[1]
    torch.testing.assert_close(ours, theirs + torch.autograd.grad(second, loss_arguments["student"])[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teachers": [0, 0]}, r"\[0, 0\] .*twice"),
        ({"teachers": [-1]}, "teacher -1:"),
        ({"teachers": ["second"]}, "teacher 'second':"),
        ({"teachers": []}, "name at least one"),
        ({"teachers": [0, 1], "weights": [1.0]}, "1 weights .*2 teachers"),
        ({"teachers": [0, 1], "weights": [0.5, 0.6]}, "must sum to 1"),
        (
            {"teachers": [0, 1], "temperatures": [0.0, 1.0]},
            r"temperatures\[0\]: 0.0",
        ),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([fields])


def test_a_routed_loss_must_know_the_routes() -> None:
    with pytest.raises(ValueError, match="`routes`"):
        compute_cell_losses(
            terms=[(WeightedLoss(MEASURE, target=TeacherTarget((0, 1), routed=True)),)] * CELLS, **given()
        )


# ---- in the trainer ----

MIXTURE: WeightedLosses = (WeightedLoss(MEASURE, target=TeacherTarget((0, 1), (0.6, 0.4))),)
SUM: WeightedLosses = (
    WeightedLoss(MEASURE, 0.5),
    WeightedLoss(Divergence(beta=1.0), 0.5, target=TeacherTarget((1,))),
)


def another(family: Family, **options: Any) -> Teacher:
    return Teacher(tiny_model(family, 11, width=8, heads=2), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("terms", (MIXTURE, SUM), ids=("mixture", "sum"))
def test_packed_cells_learn_from_several_teachers_as_they_do_alone(
    family: Family, terms: WeightedLosses, tmp_path: Path
) -> None:
    lmbdas = (0.0, 0.5, 1.0)
    cells = [cell(tmp_path, str(n), lmbda=lmbda, objectives=terms) for n, lmbda in enumerate(lmbdas)]
    packed = distil(tmp_path, family, cells, more_teachers=[another(family)])
    for n, cell_args in enumerate(cells):
        alone = distil(tmp_path, family, [cell_args], packed=False, more_teachers=[another(family)])
        assert_close(packed.weights(n), alone.weights())


def test_two_copies_of_a_teacher_are_that_teacher(tmp_path: Path) -> None:
    twin = Teacher(tiny_model("decoder-only", 3, width=32))
    mixed = distil(tmp_path, "decoder-only", [cell(tmp_path, objectives=MIXTURE)], more_teachers=[twin])
    plain = distil(tmp_path, "decoder-only", [cell(tmp_path, objectives=(WeightedLoss(MEASURE),))])
    assert_close(mixed.weights(), plain.weights())


@pytest.mark.parametrize("packed", (True, False))
def test_a_run_with_several_teachers_resumes_bit_for_bit(packed: bool, tmp_path: Path) -> None:
    cells = [cell(tmp_path, str(n), objectives=terms) for n, terms in enumerate((MIXTURE, SUM)[: 1 + packed])]

    def run(**changes: Any) -> Any:
        extra_teachers = [another("decoder-only")]
        return distil(tmp_path, "decoder-only", cells, packed=packed, more_teachers=extra_teachers, **changes)

    whole = run()
    run(save_strategy="steps", save_steps=3, max_steps=6, prepare=stop_after(3))
    folder = f"{cells[0].output_dir if packed else tmp_path}/checkpoint-3"
    again = run(resume=folder)
    for n in range(len(cells)):
        assert_identical(whole.weights(n), again.weights(n))


def stop_after(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == step

    return lambda trainer: trainer.add_callback(Stop())


def test_parked_teachers_come_to_the_device_one_after_another(tmp_path: Path) -> None:
    """On a CPU nothing moves, so what would is counted: the larger teacher, and the other one's head."""
    from gkd_lab.teachers import teacher

    counts_on_device: list[int] = []
    most = 0
    plain = teacher.use_on_device

    def counted(module: Any, device: Any, *, parked: bool) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def within() -> Any:
            nonlocal most
            size = sum({id(p): p.numel() for p in module.parameters()}.values()) if parked else 0
            counts_on_device.append(size)
            most = max(most, sum(counts_on_device))
            with plain(module, device, parked=parked):
                yield
            counts_on_device.remove(size)

        return within()

    teachers = [tiny_model("decoder-only", seed, width=32) for seed in (3, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "use_on_device", counted)
        distil(
            tmp_path,
            "decoder-only",
            [cell(tmp_path, objectives=MIXTURE)],
            teacher=teachers[0],
            more_teachers=[Teacher(teachers[1])],
            park_teacher=True,
        )
    larger = sum(p.numel() for p in teachers[0].parameters())
    assert not counts_on_device
    assert most == larger


def test_teachers_have_each_its_own_dtype(tmp_path: Path) -> None:
    run = distil(
        tmp_path,
        "decoder-only",
        [cell(tmp_path, objectives=MIXTURE)],
        more_teachers=[another("decoder-only", dtype="bfloat16")],
    )
    first, second = run.trainer.teachers
    assert first.head.model.dtype == torch.float64  # type: ignore[attr-defined]
    assert second.head.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert all(math.isfinite(loss) for loss in run.losses())


def test_a_missing_teacher_is_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher number 1.* 0 alone"):
        distil(tmp_path, "decoder-only", [cell(tmp_path, objectives=MIXTURE)])


def test_a_teacher_of_the_other_family_is_refused(tmp_path: Path) -> None:
    extra_teachers = [another("encoder-decoder")]
    with pytest.raises(ValueError, match=r"decoder-only.* teacher encoder-decoder"):
        distil(tmp_path, "decoder-only", [cell(tmp_path, objectives=MIXTURE)], more_teachers=extra_teachers)


def test_a_configuration_names_teachers_by_number() -> None:
    listed = [{"beta": 0.3, "teachers": [0, 1], "weights": [0.6, 0.4]}]
    assert parse(listed) == MIXTURE


def test_weights_that_are_all_0_are_refused() -> None:
    with pytest.raises(ValueError, match="weights are 0"):
        parse([{"weight": 0}, {"type": "cross_entropy", "weight": 0}])
