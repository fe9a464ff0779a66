"""Section 2 of the paper against hand values, its own inequalities and TRL's implementation."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from gkd_lab.distill.divergence import generalized_jsd

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
INSIDE = (0.1, 0.5, 0.9)


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def log(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def entropy(beta: float) -> float:
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def test_the_ends_are_the_two_kls_of_the_teacher_and_the_student() -> None:
    teacher, student = log(0.75, 0.25), log(0.5, 0.5)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    assert generalized_jsd(student, teacher, 0.0).item() == pytest.approx(forward, abs=1e-15)
    assert generalized_jsd(student, teacher, 1.0).item() == pytest.approx(reverse, abs=1e-15)


def test_inside_beta_weighs_the_teacher_in_the_mixture_and_in_the_sum() -> None:
    teacher, student = log(0.6, 0.3, 0.1), log(0.2, 0.2, 0.6)
    mixture = [0.1 * 0.6 + 0.9 * 0.2, 0.1 * 0.3 + 0.9 * 0.2, 0.1 * 0.1 + 0.9 * 0.6]
    to_teacher = sum(p * math.log(p / m) for p, m in zip((0.6, 0.3, 0.1), mixture, strict=True))
    to_student = sum(q * math.log(q / m) for q, m in zip((0.2, 0.2, 0.6), mixture, strict=True))
    expected = 0.1 * to_teacher + 0.9 * to_student
    assert generalized_jsd(student, teacher, 0.1).item() == pytest.approx(expected, abs=1e-15)


def test_one_half_of_disjoint_certainties_is_log_two() -> None:
    teacher, student = log(1.0, 0.0), log(0.0, 1.0)
    assert generalized_jsd(student, teacher, 0.5).item() == pytest.approx(math.log(2), abs=1e-15)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_positive_and_zero_only_for_equal_distributions(beta: float) -> None:
    student, teacher = logits(0, 500, 7), logits(1, 500, 7)
    assert (generalized_jsd(student, teacher, beta) > 1e-4).all()
    shifted = student + logits(2, 500, 1)
    assert generalized_jsd(student, shifted, beta).abs().max() < 1e-14


@pytest.mark.parametrize("beta", BETAS)
def test_exchanging_the_models_exchanges_beta_and_its_complement(beta: float) -> None:
    student, teacher = logits(0, 200, 9), logits(1, 200, 9)
    there = generalized_jsd(student, teacher, beta)
    back = generalized_jsd(teacher, student, 1 - beta)
    torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", (1e-3, 0.1, 0.5, 0.9))
def test_it_is_at_most_the_entropy_of_beta(beta: float) -> None:
    bound = entropy(beta)
    values = generalized_jsd(logits(0, 500, 5, scale=20), logits(1, 500, 5, scale=20), beta)
    assert values.max() <= bound + 1e-14  # rounding of disjoint distributions, which reach it
    assert values.max() > 0.9 * bound


def test_divided_by_its_small_weight_it_becomes_a_kl() -> None:
    student, teacher = logits(0, 50, 6, scale=1), logits(1, 50, 6, scale=1)
    for end, beta in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        kl = generalized_jsd(student, teacher, end)
        scaled = generalized_jsd(student, teacher, beta) / 1e-6
        torch.testing.assert_close(scaled, kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_order_of_the_vocabulary_does_not_matter(beta: float) -> None:
    student, teacher = logits(0, 20, 11), logits(1, 20, 11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    moved = generalized_jsd(student[:, order], teacher[:, order], beta)
    torch.testing.assert_close(moved, generalized_jsd(student, teacher, beta), rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_does_not_depend_on_the_others_in_the_batch(beta: float) -> None:
    student, teacher = logits(0, 30, 8), logits(1, 30, 8)
    mask = torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.5
    alone = generalized_jsd(student[mask], teacher[mask], beta)
    assert torch.equal(alone, generalized_jsd(student, teacher, beta)[mask])


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_those_of_the_value(beta: float) -> None:
    student = logits(0, 3, 5, scale=1).requires_grad_()
    teacher = logits(1, 3, 5, scale=1).requires_grad_()

    def value(q: Tensor, p: Tensor) -> Tensor:
        return generalized_jsd(q, p, beta, student_temperature=0.7, teacher_temperature=1.3)

    assert torch.autograd.gradcheck(value, (student, teacher))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_excluded_tokens_never_make_a_nan(beta: float, dtype: torch.dtype) -> None:
    of_student, of_teacher = ((), (0,), (1,), (0, 1)), ((), (0,), (2,), (0, 2))
    for student_excludes, teacher_excludes in itertools.product(of_student, of_teacher):
        student, teacher = logits(0, 4, 5, scale=1).to(dtype), logits(1, 4, 5, scale=1).to(dtype)
        student[:, list(student_excludes)] = -torch.inf
        teacher[:, list(teacher_excludes)] = -torch.inf
        student.requires_grad_()
        values = generalized_jsd(student, teacher, beta, teacher_temperature=0.1)
        values.sum().backward()
        assert values.isfinite().all()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        if 0 < beta < 1:
            assert values.max() <= entropy(beta) + 1e-6


@pytest.mark.parametrize("beta", BETAS)
def test_tokens_that_both_exclude_are_as_if_they_were_not_there(beta: float) -> None:
    student, teacher = logits(0, 10, 6), logits(1, 10, 6)
    without = generalized_jsd(student[:, 1:], teacher[:, 1:], beta)
    student[:, 0] = teacher[:, 0] = -torch.inf
    torch.testing.assert_close(generalized_jsd(student, teacher, beta), without, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beta", INSIDE)
def test_a_token_that_one_side_excludes_costs_what_a_tiny_probability_costs(beta: float) -> None:
    student, teacher = logits(0, 10, 6), logits(1, 10, 6)
    student[:, 0] = -torch.inf
    nearly = student.clone()
    nearly[:, 0] = -60.0
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta),
        generalized_jsd(nearly, teacher, beta),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_logits_give_no_negative_value_and_are_computed_in_float32(beta: float) -> None:
    student = logits(0, 400, 50, scale=1).bfloat16()
    teacher = student + (0.02 * logits(1, 400, 50)).bfloat16()
    values = generalized_jsd(student, teacher, beta)
    assert values.dtype == torch.float32
    assert (values >= 0).all()
    exact = generalized_jsd(student.double(), teacher.double(), beta)
    torch.testing.assert_close(values.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_each_temperature_divides_its_own_logits(beta: float) -> None:
    student, teacher = logits(0, 20, 6), logits(1, 20, 6)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta, student_temperature=2.0, teacher_temperature=0.5),
        generalized_jsd(student / 2, teacher * 2, beta),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", (1.0, 0.9))
def test_it_equals_that_of_trl(beta: float, temperature: float) -> None:
    student, teacher = logits(0, 2, 6, 9), logits(1, 2, 6, 9)
    theirs = TrlGKDTrainer.generalized_jsd_loss(
        student, teacher, beta=beta, temperature=temperature, reduction="none"
    )
    ours = generalized_jsd(
        student.flatten(0, 1),
        teacher.flatten(0, 1),
        beta,
        student_temperature=temperature,
        teacher_temperature=temperature,
    )
    torch.testing.assert_close(ours, theirs.sum(-1).flatten(), rtol=0, atol=1e-12)
