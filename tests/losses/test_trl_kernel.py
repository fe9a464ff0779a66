"""TRL's kernel, which the fused loss calls on a GPU, against our own code, and the cases that it lacks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd_lab.losses import fused_loss
from gkd_lab.losses.cell_losses import LossArguments
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits
from gkd_lab.losses.terms import list_terms
from gkd_lab.models.projection import Projection

from .loss_problems import EVERY, HEADS, TOKENS, Problem, derivatives, normal, problem


@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 1.0))
@pytest.mark.parametrize("temperatures", ((1.0, 1.0), (0.9, 0.9), (1.0, 0.1), (1.5, 0.5)))
@pytest.mark.parametrize("head", (HEADS[0], HEADS[1], HEADS[2]), ids=str)
def test_the_path_through_trls_kernel_agrees_with_our_own(
    beta: float, temperatures: tuple[float, float], head: dict[str, Any]
) -> None:
    divergence = Divergence("jsd", beta, *temperatures, rescale=beta == 0.1)
    case = problem([divergence], rows=(17, 19), dtype=torch.float32, **head)
    assert_paths_agree(replace(case, weights=case.weights.float()))


@pytest.mark.parametrize("rows", ((17, 19), (19, 17)))
@pytest.mark.parametrize("vocabulary", (None, 11))
def test_both_paths_agree_with_soft_caps_and_on_a_part_of_the_vocabulary(
    rows: tuple[int, int], vocabulary: int | None
) -> None:
    divergence = Divergence(beta=0.3, student_temperature=0.7, teacher_temperature=0.7)
    case = problem([divergence], rows=rows, dtype=torch.float32, **HEADS[4])
    assert_paths_agree(replace(case, vocabulary=vocabulary))


def build_arguments(case: Problem) -> tuple[Tensor, Projection, Any]:
    arguments = dict(vars(case))
    student, head = arguments.pop("student"), arguments.pop("student_head")
    objectives = tuple(list_terms(terms_of_cell) for terms_of_cell in arguments.pop("terms"))
    teachers = {0: HiddenTeacherLogits(arguments.pop("teacher"), arguments.pop("teacher_head"))}
    loss_arguments = LossArguments(
        **arguments, teachers=teachers, terms=objectives, labels=None, routes=None, scales={}
    )
    return student, head, loss_arguments


def assert_paths_agree(case: Problem) -> None:
    student, head, loss_arguments = build_arguments(case)
    assert fused_loss._is_trl_computable(student, head, loss_arguments)
    ours, theirs = (
        fused_loss._compute_in_chunks(student, head, loss_arguments),
        fused_loss._compute_by_trl(student, head, loss_arguments),
    )
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(ours.entropies, theirs.entropies, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(
        derivatives(ours.losses, case.parameters()),
        derivatives(theirs.losses, case.parameters()),
        rtol=5e-5,
        atol=5e-5,
    )


def unfit() -> dict[str, Problem]:
    single = problem(EVERY[:1], dtype=torch.float32, bias=True)
    head, teacher_head = single.student_head, single.teacher_head
    assert head.bias is not None
    excluded = head.bias.detach().clone()
    excluded[3] = -torch.inf
    return {
        "float64": problem(EVERY[:1]),
        "several cells": problem(EVERY[:2], (0, 0), dtype=torch.float32),
        "total variation": problem([Divergence("tv")], dtype=torch.float32),
        "an infinite bias": replace(single, student_head=replace(head, bias=excluded)),
        "logits": replace(single, student=normal(1, 1, TOKENS, 17).float(), student_head=Projection(None)),
        "a teacher that is capped at another temperature": replace(
            single, teacher_head=replace(teacher_head, softcap=2.0)
        ),
    }


@pytest.mark.parametrize("case", unfit())
def test_cases_that_trls_kernel_lacks_use_our_own_code(case: str) -> None:
    student, head, loss_arguments = build_arguments(unfit()[case])
    assert not fused_loss._is_trl_computable(student, head, loss_arguments)
