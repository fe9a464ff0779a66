"""`student: {lora: ...}` in experiment files: fields, axes, identity, and what is refused."""

import sys
from typing import Any

import pytest

from gkd_lab.config import ConfigError
from gkd_lab.config.cell import Training
from gkd_lab.config.cost import estimate_training_flops
from gkd_lab.config.lora import LoraSpec, check_peft_is_installed
from gkd_lab.config.packs import explain_unpackable, group_cells_into_packs

from .stub import get_refusal, make_cell, make_grid


def make_lora(**fields: Any) -> LoraSpec | None:
    return make_cell(student={"lora": fields}).training.lora


def test_an_adapter_has_defaults_and_takes_every_field() -> None:
    assert make_lora() == LoraSpec(r=8, alpha=16, targets="all-linear", dropout=0)
    stated = make_lora(r=4, alpha=1.5, targets=["v_proj", "q_proj", "v_proj"], dropout=0.25)
    assert stated == LoraSpec(r=4, alpha=1.5, targets=("q_proj", "v_proj"), dropout=0.25)


def test_a_cell_without_an_adapter_keeps_its_fingerprint() -> None:
    plain, adapted = make_cell(), make_cell(student={"lora": {}})
    assert plain.training.lora is None and "lora" not in plain.training.canonical_json
    spec = plain.training.model_dump(mode="json")
    del spec["lora"]  # as records from before the field have it
    assert Training.model_validate(spec).full_fingerprint == plain.training.full_fingerprint
    assert adapted.training.full_fingerprint != plain.training.full_fingerprint
    assert adapted.training.start == plain.training.start


@pytest.mark.parametrize("changes", [{"r": 4}, {"alpha": 8}, {"targets": ["q_proj"]}, {"dropout": 0.1}])
def test_every_field_is_part_of_the_identity(changes: dict[str, Any]) -> None:
    cell = make_cell(student={"lora": changes})
    assert cell.full_fingerprint != make_cell(student={"lora": {}}).full_fingerprint


def test_equal_adapters_are_one_cell_however_they_are_written() -> None:
    fields = {"r": 8, "alpha": 16.0, "targets": ["k_proj", "q_proj"], "dropout": 0}
    orders = [fields, {**fields, "alpha": 16, "targets": ["q_proj", "k_proj", "q_proj"]}]
    assert len({make_cell(student={"size": "small", "lora": order}).fingerprint for order in orders}) == 1


@pytest.mark.parametrize("student", [{}, {"student": "large"}, {"student": {"size": "large"}}])
def test_fields_of_the_adapter_are_axes_that_keep_the_student(student: dict[str, Any]) -> None:
    grid = make_grid(
        **student, grid={"student.lora.r": [2, 4], "student.lora.targets": [["q_proj"], "all-linear"]}
    )
    adapters = [
        (cell.training.lora.r, cell.training.lora.targets) for cell in grid.cells if cell.training.lora
    ]
    assert adapters == [(2, ("q_proj",)), (2, "all-linear"), (4, ("q_proj",)), (4, "all-linear")]
    assert {cell.training.start for cell in grid.cells} == {make_cell(**student).training.start}


def test_axes_of_students_and_of_their_adapters_are_crossed_in_either_order() -> None:
    axes = {"student.lora.r": [2, 4], "student": ["small", "large"]}
    for order in (list(axes), list(reversed(axes))):
        cells = make_grid(grid={axis: axes[axis] for axis in order}).cells
        students = {
            (cell.training.start.model.name, cell.training.lora and cell.training.lora.r) for cell in cells
        }
        assert students == {("small", 2), ("small", 4), ("large", 2), ("large", 4)}


def test_an_axis_of_students_compares_adapters_with_all_weights() -> None:
    grid = make_grid(grid={"student": ["small", {"size": "small", "lora": {"r": 2}}], "lmbda": [0, 1]})
    assert [cell.training.lora and cell.training.lora.r for cell in grid.cells] == [None, None, 2, 2]
    assert len({cell.training.start for cell in grid.cells}) == 1
    packs = group_cells_into_packs(grid.cells, "auto")
    assert [len(pack) for pack in packs] == [2, 1, 1]
    reasons = [explain_unpackable(pack[0]) for pack in packs]
    assert reasons[0] is None and "LoRA" in str(reasons[1])
    assert [cell.folder.count("_lora2_") for cell in grid.cells] == [0, 0, 1, 1]


def test_lists_of_targets_are_set_at_the_command_line() -> None:
    (cell,) = make_grid({"student.lora.targets": "[q_proj,v_proj]"}).cells
    assert cell.training.lora == LoraSpec(targets=("q_proj", "v_proj"))
    cells = make_grid({"student.lora.targets": "[q_proj,v_proj],[k_proj]"}).cells
    assert [len(cell.training.lora.targets) for cell in cells if cell.training.lora] == [2, 1]


def test_the_backward_pass_of_an_adapter_costs_half() -> None:
    students = ("small", {"size": "small", "lora": {}})
    cells = [make_cell(student=student, lmbda=0) for student in students]
    flops = [estimate_training_flops(cell.training, 100, 0) for cell in cells]
    assert flops[0] and flops[1] and flops[1] / flops[0] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"student": {"lora": {"r": 0}}}, ("student.lora.r: 0", "more than 0")),
        ({"student": {"lora": {"r": 2.5}}}, ("student.lora.r: 2.5", "whole number")),
        ({"student": {"lora": {"alpha": 0}}}, ("student.lora.alpha: 0", "more than 0")),
        ({"student": {"lora": {"dropout": 1}}}, ("student.lora.dropout: 1", "less than 1")),
        ({"student": {"lora": {"rank": 8}}}, ("student.lora.rank", "valid: r, alpha, targets, dropout")),
        ({"student": {"lora": 8}}, ("student.lora: 8", "r, alpha, targets, dropout")),
        ({"student": {"lora": {"targets": []}}}, ("student.lora.targets: []", "[q_proj, v_proj]")),
        (
            {"student": {"lora": {"targets": "q_proj"}}},
            ("student.lora.targets: 'q_proj'", "[q_proj, v_proj]"),
        ),
        ({"student": {"lora": {"targets": ["q_prj"]}}}, ("'q_prj'", "did you mean 'q_proj'?", "all-linear")),
        ({"student": {"lora": {"targets": ["lm_head"]}}}, ("'lm_head'", "valid: q_proj, k_proj")),
        ({"student": {"lora": {"targets": ["layers.1.self_attn.q_proj"]}}}, ("'layers.1.self_attn.q_proj'",)),
        ({"task": "words", "student": {"lora": {"targets": ["q_proj"]}}}, ("'q_proj'", "valid: q, k, v, o")),
        ({"teacher": {"size": "large", "lora": {}}}, ("teacher.lora", "student")),
        ({"grid": {"student.lora.r": [4, 0]}}, ("grid.student.lora.r[1]: 0", "more than 0")),
        ({"grid": {"student.lora.r": [None, 4]}}, ("grid.student.lora.r[0]: None",)),
        ({"grid": {"student.lora.rank": [4]}}, ("student.lora.rank", "student.lora.r")),
    ],
)
def test_what_is_no_adapter_is_refused(document: dict[str, Any], parts: tuple[str, ...]) -> None:
    message = get_refusal(**document)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


def test_the_part_of_a_layer_name_is_a_target() -> None:
    assert make_lora(targets=["layers.0.self_attn.q_proj"]) == LoraSpec(
        targets=("layers.0.self_attn.q_proj",)
    )


def test_a_missing_peft_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"gkd-lab\[peft\]"):
        check_peft_is_installed()
