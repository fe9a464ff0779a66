"""The loss that never keeps full logits against plain formulas, autograd and TRL's kernel."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_lab.losses import chunk_sums
from gkd_lab.losses.divergence import Divergence
from gkd_lab.models import projection
from gkd_lab.models.projection import Projection

from .loss_problems import (
    EVERY,
    HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Problem,
    derivatives,
    normal,
    problem,
)


def assert_like_the_reference(case: Problem, tolerance: float = 1e-12) -> None:
    losses, reference = case.sums().losses, case.dense()
    torch.testing.assert_close(losses, reference, rtol=tolerance, atol=tolerance)
    actual = derivatives(losses, case.parameters())
    expected = derivatives(reference, case.parameters())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@contextmanager
def set_chunk_tokens(tokens: int, case: Problem, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logits = (len(case.student) + len(case.teacher)) * VOCABULARY * 8
    with monkeypatch.context() as patch:
        patch.setattr(chunk_sums, "CHUNK_BYTES", tokens * logits)
        yield


@pytest.mark.parametrize("divergence", EVERY, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_one_cell_has_the_value_and_gradients_of_the_reference(
    divergence: Divergence, head: dict[str, Any]
) -> None:
    assert_like_the_reference(problem([divergence], **head))


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_packed_cells_that_share_teacher_rows_have_those_of_the_reference(head: dict[str, Any]) -> None:
    assert_like_the_reference(problem(EVERY, (0, 1, 0, 2, 1), **head))


@pytest.mark.parametrize("tokens", (1, 2, 3, 10, 11, 12, 100))
def test_the_size_of_chunks_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(EVERY[:3], (0, 1, 0), bias=True, softcap=3.0)
    with set_chunk_tokens(tokens, case, monkeypatch):
        assert_like_the_reference(case)


@pytest.mark.parametrize("tokens", (1, 4))
def test_the_size_of_slices_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_sums, "SLICE_BYTES", tokens * VOCABULARY * 8)
    assert_like_the_reference(problem(EVERY[:3], (0, 1, 0), bias=True))


@pytest.mark.parametrize("rows", ((17, 19), (19, 17)))
@pytest.mark.parametrize("vocabulary", (None, 11, 17))
def test_only_the_shared_or_requested_vocabulary_counts(
    rows: tuple[int, int], vocabulary: int | None
) -> None:
    case = replace(problem(EVERY[:3], (0, 1, 0), rows=rows, bias=True), vocabulary=vocabulary)
    assert_like_the_reference(case)
    case.sums().losses.sum().backward()
    weight = case.student_head.weight
    assert weight is not None
    assert weight.grad is not None
    assert weight.grad[:, vocabulary or 17 :].eq(0).all()


def test_logits_may_be_given_instead_of_hidden_states_and_heads() -> None:
    case = replace(
        problem(EVERY[:3], (0, 1, 0)),
        student=normal(8, 3, TOKENS, VOCABULARY + 2).requires_grad_(),
        student_head=Projection(None, normal(9, 3, VOCABULARY + 2).requires_grad_(), softcap=2.0),
        teacher=normal(10, 2, TOKENS, VOCABULARY),
        teacher_head=Projection(None, scale=0.5),
    )
    assert_like_the_reference(case)


def test_gradients_are_the_finite_differences_of_the_value() -> None:
    case = problem(EVERY[:3], (0, 1, 0), bias=True, softcap=2.0)
    gradients = derivatives(case.sums().losses, case.parameters())
    factors, step = torch.linspace(0.5, 2, 3, dtype=torch.float64), 1e-6
    for seed, (parameter, gradient) in enumerate(zip(case.parameters(), gradients, strict=True)):
        direction = normal(20 + seed, *parameter.shape)
        values = []
        for sign in (1, -2):  # one step forward, then to one step back
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(case.sums().losses @ factors)
        slope = (values[0] - values[1]) / (2 * step)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-7)
        with torch.no_grad():
            parameter += step * direction


def test_a_bias_that_cells_share_and_that_is_not_trained_is_added_to_each() -> None:
    case = problem(EVERY[:3], (0, 1, 0))
    shared = replace(case.student_head, bias=normal(9, VOCABULARY))
    case = replace(case, student_head=shared)
    parameters = case.parameters()[:2]
    losses, reference = case.sums().losses, case.dense()
    torch.testing.assert_close(losses, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(derivatives(losses, parameters), derivatives(reference, parameters))


def test_entropies_are_those_of_the_student_at_its_temperature_where_something_is_trained() -> None:
    case = problem(EVERY[:3], (0, 1, 0), softcap=2.0)
    actual = case.sums().entropies
    assert not actual.requires_grad
    for cell, divergence in enumerate(case.terms):
        logits = case.student_head(case.student)[cell] / divergence.student_temperature
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        expected = entropies[case.weights[cell] > 0].sum()
        assert actual[cell].item() == pytest.approx(expected.item(), abs=1e-12)


def test_only_tensors_that_require_a_gradient_get_one() -> None:
    case = problem(EVERY[:2], (0, 0), bias=True)
    expected = derivatives(case.dense(), case.parameters())
    for chosen in itertools.product((False, True), repeat=3):
        for parameter, wanted in zip(case.parameters(), chosen, strict=True):
            parameter.requires_grad_(wanted)
        losses = case.sums().losses
        assert losses.requires_grad == any(chosen)
        if any(chosen):
            needed = [p for p in case.parameters() if p.requires_grad]
            actual = derivatives(losses, needed)
            needed_gradients = [g for g, wanted in zip(expected, chosen, strict=True) if wanted]
            torch.testing.assert_close(actual, tuple(needed_gradients), rtol=0, atol=1e-12)


def test_without_gradients_the_values_are_the_same() -> None:
    case = problem(EVERY[:3], (0, 1, 0))
    with torch.no_grad():
        sums = case.sums()
    assert not sums.losses.requires_grad
    torch.testing.assert_close(sums.losses, case.dense().detach(), rtol=0, atol=1e-12)


def test_a_head_tied_to_the_embedding_adds_its_gradient_to_that_of_the_embedding() -> None:
    case = problem(EVERY[1:2])
    tied, ids = normal(8, VOCABULARY, WIDTH).requires_grad_(), torch.arange(TOKENS)[None]

    def model() -> Problem:
        return replace(case, student=tied[ids] * 2, student_head=Projection(tied))

    actual, expected = derivatives(model().sums().losses, [tied]), derivatives(model().dense(), [tied])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_second_backward_pass_is_refused_with_advice() -> None:
    losses = problem().sums().losses
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call it again"):
        losses.sum().backward()


def test_nothing_to_train_on_is_zero_with_zero_gradients() -> None:
    case = problem(EVERY[:3], (0, 1, 0), bias=True)
    case.weights = torch.zeros_like(case.weights)
    losses = case.sums().losses
    assert losses.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in derivatives(losses, case.parameters()))


def test_tokens_without_weight_are_as_if_they_were_not_there() -> None:
    case = problem(EVERY[:2], (0, 0))
    with torch.no_grad():
        case.student[:, 2] = case.teacher[:, 2] = torch.nan
    losses = case.sums().losses
    assert losses.isfinite().all()
    actual = derivatives(losses, case.parameters())
    assert all(gradient.isfinite().all() for gradient in actual)
    assert actual[0][:, 2].eq(0).all()


def test_a_broken_cell_breaks_no_other() -> None:
    case = problem(EVERY[:3], (0, 1, 0))
    expected = derivatives(case.dense(), case.parameters())
    with torch.no_grad():
        case.student[1] = torch.nan
    actual = derivatives(case.sums().losses, case.parameters())
    for gradient, reference in zip(actual, expected, strict=True):
        assert gradient[1].isnan().any()
        torch.testing.assert_close(gradient[[0, 2]], reference[[0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_biases_that_exclude_tokens_make_no_nan(dtype: torch.dtype) -> None:
    sets = ((), (0,), (3,), (0, 3))
    for of_student, of_teacher in itertools.product(sets, sets):
        case = problem(EVERY, (0,) * 5, dtype=dtype, bias=True)
        student_bias, teacher_bias = case.student_head.bias, case.teacher_head.bias
        assert student_bias is not None
        assert teacher_bias is not None
        with torch.no_grad():
            student_bias[:, list(of_student)] = -torch.inf
            teacher_bias[list(of_teacher)] = -torch.inf
        losses = case.sums().losses
        bounded = torch.tensor([d.kind == "tv" or 0 < d.beta < 1 for d in EVERY])
        torch.testing.assert_close(losses[bounded], case.dense()[bounded].to(dtype), rtol=1e-5, atol=1e-5)
        actual = derivatives(losses[bounded], case.parameters())
        assert all(gradient.isfinite().all() for gradient in actual)
        if set(of_student) >= set(of_teacher):  # else the reverse KL stands for infinity
            assert derivatives(case.sums().losses[3:4], case.parameters())[0].isfinite().all()


@pytest.mark.parametrize("divergence", (*EVERY, Divergence(beta=0.9)), ids=str)
def test_bf16_hidden_states_give_float32_values_that_are_never_negative(divergence: Divergence) -> None:
    case = problem([divergence], dtype=torch.bfloat16)
    near = replace(
        case,
        teacher=(case.student.detach().float() * 1.003).bfloat16(),
        teacher_head=Projection(case.student_head.weight.detach()),  # type: ignore[union-attr]
        terms=[Divergence(divergence.kind, divergence.beta)],
    )
    for token in range(TOKENS):
        alone = replace(near, weights=torch.eye(TOKENS)[token][None])
        assert alone.sums().losses.item() >= 0
    losses = case.sums().losses
    assert losses.dtype == torch.float32
    gradients = derivatives(losses, case.parameters())
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2


def convert_to_double(case: Problem) -> Problem:
    def wide(head: Projection) -> Projection:
        weight, bias = (None if t is None else t.detach().double() for t in (head.weight, head.bias))
        return replace(head, weight=weight, bias=bias)

    return replace(
        case,
        student=case.student.detach().double().requires_grad_(),
        student_head=wide(case.student_head),
        teacher=case.teacher.double(),
        teacher_head=wide(case.teacher_head),
    )


@pytest.mark.parametrize("rows", (5, 100))
def test_bf16_is_projected_into_float32_without_rounding_logits(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "CONVERTED_ROWS", rows)
    case = problem(EVERY[:3], (0, 1, 0), dtype=torch.bfloat16)
    exact = convert_to_double(case)
    torch.testing.assert_close(case.sums().losses.double(), exact.dense(), rtol=1e-5, atol=1e-5)
    (actual,) = derivatives(case.sums().losses, [case.student])
    (expected,) = derivatives(exact.dense(), [exact.student])
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)


def test_autocast_lowers_the_operands_as_in_the_model_and_nothing_else() -> None:
    case = problem(EVERY[:3], (0, 1, 0), dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.sums().losses
    assert under.dtype == torch.float32

    def rounded(head: Projection) -> Projection:
        assert head.weight is not None
        return replace(head, weight=head.weight.bfloat16())

    lowered = replace(
        case,
        student=case.student.bfloat16(),
        student_head=rounded(case.student_head),
        teacher=case.teacher.bfloat16(),
        teacher_head=rounded(case.teacher_head),
    )
    torch.testing.assert_close(under, lowered.sums().losses, rtol=1e-6, atol=1e-6)
    assert not torch.equal(under, case.sums().losses)
    actual = derivatives(under, case.parameters())
    assert {gradient.dtype for gradient in actual} == {torch.float32}


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor had which an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def largest(losses: Any) -> int:
    with Largest() as seen:
        losses().sum().backward()
    return seen.elements


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_no_tensor_as_large_as_the_logits_is_ever_made(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, vocabulary = 400, 300
    case = Problem(
        normal(1, 1, tokens, 4, dtype=dtype).requires_grad_(),
        Projection(normal(2, vocabulary, 4, dtype=dtype).requires_grad_()),
        normal(3, 1, tokens, 4, dtype=dtype),
        Projection(normal(4, vocabulary, 4, dtype=dtype)),
        (0,),
        EVERY[1:2],
        torch.ones(1, tokens),
    )
    monkeypatch.setattr(chunk_sums, "CHUNK_BYTES", 2 * vocabulary * 4 * 20)
    assert largest(lambda: case.sums().losses) <= 20 * vocabulary
    assert largest(case.dense) >= tokens * vocabulary


def test_what_does_not_fit_together_is_refused() -> None:
    case = problem(EVERY[:2], (0, 1))
    weight = case.student_head.weight
    assert weight is not None
    for wrong, message in (
        ({"weights": case.weights[:, :3]}, r"must be \(K, N, H_s\)"),
        ({"teacher": case.teacher[:, :3]}, r"must be \(K, N, H_s\)"),
        ({"terms": EVERY[:1]}, "one of each a cell"),
        ({"block_of_cell": (0, 2)}, r"must lie in range\(2\)"),
        ({"vocabulary": 18}, "not in 1 to 17"),
        ({"student_head": Projection(weight, weight[0, :, 0])}, r"need a bias \(K, V\)"),
        ({"student_head": Projection(weight[0])}, r"need a head \(K, V, H\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(case, **wrong).sums()
