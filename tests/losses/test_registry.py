"""Experiments whose loss has several terms: each is logged, and a run that was broken off goes on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from gkd_lab.runner.progress import silence_libraries
from gkd_lab.runner.run import run_grid
from gkd_lab.store import Store

from ..runner.tiny_experiments import contents, interrupted_at, options, tiny_grid

TERMS: dict[str, list[dict[str, Any]]] = {
    "soft and hard": [
        {"beta": 0, "teacher_temperature": 2, "student_temperature": 2, "square_temperature": True},
        {"type": "cross_entropy", "weight": 0.5, "final_weight": 0.1},
    ],
    "hidden states": [{"beta": 0.1}, {"type": "hidden_states", "weight": 0.1}],
    "attention": [{"beta": 0.1}, {"type": "attentions", "loss": "kl", "weight": 0.5}],
    "discriminator": [{"beta": 0.1}, {"type": "adversarial", "width": 8, "weight": 0.1}],
}
GREEDY: dict[str, Any] = {"evaluations": [{"decoding": "greedy"}]}


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    silence_libraries()


def test_gradients_of_terms_are_logged_on_request(tmp_path: Path) -> None:
    grid = tiny_grid(tmp_path, "arithmetic", grid={"objectives": list(TERMS.values())}, lmbda=0, **GREEDY)
    found = []
    for asked in (False, True):
        outputs = tmp_path / str(asked)
        assert run_grid(grid, options(outputs, term_gradients=asked)).failures == []
        found.append([Store(outputs).get_record(cell).read_history() for cell in grid.cells])
    for cell, plain, measured in zip(grid.cells, *found, strict=True):
        for row, more in zip(plain, measured, strict=True):
            added = {f"grad_norm/{one.type}" for one in cell.training.objectives}
            assert more.keys() - row.keys() == added
            assert {name: more[name] for name in row} == row
        # A discriminator sees no difference at first.
        assert all(measured[-1][name] > 0 for name in added)


@pytest.mark.slow
@pytest.mark.parametrize("task", ("arithmetic", "translation"))
def test_terms_cross_in_a_grid_and_go_on_bit_for_bit(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("straight", "broken off"):
        axes = {"objectives": list(TERMS.values()), "lmbda": [0, 1]}
        grid = tiny_grid(tmp_path / name, task, grid=axes, **GREEDY)
        outputs = tmp_path / name / "outputs"
        if name == "broken off":
            with interrupted_at(3, monkeypatch):
                run_grid(grid, options(outputs))
        assert run_grid(grid, options(outputs)).failures == []
        found.append(contents(outputs))
    store = Store(outputs)
    assert store.get_record(grid.cells[0]).read_provenance()["resumed_at_step"] == 2
    assert found[0] == found[1]
    auto = AutoModelForSeq2SeqLM if task == "translation" else AutoModelForCausalLM
    for cell in grid.cells:
        record = store.get_record(cell)
        kinds = [one.type for one in cell.training.objectives]
        for row in record.read_history():
            assert {f"loss/{kind}" for kind in kinds} <= row.keys()
            assert all(row[f"loss/{kind}"] > 0 for kind in kinds if cell.lmbda == 0)
        _, info = auto.from_pretrained(record.checkpoint, output_loading_info=True)
        assert not any(info.values())
