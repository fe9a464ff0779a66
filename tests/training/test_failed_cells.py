"""A cell whose loss or gradient is no number is frozen, and its neighbours go on as if it were not there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gkd_lab.config.artifact_specs import Family
from gkd_lab.training.pack_trainer import AllCellsFailed

from ..models.tiny import FAMILIES, tiny_model
from .driving import assert_identical, cell, distil, mixed

pytestmark = pytest.mark.usefixtures("float64_norms")


def poisoned(cells: int, broken: int, family: Family = "decoder-only") -> list[Any]:
    models = [tiny_model(family, 7) for _ in range(cells)]
    with torch.no_grad():
        models[broken].get_input_embeddings().weight[5] = torch.nan
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_without_a_number_is_frozen_and_its_neighbours_go_on(family: Family, tmp_path: Path) -> None:
    cells = mixed(tmp_path)
    healthy = distil(tmp_path, family, cells)
    run = distil(tmp_path, family, cells, students=poisoned(len(cells), 1, family))
    assert list(run.trainer.failures) == [1]
    assert run.trainer.failures[1].startswith("the loss is nan")
    for n in (0, 2, 3, 4):
        assert run.history[n] == healthy.history[n]
        assert_identical(run.weights(n), healthy.weights(n))
    before = poisoned(1, 0, family)[0]
    for name, value in before.named_parameters():
        torch.testing.assert_close(run.weights(1)[name], value.detach(), equal_nan=True)


@pytest.mark.parametrize("optimizer", ("adamw_torch_fused", "adafactor"))
def test_a_cell_that_diverges_later_is_frozen_then(optimizer: str, tmp_path: Path) -> None:
    calm, wild = cell(tmp_path, "0"), cell(tmp_path, "1", learning_rate=1e200)
    options: dict[str, Any] = {"max_steps": 8, "optim": optimizer}
    run = distil(tmp_path, "decoder-only", [calm, wild], **options)
    healthy = distil(tmp_path, "decoder-only", [calm, replace(wild, learning_rate=1e-3)], **options)
    assert list(run.trainer.failures) == [1]
    assert 1 < int(run.trainer.failures[1].rsplit(" ", 1)[1]) <= 8
    assert run.history[0] == healthy.history[0]
    assert_identical(run.weights(0), healthy.weights(0))


def test_training_stops_with_the_reasons_when_all_cells_fail(tmp_path: Path) -> None:
    models = [poisoned(1, 0)[0], poisoned(1, 0)[0]]
    cells = [cell(tmp_path, str(n), lmbda=lmbda) for n, lmbda in enumerate((0.0, 1.0))]
    with pytest.raises(AllCellsFailed, match="nan at step"):
        distil(tmp_path, "decoder-only", cells, students=models)


def test_a_plain_model_that_fails_stops_too(tmp_path: Path) -> None:
    with pytest.raises(AllCellsFailed, match="nan at step 1"):
        distil(tmp_path, "decoder-only", [cell(tmp_path, lmbda=0)], packed=False, students=poisoned(1, 0))
