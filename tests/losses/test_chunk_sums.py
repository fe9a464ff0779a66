"""All cells and blocks at once, as on a GPU: the values of each cell alone, and no wait for the device."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_lab.losses import chunk_sums
from gkd_lab.losses.cell_losses import CellLosses
from gkd_lab.losses.chunk_sums import build_index, write_rows
from gkd_lab.losses.divergence import Divergence
from gkd_lab.losses.fused_loss import compute_cell_losses
from gkd_lab.losses.label_losses import CrossEntropy
from gkd_lab.losses.loss import TeacherLoss
from gkd_lab.losses.teacher_targets import HiddenTeacherLogits, TeacherTarget
from gkd_lab.losses.terms import WeightedLoss, WeightedLosses
from gkd_lab.models.projection import Projection

from .loss_problems import normal

LENGTHS = (13, 5, 9, 0)
TOKENS, WIDTH, VOCABULARY = 13, 6, 17
FORWARD, REVERSE, JSD = (
    Divergence(beta=0.0),
    Divergence(beta=1.0),
    Divergence(beta=0.3, teacher_temperature=2.0),
)
MIXTURE = TeacherTarget((0, 1), weights=(0.75, 0.25))
ROUTED = TeacherTarget((0, 1), routed=True)


class SecondOrder(TeacherLoss):
    """A user's loss, which knows of tokens alone: half the squared distance of the logits."""

    def value_and_gradient(
        self, student_logits_NV: Tensor, teacher_logits_NV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert student_logits_NV.dim() == teacher_logits_NV.dim() == 2
        gap = student_logits_NV - teacher_logits_NV
        return gap.square().sum(-1) / 2, gap, torch.zeros(len(gap), dtype=gap.dtype)


OWN_LOSS = SecondOrder()
TERMS: tuple[WeightedLosses, ...] = (
    (WeightedLoss(FORWARD),),
    (WeightedLoss(JSD, 0.5), WeightedLoss(CrossEntropy(), 2.0)),
    (WeightedLoss(FORWARD),),
    (WeightedLoss(FORWARD),),
    (WeightedLoss(REVERSE, target=MIXTURE), WeightedLoss(FORWARD, target=ROUTED)),
    (WeightedLoss(JSD, 0.5), WeightedLoss(CrossEntropy(), 2.0)),
    (WeightedLoss(OWN_LOSS),),
    (WeightedLoss(FORWARD),),
    (WeightedLoss(OWN_LOSS),),
)
BLOCKS = (0, 1, 2, 0, 1, 2, 2, 3, 2)
"""Cells of one kind are at uneven distances, share blocks or do not, and one has nothing to train on."""


def build_arguments(**changes: Any) -> dict[str, Any]:
    cells, blocks = len(BLOCKS), len(LENGTHS)
    weights = normal(5, cells, TOKENS).abs()
    for cell, block in enumerate(BLOCKS):
        weights[cell, LENGTHS[block] :] = 0
    teachers = {
        number: HiddenTeacherLogits(
            normal(10 + number, blocks, TOKENS, 5), Projection(normal(20 + number, VOCABULARY, 5))
        )
        for number in (0, 1)
    }
    return {
        "student": normal(1, cells, TOKENS, WIDTH).requires_grad_(),
        "student_head": Projection(
            normal(2, cells, VOCABULARY, WIDTH).requires_grad_(),
            normal(3, cells, VOCABULARY).requires_grad_(),
            softcap=3.0,
        ),
        "teacher": None,
        "teacher_head": None,
        "block_of_cell": BLOCKS,
        "terms": TERMS,
        "weights": weights,
        "teachers": teachers,
        "labels": torch.randint(VOCABULARY, (cells, TOKENS), generator=torch.Generator().manual_seed(4)),
        "routes": torch.arange(blocks * TOKENS).view(blocks, TOKENS) % 2,
        "scales": {(1, 1): normal(6, TOKENS), (5, 1): normal(7, TOKENS)},
        **changes,
    }


def compute_results(arguments: dict[str, Any]) -> tuple[CellLosses, tuple[Tensor, ...]]:
    """Return values and gradients of a sum in which each cell has a factor of its own."""
    sums, head = compute_cell_losses(**arguments), arguments["student_head"]
    factors = torch.linspace(0.5, 2, len(sums.losses), dtype=sums.losses.dtype)
    parameters = (arguments["student"], head.weight, head.bias)
    return sums, torch.autograd.grad((sums.losses * factors).sum(), parameters)


def assert_equal_results(arguments: dict[str, Any]) -> None:
    """Compare with the same cells block by block; those are compared with the plain formulas elsewhere."""
    expected, expected_gradients = compute_results({**arguments, "lengths": None})
    actual, gradients = compute_results(arguments)
    for name in ("losses", "entropies", "terms"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_sums, "takes_all_blocks", lambda device: True)
    monkeypatch.setattr(chunk_sums, "SLICE_BYTES", 2**40)


@pytest.mark.parametrize("tokens", (1, 4, 5, 12, 13, 100))
def test_all_blocks_at_once_equal_each_alone(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_sums, "MIN_CHUNK_TOKENS", 1)
    rows = 2 * len(LENGTHS) + len(BLOCKS)
    monkeypatch.setattr(chunk_sums, "CHUNK_BYTES", tokens * rows * VOCABULARY * 8)
    assert_equal_results(build_arguments(lengths=LENGTHS))


@pytest.mark.parametrize("tokens", (1, 3, 50))
def test_blocks_that_do_not_fit_together_are_taken_one_by_one(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_sums, "CHUNK_BYTES", tokens * 3 * VOCABULARY * 8)
    assert_equal_results(build_arguments(lengths=LENGTHS))


@pytest.mark.parametrize("tokens", (1, 4))
def test_slices_of_all_cells_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_sums, "SLICE_BYTES", tokens * VOCABULARY * 8)
    assert_equal_results(build_arguments(lengths=LENGTHS))


