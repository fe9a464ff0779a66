"""Section 2 of the paper against hand values, its own inequalities and TRL's implementation."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from gkd_lab import GKDTrainer
from gkd_lab.losses.divergence import Divergence, generalized_jsd, total_variation

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*experimental.*")
    from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
INSIDE = (0.1, 0.5, 0.9)
ALL = (*(Divergence(beta=beta) for beta in BETAS), Divergence("tv"))
WARM = tuple(
    Divergence(d.kind, d.beta, student_temperature=0.7, teacher_temperature=1.3, rescale=True) for d in ALL
)


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


@pytest.mark.parametrize("beta", (0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0))
@pytest.mark.parametrize("noise", (1e-4, 1e-3, 1e-2, 0.1, 1.0))
@pytest.mark.parametrize("size", (20, 2000))
def test_small_differences_have_the_value_of_float64(beta: float, noise: float, size: int) -> None:
    """Relative to float64, whose own rounding is 1e-9 of the value or less."""
    student = logits(0, 64, size)
    teacher = (student + noise * logits(1, 64, size, scale=1)).float()
    student = student.float()
    exact = Divergence(beta=beta)(student.double(), teacher.double())
    values = Divergence(beta=beta)(student, teacher)
    assert ((values.double() - exact).abs() <= 1e-3 * exact).all()
    total = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    assert total.item() == pytest.approx(exact.sum().item(), rel=1e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_small_differences_have_a_gradient(beta: float) -> None:
    """A value that is clamped at 0 has none."""
    student = logits(0, 400, 50, scale=1).float().requires_grad_()
    teacher = student.detach() + 1e-5 * logits(1, 400, 50).float()
    Divergence(beta=beta)(student, teacher).sum().backward()
    assert student.grad is not None and (student.grad.abs().sum(-1) > 0).all()


def test_total_variation_is_half_the_sum_of_the_differences() -> None:
    teacher, student = log(0.6, 0.3, 0.1), log(0.2, 0.2, 0.6)
    assert total_variation(student, teacher).item() == pytest.approx(0.5, abs=1e-15)
    assert total_variation(log(1.0, 0.0), log(0.0, 1.0)).item() == 1
    assert total_variation(teacher, teacher).item() == 0


def test_total_variation_takes_each_temperature_to_its_own_logits() -> None:
    student, teacher = logits(0, 20, 6), logits(1, 20, 6)
    torch.testing.assert_close(
        total_variation(student, teacher, student_temperature=2.0, teacher_temperature=0.5),
        total_variation(student / 2, teacher * 2),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", (1e-4, 0.1, 1.0, 10.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_jsd_of_one_half_is_bit_for_bit_symmetric(scale: float, dtype: torch.dtype) -> None:
    one, other = logits(1, 50, 40, scale=scale).to(dtype), logits(2, 50, 40, scale=scale).to(dtype)
    other[:, 3] = -torch.inf
    assert torch.equal(generalized_jsd(one, other, 0.5), generalized_jsd(other, one, 0.5))
    loss = GKDTrainer.generalized_jsd_loss
    assert loss(one[None], other[None], beta=0.5) == loss(other[None], one[None], beta=0.5)


@pytest.mark.parametrize("scale", (0.1, 1, 20))
def test_total_variation_is_symmetric_and_within_the_bounds_of_pinsker_and_bretagnolle_huber(
    scale: float,
) -> None:
    student, teacher = logits(0, 500, 7, scale=scale), logits(1, 500, 7, scale=scale)
    variation = total_variation(student, teacher)
    kl = generalized_jsd(student, teacher, 0.0)
    torch.testing.assert_close(variation, total_variation(teacher, student), rtol=0, atol=1e-15)
    assert (variation <= (kl / 2).sqrt()).all()
    assert (variation <= (1 - (-kl).exp()).sqrt() + 1e-12).all()
    half = generalized_jsd(student, teacher, 0.5)  # Lin 1991: JSD(1/2) <= log 2 * TV
    assert (half <= math.log(2) * variation + 1e-12).all()


def test_total_variation_obeys_the_triangle_inequality() -> None:
    a, b, c = (logits(seed, 500, 6) for seed in range(3))
    assert (total_variation(a, c) <= total_variation(a, b) + total_variation(b, c) + 1e-15).all()


@pytest.mark.parametrize("beta", INSIDE)
def test_rescaled_values_of_all_betas_agree_to_second_order(beta: float) -> None:
    student, step = logits(0, 50, 6, scale=1), logits(1, 50, 6, scale=1)

    def gap(size: float) -> float:
        teacher = student + size * step
        rescaled = Divergence(beta=beta, rescale=True)(student, teacher)
        return (rescaled / generalized_jsd(student, teacher, 0.0) - 1).abs().max().item()

    assert gap(1e-3) < 1e-3  # relative to the KL, so what differs is of third order
    assert gap(1e-3) == pytest.approx(10 * gap(1e-4), rel=0.01)


@pytest.mark.parametrize(("end", "near"), ((0.0, 1e-6), (1.0, 1 - 1e-6)))
def test_rescaling_is_continuous_at_both_ends_in_value_and_gradient(end: float, near: float) -> None:
    student, teacher = logits(0, 50, 6, scale=1), logits(1, 50, 6, scale=1)
    there = Divergence(beta=end, rescale=True).value_and_gradient(student, teacher)
    close = Divergence(beta=near, rescale=True).value_and_gradient(student, teacher)
    for exact, limit in zip(there, close, strict=True):
        torch.testing.assert_close(limit, exact, rtol=1e-4, atol=1e-5)


def test_rescaling_leaves_the_kls_and_total_variation_as_they_are() -> None:
    student, teacher = logits(0, 20, 6), logits(1, 20, 6)
    for plain in (Divergence(beta=0.0), Divergence(beta=1.0), Divergence("tv")):
        scaled = Divergence(plain.kind, plain.beta, rescale=True)
        assert torch.equal(scaled(student, teacher), plain(student, teacher))
    half = Divergence(beta=0.5, rescale=True)(student, teacher)
    assert torch.equal(half, 4 * generalized_jsd(student, teacher, 0.5))


@pytest.mark.parametrize("divergence", (*ALL, *WARM), ids=str)
def test_analytic_values_gradients_and_entropies_are_those_of_autograd(divergence: Divergence) -> None:
    student, teacher = logits(0, 30, 11).requires_grad_(), logits(1, 30, 11)
    values = divergence(student, teacher)
    values.sum().backward()
    found = divergence.value_and_gradient(student, teacher)
    q = (student.detach() / divergence.student_temperature).softmax(-1)
    torch.testing.assert_close(found[0], values.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(found[1], student.grad, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[2], -(q * q.log()).sum(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("divergence", (*ALL, *WARM), ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_analytic_gradients_are_finite_and_those_of_autograd_where_tokens_are_excluded(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    sets = ((), (0,), (2,), (0, 2))
    for of_student, of_teacher in itertools.product(sets, sets):
        student, teacher = logits(0, 4, 5, scale=1).to(dtype), logits(1, 4, 5, scale=1).to(dtype)
        student[:, list(of_student)] = -torch.inf
        teacher[:, list(of_teacher)] = -torch.inf
        student.requires_grad_()
        reference = divergence(student, teacher)
        reference.sum().backward()
        values, gradient, entropies = divergence.value_and_gradient(student, teacher)
        assert values.isfinite().all() and gradient.isfinite().all() and entropies.isfinite().all()
        tolerance = (
            1e-12 if dtype == torch.float64 else 1e-4
        )  # relative to a stand-in for infinity, under a KL
        torch.testing.assert_close(values, reference.detach(), rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(gradient, student.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_analytic_values_of_bf16_logits_are_float32_and_never_negative(divergence: Divergence) -> None:
    student = logits(0, 400, 50, scale=1).bfloat16()
    teacher = student + (0.02 * logits(1, 400, 50)).bfloat16()
    for values in (divergence(student, teacher), divergence.value_and_gradient(student, teacher)[0]):
        assert values.dtype == torch.float32
        assert (values >= 0).all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_values_smaller_than_rounding_are_never_negative(divergence: Divergence) -> None:
    student = logits(0, 400, 50, scale=1).float()
    teacher = student + 1e-5 * logits(1, 400, 50).float()
    for values in (divergence(student, teacher), divergence.value_and_gradient(student, teacher)[0]):
        assert (values >= 0).all()


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_analytic_values_survive_probabilities_too_small_for_a_float(divergence: Divergence) -> None:
    student, teacher = logits(0, 20, 9, scale=150).float(), logits(1, 20, 9, scale=150).float()
    values, gradient, _ = divergence.value_and_gradient(student, teacher)
    exact, slope, _ = divergence.value_and_gradient(student.double(), teacher.double())
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    (
        {"kind": "kl"},
        {"beta": -0.1},
        {"beta": 1.5},
        {"student_temperature": 0.0},
        {"teacher_temperature": -1.0},
    ),
    ids=str,
)
def test_a_divergence_that_does_not_exist_is_refused(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Divergence(**wrong)  # type: ignore[arg-type]
