"""FLOPs are estimated from the spec, and for a loaded model from its number of parameters."""

import pytest

from gkd_lab import experiments
from gkd_lab.config import Cell
from gkd_lab.config.cost import count_model_parameters, estimate_sft_flops, estimate_training_flops


@pytest.fixture(scope="module")
def cell() -> Cell:
    return experiments.load("quickstart", overrides={"lmbda": "0.5", "beta": "0"}).cells[0]


def test_training_flops_are_proportional_to_the_tokens(cell: Cell) -> None:
    training = cell.training
    tokens = (training.max_input_tokens + training.max_output_tokens) * training.batch_size * training.steps
    assert estimate_training_flops(training, 10, 100) == (6 * 10 + 2 * 100 + 2 * 10 * 0.5) * tokens
    twice = training.model_copy(update={"steps": 2 * training.steps})
    assert estimate_training_flops(twice) == 2 * estimate_training_flops(training)  # type: ignore[operator]


def test_explicit_and_counted_parameters_give_the_same_cost(cell: Cell) -> None:
    start, teacher = cell.training.start, cell.training.teacher
    assert estimate_training_flops(cell.training) == estimate_training_flops(
        cell.training, count_model_parameters(start), count_model_parameters(teacher)
    )
    assert estimate_sft_flops(start) == estimate_sft_flops(start, count_model_parameters(start))


def test_the_cost_of_a_loaded_model_needs_its_parameters(cell: Cell) -> None:
    start = cell.training.start
    loaded = start.model_copy(update={"model": start.model.model_copy(update={"architecture": None})})
    training = cell.training.model_copy(update={"start": loaded})
    assert estimate_sft_flops(loaded) is None
    assert estimate_training_flops(training) is None
    assert estimate_sft_flops(loaded, 10) == pytest.approx(estimate_sft_flops(start, 10))
    assert estimate_training_flops(training, 10) == estimate_training_flops(cell.training, 10)
    assert estimate_sft_flops(loaded.model_copy(update={"sft": None})) == 0