def test_without_gradients_the_values_are_the_same() -> None:
    arguments = build_arguments(lengths=LENGTHS)
    expected = compute_results(arguments)[0].losses
    with torch.no_grad():
        torch.testing.assert_close(compute_cell_losses(**arguments).losses, expected.detach())


class OperatorNames(TorchDispatchMode):
    """Counts the operators that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operator._schema.name] += 1
        return operator(*args, **(kwargs or {}))


def count_operators(**changes: Any) -> Counter[str]:
    with OperatorNames() as names:
        compute_results(build_arguments(**{"lengths": LENGTHS, **changes}))
    return names.counts


def test_nothing_waits_for_the_device_before_the_gradients_are_there() -> None:
    counts = count_operators()
    assert counts["aten::bmm"] or counts["aten::baddbmm_"]
    waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
    assert not any(counts[name] for name in waits)


def test_cells_of_one_kind_cost_as_many_operators_however_many_they_are() -> None:
    def count(cells: int) -> int:
        head = Projection(normal(2, cells, VOCABULARY, WIDTH).requires_grad_(), normal(3, cells, VOCABULARY))
        head.bias.requires_grad_()  # type: ignore[union-attr]
        return count_operators(
            student=normal(1, cells, TOKENS, WIDTH).requires_grad_(),
            student_head=head,
            block_of_cell=tuple(n % 3 for n in range(cells)),
            terms=[FORWARD if n % 2 else JSD for n in range(cells)],
            weights=normal(5, cells, TOKENS).abs(),
            lengths=(TOKENS,) * len(LENGTHS),
            labels=None,
            scales={},
        ).total()

    assert count(12) == count(6)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    (
        ((4,), slice(4, 5, 1)),
        ((2, 2, 2), slice(2, 3)),
        ((1, 4, 7), slice(1, 8, 3)),
        ((0, 1, 3), None),
        ((3, 1), None),
        ((0, 0, 1), None),
    ),
)
def test_even_distances_become_views(numbers: Sequence[int], expected: slice | None) -> None:
    index = build_index(numbers, torch.device("cpu"))
    if expected is None:
        assert isinstance(index, Tensor) and index.tolist() == list(numbers)
    else:
        assert index == expected


@pytest.mark.parametrize("cells", (slice(0, 3, 2), torch.tensor([2, 0])))
@pytest.mark.parametrize("rows", (slice(1, 3), torch.tensor([3, 0])))
def test_values_are_written_where_they_would_be_read(cells: Any, rows: Any) -> None:
    tensor, values = torch.zeros(3, 4, 2), normal(1, 2, 2, 2, dtype=torch.float32)
    write_rows(tensor, cells, rows, values)
    torch.testing.assert_close(tensor[cells][:, rows], values)
    assert tensor.count_nonzero() == values.numel()
